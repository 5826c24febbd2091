"""Caveats: what the facts give reason to doubt, each with the threshold from which it is said."""

from __future__ import annotations

from collections.abc import Callable

from saliency_fast.summary.facts import Facts
from saliency_fast.summary.telling import Teller

UNCERTAIN, DIFFUSE, WIDE, AGAINST = 0.6, 0.25, 0.5, 0.55
OFF, ALIKE, APART, UNSTABLE = 0.1, 0.1, 0.25, 0.5


def caveats(facts: Facts, tell: Teller) -> list[tuple[str, str]]:
    """(kind, sentence) for everything that holds."""
    found = [(kind, say(facts, tell)) for kind, say in _KINDS.items()]
    told = [(kind, text) for kind, text in found if text is not None]
    return told + [("model", f"{note[:1].upper()}{note[1:]}.") for note in facts["notes"]]


def _target(facts: Facts, tell: Teller) -> str | None:
    best = facts["decision"]
    if best is None or best["class"] == facts["class"]:
        return None
    return f"The map explains {facts['name']}, which is not the model's decision."


def _uncertain(facts: Facts, tell: Teller) -> str | None:
    """A decision under 60 %."""
    if facts["decision"] is None or facts["decision"]["probability"] >= UNCERTAIN:
        return None
    return f"The decision is uncertain: {tell.probability('decision', 'probability')}."


def _diffuse(facts: Facts, tell: Teller) -> str | None:
    """The top region holds under 25 % of the evidence for the target."""
    top = facts["top"]
    if top is None or facts["regions"][top]["positive"] >= DIFFUSE:
        return None
    return (
        "The evidence is diffuse: the region with most of it holds "
        f"{tell.share('regions', top, 'positive')}."
    )


def _wide(facts: Facts, tell: Teller) -> str | None:
    """The top region takes more than half of the places."""
    top = facts["top"]
    if top is None or facts["regions"][top]["area"] <= WIDE:
        return None
    share = tell.share("regions", top, "area")
    return f"The region with most of the evidence covers {share} of the {facts['kind']}."


def _against(facts: Facts, tell: Teller) -> str | None:
    """More than 55 % of the evidence speaks against the target."""
    if facts["evidence"]["negative_share"] <= AGAINST or facts["evidence"]["positive"] == 0:
        return None
    share = tell.share("evidence", "negative_share")
    if facts["class"] is None:
        return f"More evidence lowers the output than raises it: {share}."
    return f"More evidence speaks against {facts['name']} than for it: {share}."


def _error(facts: Facts, tell: Teller) -> str | None:
    """An estimated relative L2 error over 10 %."""
    error = facts["confidence"]["error"]
    if error is None or error <= OFF:
        return None
    return f"The map is rough: its estimated error is {tell.share('confidence', 'error')} of it."


def _delta(facts: Facts, tell: Teller) -> str | None:
    """Values that miss the score's gain by more than 10 % of it."""
    share = facts["confidence"]["delta_share"]
    if share is None or share <= OFF:
        return None
    return (
        f"The map's values miss what the score gains over the baseline by "
        f"{tell.share('confidence', 'delta_share')}."
    )


def _unconverged(facts: Facts, tell: Teller) -> str | None:
    if facts["confidence"]["converged"] is not False:
        return None
    return "The map did not reach the tolerance that was asked for."


def _baseline(facts: Facts, tell: Teller) -> str | None:
    """More than 10 % of the places are like the baseline."""
    share = facts["confidence"]["at_baseline"]
    if share is None or share <= ALIKE:
        return None
    return (
        f"At {tell.share('confidence', 'at_baseline')} of the places the input equals the baseline,"
        " and the method can say nothing of them."
    )


def _unstable(facts: Facts, tell: Teller) -> str | None:
    """A correlation under .5 with maps of noisy inputs."""
    stable = facts["confidence"]["stability"]
    if stable is None or stable >= UNSTABLE:
        return None
    return "The map is unstable: noise changes it more than it leaves of it."


def _fills(facts: Facts, tell: Teller) -> str | None:
    """The two ways to remove the region disagree on the decision, by 25 points, or on the sign."""
    if facts["removal"] is None:
        return None
    (one, first), (two, second) = facts["removal"].items()
    if first["decision"] is None:
        apart = first["change"] * second["change"] < 0
    else:
        apart = first["decision"]["class"] != second["decision"]["class"]
        apart = apart or abs(first["probability"] - second["probability"]) > APART
    if not apart:
        return None
    return (
        f"The two ways to remove the strongest region, {one} and {two}, lead to different answers, "
        "so one of them may be unlike all that the model was trained on."
    )


def _contradicted(facts: Facts, tell: Teller) -> str | None:
    """The score does not fall by either removal."""
    if facts["removal"] is None or any(one["change"] < 0 for one in facts["removal"].values()):
        return None
    what = "the output" if facts["class"] is None else f"the score of {facts['name']}"
    before = facts["probability"]
    if before is not None and all(
        one["probability"] is not None and one["probability"] < before
        for one in facts["removal"].values()
    ):
        return (
            f"Removing the strongest region lowers the probability of {facts['name']} only because "
            f"other classes gain: {what}, which the map explains, does not fall, so the map is not "
            "borne out."
        )
    return f"Removing the strongest region does not lower {what}, so the map is not borne out."


_KINDS: dict[str, Callable[[Facts, Teller], str | None]] = {
    "target": _target,
    "uncertain": _uncertain,
    "diffuse": _diffuse,
    "wide": _wide,
    "against": _against,
    "error": _error,
    "delta": _delta,
    "unconverged": _unconverged,
    "baseline": _baseline,
    "unstable": _unstable,
    "fills": _fills,
    "contradicted": _contradicted,
}
