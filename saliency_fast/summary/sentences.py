"""Sentences: what a map says, and what became of it when it was put to the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import Explainer, read_subject
from saliency_fast.evaluate.scores import Running
from saliency_fast.model.axes import LayoutLike
from saliency_fast.model.targets import Target
from saliency_fast.specs import restore_target
from saliency_fast.summary.caveats import caveats
from saliency_fast.summary.facts import Facts, Labels, facts_of
from saliency_fast.summary.grouping import COMPONENTS
from saliency_fast.summary.regions import Names, regions_of
from saliency_fast.summary.telling import Cited, Teller
from saliency_fast.summary.templates import sentences


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """What is said of one example.

    sentences: the decision, the evidence with its places, what removing the strongest region does,
    and what is known of the map's error. caveats: further sentences, what the numbers give reason
    to doubt; `facts["caveats"]` names their kinds. facts: every number, as JSON can hold it. cited:
    each number of the text, as written, with its path in the facts.
    """

    sentences: tuple[str, ...]
    caveats: tuple[str, ...]
    facts: Facts
    cited: tuple[Cited, ...]

    @property
    def text(self) -> str:
        """All sentences, caveats last."""
        told = " ".join(self.sentences)
        return f"{told} Caution: {' '.join(self.caveats)}" if self.caveats else told

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
    labels: Labels = None,
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
    """Says in words what maps of `inputs` hold, one `Summary` per example.

    The model is asked: what it decides, and what it says when the region that holds most of the
    evidence for the target is blurred or painted over from around it (features: the example's mean
    or zero). maps: an `Attribution`, whose target counts unless given, or a tensor. how, most,
    names, boxes: of the regions, see `regions`. labels: names of classes; object_name: of what the
    boxes hold. stability: so many times the inputs are explained again under noise of 5 % of their
    range; needs the attribution's or a given `method`. layout: of the inputs, as in `explain`.

    Shares are of the map, not of the truth: a map that is wrong is summarised as faithfully.
    """
    if isinstance(stability, bool) or not isinstance(stability, int) or stability < 0:
        raise InputError(f"stability must be a whole number, 0 or more: got {stability!r}")
    found = maps if isinstance(maps, Attribution) else None
    if target is None and found is not None and found.classes is None:
        past = found.provenance.target
        target = restore_target(past, None, False, found.kept)
    running = Running(forward_args, forward_kwargs, memory_budget, points_per_launch)
    subject = read_subject(
        *(model, inputs, maps),
        target=target,
        boxes=boxes,
        method=method,
        baseline=baseline,
        running=running,
        layout=layout,
    )
    grouped = regions_of(subject, how, most, names)
    facts = facts_of(subject, grouped, labels, object_name, stability, found)
    return [_summary(one) for one in facts]


def _summary(facts: Facts) -> Summary:
    tell = Teller(facts)
    told = sentences(facts, tell)
    doubts = caveats(facts, tell)
    facts["caveats"] = [kind for kind, _ in doubts]
    return Summary(tuple(told), tuple(text for _, text in doubts), facts, tuple(tell.cited))
