"""Facts: everything that a summary says of an example, as plain numbers that JSON can hold.

Deletion queries measure what the model predicts when the strongest region is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import choices, read_baselines
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.evaluate.inputs import Subject, replacement_of
from saliency_fast.evaluate.metrics.inpaint import inpaint
from saliency_fast.evaluate.scores import NO_CLASS, ScoreQuery, probabilities
from saliency_fast.evaluate.similarity import correlation
from saliency_fast.methods import read_method
from saliency_fast.model.targets import Reader, Targets, read_targets, tensor_of, with_padding
from saliency_fast.summary.locations import KINDS
from saliency_fast.summary.regions import Names, Region, Regions, by_number

Facts = dict[str, Any]
NOISE = 0.05
"""The standard deviation of the noise of stability, as a share of an input's range."""


def facts_of(
    subject: Subject,
    grouped: Regions,
    labels: Names,
    object_name: str,
    stability: int,
    found: Attribution | None,
) -> list[Facts]:
    """The facts of every example."""
    names = by_number(labels)
    tops = [_top(one) for one in grouped]
    queried = [0 if top is None else grouped[b][top].label for b, top in enumerate(tops)]
    predictions, removals = deletion_queries(subject, grouped.labels, queried, names)
    confidence = _confidence(subject, stability, found)
    classes = read_targets(subject.classes, subject.batch).classes
    facts = []
    for b, prediction in enumerate(predictions):
        # The only number of an output is no class to decide for.
        number = None
        if classes is not None and prediction["decision"] is not None:
            number = int(classes[b, 0])
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
                "evidence": _evidence(float(grouped.positive[b]), float(grouped.negative[b])),
                "regions": [_plain_region(one) for one in grouped[b]],
                "rest": _plain_region(grouped.rest[b]),
                "top": tops[b],
                "removal": removal or None,
                "confidence": confidence[b],
                "notes": list(subject.caveats),
            }
        )
    return facts


def _top(found: Sequence[Region]) -> int | None:
    """The index of the region with most positive evidence, of those with a positive share."""
    positive = [number for number, one in enumerate(found) if one.share > 0]
    return max(positive, key=lambda number: found[number].positive, default=None)


def _class_name(number: int, names: Mapping[int, str]) -> str:
    return names.get(number, f"class {number}")


def _plain_region(region: Region) -> Facts:
    return asdict(region) | {"box": list(region.box), "centre": list(region.centre)}


def _evidence(positive: float, negative: float) -> Facts:
    whole = positive + negative
    return {
        "positive": positive,
        "negative": negative,
        "positive_share": positive / whole if whole else 0.0,
        "negative_share": negative / whole if whole else 0.0,
    }


@dataclass(frozen=True)
class _Reader(Reader):
    """A target that reads [R, 6]: the score, and where there are several
    classes the probability of the target's class and the two largest with their probabilities;
    `NO_CLASS` otherwise.
    """

    classes: Tensor | None
    targets: Targets
    count: int = 6

    def read(self, raw: Any, example: Tensor) -> Tensor:
        self.targets.check(raw, example)
        score = self.targets.read(raw, example)[0][:, :1]
        score = score if score.dtype in (torch.float32, torch.float64) else score.float()
        rest = score.new_full((len(example), 5), NO_CLASS)
        if self.classes is not None:
            output = tensor_of(raw).detach()
            if output.shape[1] > 1:
                shares = probabilities(output, output.to(score.dtype))
                best = shares.topk(2, dim=1)
                own = shares.gather(1, self.classes[example][:, None])
                rest = torch.cat([own, best.indices.to(own.dtype), best.values], 1)
        return torch.cat([score, rest], 1)


def deletion_queries(
    subject: Subject, labels: Tensor, queried: list[int], names: Mapping[int, str]
) -> tuple[list[Facts], list[dict[str, Facts]]]:
    """The predictions of the inputs, and per example and replacement those without the region
    `queried[b]` of labels [B, *spatial]; none where that is 0.
    """
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
    """Two replacements of the masked positions, bool [B, *spatial], of inputs [B, C, *spatial]:
    "blurred" (5 % of each axis) and "inpainted" (Rong, 2022). Features are "set to the mean" of the
    example and "set to zero".
    """
    if inputs.dim() == 2:
        mean = replacement_of("mean", inputs).expand_as(inputs)
        return {"set to the mean": mean, "set to zero": torch.zeros_like(inputs)}
    return {"blurred": replacement_of("blur", inputs), "inpainted": inpaint(inputs, mask)}


def _predictions(
    subject: Subject, points: Tensor, example: Tensor, names: Mapping[int, str]
) -> tuple[list[Facts], list[Facts]]:
    """The predictions of the inputs, and of the rows `example` of points [B, *]."""
    targets = read_targets(subject.classes, subject.batch).to(subject.inputs.device)
    running = subject.running
    arguments = running.arguments().values()
    inputs = running.back(subject.inputs)
    targets = with_padding(targets, subject.model, (inputs,), *arguments)  # type: ignore[arg-type]
    classes = None
    if targets.classes is not None and targets.position is None:
        classes = targets.classes[:, 0]
    queries = ScoreQuery(lambda example, place: running.back(points[example]), example, example)
    engine = running.engine(subject.model, queries)  # type: ignore[arg-type]
    engine(inputs, _Reader(classes, targets), **running.arguments())
    first, second = ([_prediction(row, names) for row in one.tolist()] for one in queries.found)
    return first, second


def _prediction(row: list[float], names: Mapping[int, str]) -> Facts:
    """What `_Reader` has read; None for models that do not classify."""
    score, probability, *numbers = row
    if probability == NO_CLASS:
        return {"score": score, "probability": None, "decision": None, "runner_up": None}
    decision, runner_up = (
        {"class": int(number), "name": _class_name(int(number), names), "probability": share}
        for number, share in zip(numbers[:2], numbers[2:], strict=True)
    )
    return {
        "score": score,
        "probability": probability,
        "decision": decision,
        "runner_up": runner_up,
    }


def _confidence(subject: Subject, stability: int, found: Attribution | None) -> list[Facts]:
    equal, stable = _equal_to_baseline(subject), _stability(subject, stability)
    rows: list[Facts] = []
    for b in range(subject.batch):
        gain = delta = error = converged = None
        if found is not None:
            error = _finite(found.error[b])
            converged = None if found.converged is None else bool(found.converged[b])
            if found.delta is not None and found.baseline_scores is not None:
                delta = _finite(found.delta[b])
                gain = _finite(found.scores[b] - found.baseline_scores[b])
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


def _equal_to_baseline(subject: Subject) -> Tensor | None:
    """The share of positions where an input equals its baseline, of which a path between them says
    nothing; None for methods without such a path.
    """
    method, x = subject.method, subject.inputs
    if not (isinstance(method, str) or hasattr(method, "recipe")):
        return None
    recipe = read_method(method).recipe()  # type: ignore[arg-type]
    if not isinstance(recipe, WeightedSum) or recipe.factor != "difference":
        return None
    same = torch.ones_like(x, dtype=torch.bool)
    for one in choices(subject.baseline):
        (start,) = read_baselines(one, (x,))
        same &= x == start
    whole = same.all(1) if x.dim() > 2 else same
    return whole.flatten(1).double().mean(1)


def _stability(subject: Subject, count: int) -> Tensor | None:
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
        other = subject.of(near, subject.explain(near))
        total += correlation(subject.places, other.places).cpu()
    return total / count
