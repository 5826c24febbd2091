"""`summarise`: the content of a map in sentences, and the effect of removing its main region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from saliency_fast.summary.evidence_text import Cited, EvidenceText
from saliency_fast.summary.facts import Facts, facts_of
from saliency_fast.summary.grouping import COMPONENTS
from saliency_fast.summary.regions import Names, regions_of


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
        target: As in `explain`.
        how: The kind of grouping; this and `most`, `names` and `boxes` are as in `regions`.
        most: The largest number of regions.
        labels: The names of the classes, as a mapping or a sequence.
        names: The names of given labels or features.
        boxes: The objects.
        object_name: The word for the object in the boxes.
        stability: The number of times that the inputs are explained again under noise of 5 % of
            their range; needs an attribution or a `method`.
        method: The method of maps that are no attribution.
        baseline: The baseline of maps that are no attribution.
        forward_args: Further arguments of the model.
        forward_kwargs: Further arguments of the model, by name.
        memory_budget: As in `Engine`.
        points_per_launch: As in `Engine`.
        layout: The axes of the inputs, as in `explain`.

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
    checks.integer("stability", stability, 0)
    found = maps if isinstance(maps, Attribution) else None
    if target is None and found is not None and found.classes is None:
        target = restore_target(found.provenance.target, None, False, found.kept)
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
    facts = facts_of(subject, grouped, labels, object_name, stability, found)
    return [_summary(one) for one in facts]


def _summary(facts: Facts) -> Summary:
    text = EvidenceText(facts)
    sentences, caveats = text.sentences(), text.caveats()
    facts["caveats"] = [kind for kind, _ in caveats]
    return Summary(tuple(sentences), tuple(one for _, one in caveats), facts, tuple(text.cited))
