"""`summarise`: the content of a map in sentences, and the effect of removing its main region.

Everything that a summary says of an example is a fact: a plain number that JSON can hold. Deletion
queries measure what the model predicts when the strongest region is replaced. The wording is in
`render/templates/summary.txt.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline, choices, read_baselines
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Explainer,
    position_sums,
    read_evaluation_input,
    replacement_of,
)
from saliency_fast.evaluate.maps import correlation
from saliency_fast.evaluate.metrics.inpaint import inpaint
from saliency_fast.evaluate.scores import NO_CLASS, Reading, RunOptions
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import Target, read_targets
from saliency_fast.record import restore_target
from saliency_fast.render.pages import macros, number_text
from saliency_fast.summary.regions import (
    COMPONENTS,
    KINDS,
    Names,
    Region,
    Regions,
    by_number,
    regions_of,
    with_preposition,
)

Facts = dict[str, Any]
NOISE = 0.05
"""The standard deviation of the noise of stability, as a share of an input's range."""
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
    checks.integer("stability", stability, 0)
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
    return [_EvidenceText(one).summary() for one in facts]


@dataclass
class _EvidenceText:
    """The text of an example's facts; `cited` collects its numbers."""

    facts: Facts
    cited: list[Cited] = field(default_factory=list)

    def summary(self) -> Summary:
        sentences, caveats = self.written(SENTENCES), self.written(CAVEATS)
        notes = [f"{_sentence(note)}." for note in self.facts["notes"]]
        self.facts["caveats"] = [*caveats, *("model" for _ in notes)]
        said, doubts = (*sentences.values(),), (*caveats.values(), *notes)
        return Summary(said, doubts, self.facts, tuple(self.cited))

    def written(self, names: tuple[str, ...]) -> dict[str, str]:
        """The texts of the template's macros that have something to say."""
        template = macros("summary.txt.jinja", f=self.facts, **self._words())
        texts = {name: _sentence(getattr(template, name)()) for name in names}
        return {name: text for name, text in texts.items() if text}

    def _words(self) -> dict[str, Any]:
        facts, regions, removal = self.facts, self.facts["regions"], self.facts["removal"] or {}
        worth = [one["share"] < 0 and one["negative"] >= WORTH for one in regions]
        against = [number for number, one in enumerate(worth) if one]
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
    for key in path:
        facts = facts[key]
    return facts


def facts_of(
    subject: EvaluationInput,
    grouped: Regions,
    labels: Names,
    object_name: str,
    stability: int,
    result: Attribution | None,
) -> list[Facts]:
    names = by_number(labels)
    tops = [_top(one) for one in grouped]
    queried = [0 if top is None else grouped[b][top].label for b, top in enumerate(tops)]
    predictions, removals = deletion_queries(subject, grouped.labels, queried, names)
    confidence = _confidence(subject, stability, result)
    classes = read_targets(subject.classes, subject.batch).classes
    facts = []
    for b, prediction in enumerate(predictions):
        # The only number of an output is no class to decide for.
        number = None
        if classes is not None and prediction["decision"] is not None:
            number = int(classes[b, 0])
        positive, negative = float(grouped.positive[b]), float(grouped.negative[b])
        total = positive + negative or 1.0
        removal = {
            name: one | {"change": one["score"] - prediction["score"]}
            for name, one in removals[b].items()
        }
        facts.append(
            {
                "kind": KINDS.get(subject.inputs.dim() - 2, "input"),
                "object": object_name if subject.masks is not None else None,
                "class": number,
                "name": "the output" if number is None else _class_name(number, names),
                **prediction,
                "evidence": {
                    "positive": positive,
                    "negative": negative,
                    "positive_share": positive / total,
                    "negative_share": negative / total,
                },
                "regions": [_plain_region(one) for one in grouped[b]],
                "rest": _plain_region(grouped.rest[b]),
                "top": tops[b],
                "removal": removal or None,
                "confidence": confidence[b],
                "notes": list(subject.caveats),
            }
        )
    return facts


def _top(result: Sequence[Region]) -> int | None:
    """The index of the region with most positive evidence, of those with a positive share."""
    positive = [number for number, one in enumerate(result) if one.share > 0]
    return max(positive, key=lambda number: result[number].positive, default=None)


def _class_name(number: int, names: Mapping[int, str]) -> str:
    return names.get(number, f"class {number}")


def _plain_region(region: Region) -> Facts:
    return asdict(region) | {"box": list(region.box), "centre": list(region.centre)}


@dataclass(frozen=True)
class _TopTwo(Reading):
    """A reading of the two likeliest classes and their probabilities instead of the decision."""

    count: int = 6

    def decided(self, decision: Tensor, shares: Tensor) -> Tensor:
        best = shares.detach().topk(2, dim=1)
        return torch.cat([best.indices.to(shares.dtype), best.values], 1)


