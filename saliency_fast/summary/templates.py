"""Templates: facts of a map in plain language."""

from __future__ import annotations

from saliency_fast.summary.facts import Facts
from saliency_fast.summary.spots import at
from saliency_fast.summary.telling import Teller

WORTH = 0.05
"""The share of the evidence from which a further region is spoken of."""
FURTHER = 2
"""So many further regions at most."""


def sentences(facts: Facts, tell: Teller) -> list[str]:
    """What a person is told, in order: the decision, what speaks for the target and what removing
    it does, what speaks against it, and how good the map is.
    """
    told = [_decision(facts, tell), _speaking(facts, tell), _removal(facts, tell)]
    return [one for one in [*told, _against(facts, tell), *_confidence(facts, tell)] if one]


def _decision(facts: Facts, tell: Teller) -> str:
    best, name = facts["decision"], facts["name"]
    if best is None:
        score = tell.signed("score")
        return f"{name[:1].upper()}{name[1:]} is {score}."
    text = (
        f"The model decides for {best['name']} with a probability of "
        f"{tell.probability('decision', 'probability')}; next is {facts['runner_up']['name']} with "
        f"{tell.probability('runner_up', 'probability')}."
    )
    if best["class"] != facts["class"]:
        text += (
            f" The map explains {name}, with a probability of {tell.probability('probability')}."
        )
    return text


def _against(facts: Facts, tell: Teller) -> str | None:
    """What speaks against the target, and where most of it lies."""
    evidence, name = facts["evidence"], facts["name"]
    verb = _verb(facts, "speaks against", "lowers")
    if evidence["negative"] == 0:
        # Class activation maps may have cut it off.
        return f"Nothing in the map {verb} {name}." if evidence["positive"] else None
    text = f"Of all evidence, {tell.share('evidence', 'negative_share')} {verb} {name}"
    against = [one for one, part in enumerate(facts["regions"]) if part["share"] < 0]
    worst = max(against, key=lambda one: facts["regions"][one]["negative"], default=None)
    if worst is not None and facts["regions"][worst]["negative"] >= WORTH:
        share = tell.share("regions", worst, "negative")
        text += f"; {share} of that lies {_where(facts, worst)}"
    return f"{text}."


def _speaking(facts: Facts, tell: Teller) -> str:
    """What speaks for the target, and where."""
    top, name = facts["top"], facts["name"]
    if facts["evidence"]["positive"] == 0:
        if facts["evidence"]["negative"] == 0:
            return f"The map is zero everywhere: it says nothing of {name}."
        return f"Nothing in the map {_verb(facts, 'speaks for', 'raises')} {name}."
    whose = _verb(facts, f"evidence for {name}", f"what raises {name}")
    if top is None:
        return f"No region stands out: the {whose} is spread over the {facts['kind']}."
    the = "the " if facts["class"] is not None else ""
    share = tell.share("regions", top, "positive")
    text = f"{_capital(share)} of {the}{whose} lies {_where(facts, top)}"
    words = {_where(facts, top)}
    for number in _others(facts, top):
        where = _where(facts, number)
        place = f"elsewhere {where}" if where in words else where
        words.add(where)
        text += f", {tell.share('regions', number, 'positive')} {place}"
    return f"{text}."


def _others(facts: Facts, top: int) -> list[int]:
    """Further regions that speak for the target, the largest first."""
    regions = facts["regions"]
    found = [
        number
        for number, one in enumerate(regions)
        if number != top and one["share"] > 0 and one["positive"] >= WORTH
    ]
    return sorted(found, key=lambda number: -regions[number]["positive"])[:FURTHER]


def _where(facts: Facts, number: int) -> str:
    """A region's place, in the object where it lies there."""
    region, kind = facts["regions"][number], facts["kind"]
    if region["named"]:
        return f"in {region['where']}"
    if region["within"]:
        return f"{at(region['within'])} of the {facts['object']}"
    words = f"{at(region['where'])} of the {kind}"
    return f"outside of the {facts['object']}, {words}" if facts["object"] else words


def _removal(facts: Facts, tell: Teller) -> str | None:
    removed = facts["removal"]
    if removed is None:
        return None
    region = facts["regions"][facts["top"]]
    lead = f"Removing {region['where'] if region['named'] else 'the strongest region'}"
    if facts["decision"] is None:
        first, *later = (_moved(facts, name, tell) for name in removed)
        moved = " and ".join([first, *(one.replace(facts["name"], "it", 1) for one in later)])
        return f"{lead} {moved}."
    before = facts["decision"]["class"]
    changed = [name for name, one in removed.items() if one["decision"]["class"] != before]
    kept = [name for name in removed if name not in changed]
    if not changed:
        return (
            f"{lead} does not change the decision: the probability of "
            f"{facts['name']}, {tell.probability('probability')}, {_followed(facts, kept, tell)}."
        )
    new = {removed[name]["decision"]["name"] for name in changed}
    parts = [
        f"{'' if len(new) == 1 and not kept else 'to ' + removed[name]['decision']['name'] + ' '}"
        f"when it is {name} (at {tell.probability('removal', name, 'decision', 'probability')})"
        for name in changed
    ]
    to = f" to {new.pop()}" if len(new) == 1 and not kept else ""
    text = f"{lead} changes the decision{to} " + " and ".join(parts)
    if not kept:
        return f"{text}."
    return (
        f"{text}, and does not when it is {kept[0]}: the probability of {facts['name']}, "
        f"{tell.probability('probability')}, then {_step(facts, kept[0], tell)}."
    )


def _followed(facts: Facts, fills: list[str], tell: Teller) -> str:
    steps = [_step(facts, name, tell) for name in fills]
    if steps[0].split()[0] == steps[-1].split()[0]:
        # "falls to 54 % when it is blurred and to 60 % when it is inpainted"
        steps[1:] = [one.partition(" ")[2] for one in steps[1:]]
    both = zip(steps, fills, strict=True)
    return " and ".join(f"{step} when it is {name}" for step, name in both)


def _step(facts: Facts, fill: str, tell: Teller) -> str:
    """Where a probability goes: "falls to 71 %"."""
    before, after = facts["probability"], facts["removal"][fill]["probability"]
    written = tell.probability("removal", fill, "probability")
    if written == tell.probability("probability"):
        return f"stays at {written}"
    return f"{'falls' if after < before else 'rises'} to {written}"


def _moved(facts: Facts, fill: str, tell: Teller) -> str:
    """What a removal does to an output: "lowers the output by 2.1, to 1.2, when it is blurred"."""
    change = facts["removal"][fill]["change"]
    if change == 0:
        return f"leaves {facts['name']} as it is when it is {fill}"
    return (
        f"{'lowers' if change < 0 else 'raises'} {facts['name']} by "
        f"{tell.number('removal', fill, 'change')}, to {tell.signed('removal', fill, 'score')}, "
        f"when it is {fill}"
    )


def _confidence(facts: Facts, tell: Teller) -> list[str]:
    known, told = facts["confidence"], []
    if known["error"] is not None:
        told.append(f"the map's estimated numerical error is {tell.share('confidence', 'error')}")
    if known["delta_share"] is not None:
        share = tell.share("confidence", "delta_share")
        told.append(f"its values miss the score's gain over the baseline by {share} of it")
    if known["stability"] is not None:
        stable = tell.signed("confidence", "stability")
        told.append(f"its correlation with maps of noisy inputs is {stable}")
    return [f"{_capital('; '.join(told))}."] if told else []


def _verb(facts: Facts, for_class: str, for_number: str) -> str:
    return for_number if facts["class"] is None else for_class


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
