"""`summarise`: the content of a map in sentences, and the effect of removing its main region.

The wording is in `render/templates/summary.txt.jinja`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.evaluate.inputs import Explainer, read_evaluation_input
from saliency_fast.evaluate.scores import RunOptions
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import Target
from saliency_fast.record import restore_target
from saliency_fast.render.html import macros, number_text
from saliency_fast.summary.facts import Facts, facts_of
from saliency_fast.summary.regions import COMPONENTS, Names, regions_of, with_preposition

SENTENCES = ("decision", "evidence_for", "removal", "evidence_against", "confidence")
CAVEATS = (
    *("target", "uncertain", "diffuse", "wide", "against", "error", "delta", "unconverged"),
    *("baseline", "unstable", "fills", "contradicted"),
)
WORTH, FURTHER = 0.05, 2
"""Further regions are mentioned from this share of the evidence, and at most so many."""
APART = 0.25
"""Two replacements disagree if their probabilities differ by more."""
_ROUNDING = 1e-13
"""Sums of shares may differ from 1 by so much."""
_CERTAIN = 1e-12
"""The distance of written probabilities from 0 and 1: a model's arithmetic is never certain."""


@dataclass(frozen=True)
class Cited:
    """A number of a text: as it is written, and its path in the facts."""

    written: str
    path: tuple[str | int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """The summary of one example; `summarise` has an example.

    Attributes:
        sentences: The decision, the evidence with its locations, the effect of removing the
            strongest region, the evidence against, and the known errors of the map.
        caveats: Reasons for doubt; `facts["caveats"]` names their kinds.
        facts: Every number, as JSON can hold it.
        cited: Each number of the text as written, with its path in the facts.
    """

    sentences: tuple[str, ...]
    caveats: tuple[str, ...]
    facts: Facts
    cited: tuple[Cited, ...]

    @property
    def text(self) -> str:
        """All sentences, caveats last."""
        text = " ".join(self.sentences)
        return f"{text} Caution: {' '.join(self.caveats)}" if self.caveats else text

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def summarise(
    model: Callable[..., Any],
    inputs: Tensor,
    maps: Attribution | Tensor,
    *,
    target: Target = None,
    how: str | Tensor = COMPONENTS,
    most: int = 5,
    labels: Names = None,
    names: Names = None,
    boxes: Any = None,
    object_name: str = "object",
    stability: int = 0,
    method: Explainer | None = None,
    baseline: Baseline = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    memory_budget: int | str | None = None,
    points_per_launch: int | None = None,
    layout: LayoutLike = None,
) -> list[Summary]:
    """Says in sentences what the maps of inputs hold.

    The model is run for its decision, and again with the strongest region, the one with most of the
    evidence for the target, blurred and inpainted (features: set to the example's mean and to
    zero). Shares are of the map and not of the truth: a wrong map is summarised as faithfully.

    Args:
        model: The explained model.
        inputs: The explained inputs [B, C, *spatial] or features [B, F].
        maps: An attribution, whose target is the default, or values as in `regions`.
        target, layout, forward_args, forward_kwargs: As in `explain`.
        how, most, names, boxes: As in `regions`.
        labels: The names of the classes, as a mapping or a sequence.
        object_name: The word for the object in the boxes.
        stability: The number of times that the inputs are explained again under noise of 5 % of
            their range; needs an attribution or a `method`.
        method, baseline: Of maps that are no attribution.
        memory_budget, points_per_launch: As in `Engine`.

    Returns:
        One summary per example.

    Raises:
        InputError: For maps that do not fit, and for unknown arguments.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> x = torch.tensor([[3.0, 1.0]])
        >>> (summary,) = summarise(model, x, 2 * x, names=["age", "dose"])
        >>> summary.sentences[1]
        '75 % of what raises the output lies in age, 25 % in dose.'
    """
    checks.whole("stability", stability, 0)
    result = maps if isinstance(maps, Attribution) else None
    if target is None and result is not None and result.classes is None:
        target = restore_target(result.provenance.target, None, False, result.kept)
    subject = read_evaluation_input(
        *(model, inputs, maps),
        target=target,
        boxes=boxes,
        method=method,
        baseline=baseline,
        running=RunOptions(forward_args, forward_kwargs, memory_budget, points_per_launch),
        layout=layout,
    )
    grouped = regions_of(subject, how, most, names)
    facts = facts_of(subject, grouped, labels, object_name, stability, result)
    return [_summary(one) for one in facts]


def _summary(facts: Facts) -> Summary:
    text = _EvidenceText(facts)
    sentences, caveats = text.written(SENTENCES), text.written(CAVEATS)
    caveats += [("model", f"{_sentence(note)}.") for note in facts["notes"]]
    facts["caveats"] = [kind for kind, _ in caveats]
    said, doubts = (tuple(text for _, text in several) for several in (sentences, caveats))
    return Summary(said, doubts, facts, tuple(text.cited))


@dataclass
class _EvidenceText:
    """The text of an example's facts; `cited` collects its numbers."""

    facts: Facts
    cited: list[Cited] = field(default_factory=list)

    def written(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        """(name, text) of the template's macros that have something to say."""
        template = macros("summary.txt.jinja", f=self.facts, **self._words())
        texts = [(name, _sentence(getattr(template, name)())) for name in names]
        return [(name, text) for name, text in texts if text]

    def _words(self) -> dict[str, Any]:
        """The words and functions of the template."""
        facts, regions, removal = self.facts, self.facts["regions"], self.facts["removal"] or {}
        against = [
            n for n, one in enumerate(regions) if one["share"] < 0 and one["negative"] >= WORTH
        ]
        worst = max(against, key=lambda one: regions[one]["negative"], default=None)
        top = {} if facts["top"] is None else regions[facts["top"]]
        changed = [how for how, one in removal.items() if _class(one) != _class(facts)]
        kept = [how for how in removal if how not in changed]
        new = {removal[how]["decision"]["name"] for how in changed}
        return {
            "share": partial(self._cite, share_text),
            "probability": partial(self._cite, _probability_text),
            "magnitude": partial(self._cite, lambda value: number_text(abs(value))),
            "number": partial(self._cite, number_text),
            "verb": self._verb,
            "mentioned": self._mentioned(),
            "worst": None if worst is None else (worst, self._where(worst)),
            "removed": top["where"] if top.get("named") else "the strongest region",
            "changed": changed,
            "kept": kept,
            "only": new.pop() if len(new) == 1 and not kept else "",
            "disagree": len(removal) == 2 and _disagree(*removal.values()),
        }

    def _cite(self, text: Any, *path: str | int) -> str:
        """Writes the fact at a path."""
        self.cited.append(Cited(text(value_at(self.facts, path)), path))
        return self.cited[-1].written

    def _verb(self, how: str) -> str:
        """The change of the target's probability by a replacement, as it is written."""
        before, after = self.facts["probability"], self.facts["removal"][how]["probability"]
        if _probability_text(before) == _probability_text(after):
            return "stays"
        return "falls" if after < before else "rises"

    def _mentioned(self) -> list[tuple[int, str]]:
        """The regions with most evidence for the target, and where they are."""
        top, regions = self.facts["top"], self.facts["regions"]
        if top is None:
            return []
        worth = [one["share"] > 0 and one["positive"] >= WORTH for one in regions]
        further = [number for number, one in enumerate(worth) if one and number != top]
        further.sort(key=lambda number: -regions[number]["positive"])
        mentioned: list[tuple[int, str]] = []
        for number in (top, *further[:FURTHER]):
            where = self._where(number)
            repeated = where in (one.removeprefix("elsewhere ") for _, one in mentioned)
            mentioned.append((number, f"elsewhere {where}" if repeated else where))
        return mentioned

    def _where(self, number: int) -> str:
        """A region's location, within the object where it lies there."""
        region, thing = self.facts["regions"][number], self.facts["object"]
        if region["named"]:
            return f"in {region['where']}"
        if region["within"]:
            return f"{with_preposition(region['within'])} of the {thing}"
        words = f"{with_preposition(region['where'])} of the {self.facts['kind']}"
        return f"outside of the {thing}, {words}" if thing else words


def _class(prediction: Facts) -> int | None:
    return None if prediction["decision"] is None else prediction["decision"]["class"]


def _disagree(first: Facts, second: Facts) -> bool:
    """Whether two replacements differ in the decision, by `APART`, or in the sign of the change."""
    if first["decision"] is None:
        return bool(first["change"] * second["change"] < 0)
    is_apart = abs(first["probability"] - second["probability"]) > APART
    return is_apart or _class(first) != _class(second)


def _sentence(text: str) -> str:
    """A text in one line, with a capital letter."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:]


def share_text(share: float) -> str:
    """A share of at least 0 in whole per cent, "less than 1 %" or "more than 99 %"."""
    if share == 0.0 or abs(share - 1.0) < _ROUNDING:
        return "0 %" if share == 0.0 else "100 %"
    if share < 0.01:
        return "less than 1 %"
    whole = round(100.0 * share)
    return "more than 99 %" if whole == 100 and share < 1.0 else f"{whole} %"


def _probability_text(probability: float) -> str:
    return share_text(min(max(probability, _CERTAIN), 1.0 - _CERTAIN))


def value_at(facts: Any, path: tuple[str | int, ...]) -> Any:
    """The value of the facts at a path of names and indices."""
    for key in path:
        facts = facts[key]
    return facts