def deletion_queries(
    subject: EvaluationInput, labels: Tensor, queried: list[int], names: Mapping[int, str]
) -> tuple[list[Facts], list[dict[str, Facts]]]:
    """The predictions of the inputs, and by example and replacement those without a region."""
    inputs = subject.inputs
    example = torch.tensor([b for b, one in enumerate(queried) if one], device=inputs.device).long()
    number = torch.tensor(queried, device=inputs.device).view(-1, *(1,) * (labels.dim() - 1))
    mask = (labels == number) & (number > 0)
    fills = replacements(inputs, mask) if len(example) else {}
    mask = mask if inputs.dim() == 2 else mask[:, None]
    removals: list[dict[str, Facts]] = [{} for _ in queried]
    predictions = None
    for name, fill in fills.items():
        points = torch.where(mask, fill, inputs)
        predictions, without = _predictions(subject, points, example, names)
        for b, one in zip(example.tolist(), without, strict=True):
            removals[b][name] = one
    if predictions is None:
        everything = torch.arange(subject.batch, device=inputs.device)
        predictions, _ = _predictions(subject, inputs, everything, names)
    return predictions, removals


def replacements(inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Two replacements of masked positions; of features the example's mean and zero."""
    if inputs.dim() == 2:
        mean = replacement_of("mean", inputs).expand_as(inputs)
        return {"set to the mean": mean, "set to zero": torch.zeros_like(inputs)}
    return {"blurred": replacement_of("blur", inputs), "inpainted": inpaint(inputs, mask)}


def _predictions(
    subject: EvaluationInput, points: Tensor, example: Tensor, names: Mapping[int, str]
) -> tuple[list[Facts], list[Facts]]:
    """The predictions of the inputs, and of the rows `example` of points [B, *]."""
    columns = subject.scorer.columns(lambda i, _: points[i], example, example, _TopTwo)
    first, second = ([_prediction(row, names) for row in one.tolist()] for one in columns)
    return first, second


def _prediction(row: list[float], names: Mapping[int, str]) -> Facts:
    score, probability, *numbers = row
    if probability == NO_CLASS:
        return {"score": score, "probability": None, "decision": None, "runner_up": None}
    decision, runner_up = (
        {"class": int(number), "name": _class_name(int(number), names), "probability": share}
        for number, share in zip(numbers[:2], numbers[2:], strict=True)
    )
    own = {"score": score, "probability": probability}
    return own | {"decision": decision, "runner_up": runner_up}


def _confidence(
    subject: EvaluationInput, stability: int, result: Attribution | None
) -> list[Facts]:
    equal, stable = _equal_to_baseline(subject), _stability(subject, stability)
    rows: list[Facts] = []
    for b in range(subject.batch):
        gain = delta = error = converged = None
        if result is not None:
            error = _finite(result.error[b])
            converged = None if result.converged is None else bool(result.converged[b])
            if result.delta is not None and result.baseline_scores is not None:
                delta = _finite(result.delta[b])
                gain = _finite(result.scores[b] - result.baseline_scores[b])
        rows.append(
            {
                "error": error,
                "delta": delta,
                "gain": gain,
                "delta_share": abs(delta / gain) if delta is not None and gain else None,
                "converged": converged,
                "stability": None if stable is None else _finite(stable[b]),
                "noisy_inputs": stability,
                "at_baseline": None if equal is None else float(equal[b]),
            }
        )
    return rows


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _equal_to_baseline(subject: EvaluationInput) -> Tensor | None:
    """The share of positions where an input equals a path's baseline; None without a path."""
    recipe, x = subject.recipe, subject.inputs
    if not isinstance(recipe, WeightedSum) or recipe.factor != "difference":
        return None
    same = torch.ones_like(x, dtype=torch.bool)
    for one in choices(subject.baseline):
        (start,) = read_baselines(one, (x,))
        same &= x == start
    whole = same.all(1) if x.dim() > 2 else same
    return whole.flatten(1).double().mean(1)


def _stability(subject: EvaluationInput, count: int) -> Tensor | None:
    """The mean correlation of the maps with those of `count` noisy inputs, float64 [B]."""
    if not count:
        return None
    x, total = subject.inputs, torch.zeros(subject.batch, dtype=torch.float64, device="cpu")
    low, high = torch.aminmax(x.flatten(1), dim=1)
    span = (high - low).view(-1, *(1,) * (x.dim() - 1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        # All examples get the same noise, so that the batch does not matter.
        noise = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        near = x + NOISE * span * noise.to(x.device, x.dtype)
        total += correlation(subject.places, position_sums(subject.explain(near))).cpu()
    return total / count
