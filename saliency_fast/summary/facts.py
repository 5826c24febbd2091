"""Facts: all that a summary says of an example, as plain numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import choices, read_baselines
from saliency_fast.engine.recipe import WeightedSum
from saliency_fast.evaluate.similarity import correlation
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods import read_method
from saliency_fast.model.targets import Targets, read_targets
from saliency_fast.summary.asking import Removed, Verdict, ask, remove
from saliency_fast.summary.regions import Region, Regions
from saliency_fast.summary.spots import KINDS

Labels = Mapping[int, str] | Sequence[str] | None
Facts = dict[str, Any]
NOISE = 0.05
"""The deviation of the noise under which stability is looked at, as a share of an input's range."""


def facts_of(
    subject: Subject,
    grouped: Regions,
    labels: Labels,
    object_name: str,
    stability: int,
    found: Attribution | None,
) -> list[Facts]:
    """The facts of every example."""
    verdicts = ask(subject)
    tops = [_top(one) for one in grouped]
    gone = [0 if top is None else grouped[b][top].label for b, top in enumerate(tops)]
    removed = remove(subject, grouped.labels, gone)
    confidence = _confidence(subject, stability, found)
    targets = read_targets(subject.classes, subject.batch)
    return [
        {
            "kind": KINDS.get(grouped.labels.dim() - 1, "input") if _spatial(subject) else "input",
            "object": object_name if subject.masks is not None else None,
            **_explained(targets, verdicts[b], b, labels),
            **_verdict(verdicts[b], labels),
            "evidence": _evidence(grouped, b),
            "regions": [_plain(one) for one in grouped[b]],
            "rest": _plain(grouped.rest[b]),
            "top": tops[b],
            "removal": _removal(removed[b], verdicts[b], labels),
            "confidence": confidence[b],
            "notes": list(subject.caveats),
        }
        for b in range(subject.batch)
    ]


def label_of(number: int, labels: Labels) -> str:
    """A class in words."""
    if isinstance(labels, Mapping):
        return labels.get(number, f"class {number}")
    return labels[number] if labels is not None and number < len(labels) else f"class {number}"


def _spatial(subject: Subject) -> bool:
    return subject.inputs.dim() > 2


def _top(found: Sequence[Region]) -> int | None:
    """The region that holds most of the evidence for the target, of those that speak for it."""
    speaking = [number for number, one in enumerate(found) if one.share > 0]
    return max(speaking, key=lambda number: found[number].positive, default=None)


def _explained(targets: Targets, found: Verdict, row: int, labels: Labels) -> Facts:
    # The only number of an output is no class to decide for.
    if targets.classes is None or found.decision is None:
        return {"class": None, "name": "the output"}
    number = int(targets.classes[row, 0])
    return {"class": number, "name": label_of(number, labels)}


def _verdict(found: Verdict, labels: Labels) -> Facts:
    return {
        "score": found.score,
        "probability": found.probability,
        "decision": _class(found.decision, labels),
        "runner_up": _class(found.runner_up, labels),
    }


def _class(found: tuple[int, float] | None, labels: Labels) -> Facts | None:
    if found is None:
        return None
    number, probability = found
    return {"class": number, "name": label_of(number, labels), "probability": probability}


def _evidence(grouped: Regions, row: int) -> Facts:
    positive, negative = float(grouped.positive[row]), float(grouped.negative[row])
    whole = positive + negative
    return {
        "positive": positive,
        "negative": negative,
        "positive_share": positive / whole if whole else 0.0,
        "negative_share": negative / whole if whole else 0.0,
    }


def _plain(region: Region) -> Facts:
    return asdict(region) | {"box": list(region.box), "centre": list(region.centre)}


def _removal(found: Removed | None, before: Verdict, labels: Labels) -> Facts | None:
    """What the model says without the top region; change: of the score, from before."""
    if found is None:
        return None
    return {
        name: _verdict(one, labels) | {"change": one.score - before.score}
        for name, one in found.verdicts.items()
    }


def _confidence(subject: Subject, stability: int, found: Attribution | None) -> list[Facts]:
    batch = subject.batch
    equal = _equal_to_baseline(subject)
    stable = _stability(subject, stability)
    rows: list[Facts] = []
    for b in range(batch):
        gain = delta = error = None
        converged = None
        if found is not None:
            error = _known(found.error[b])
            converged = None if found.converged is None else bool(found.converged[b])
            if found.delta is not None and found.baseline_scores is not None:
                delta = _known(found.delta[b])
                gain = _known(found.scores[b] - found.baseline_scores[b])
        share = abs(delta / gain) if delta is not None and gain else None
        rows.append(
            {
                "error": error,
                "delta": delta,
                "gain": gain,
                "delta_share": share,
                "converged": converged,
                "stability": None if stable is None else _known(stable[b]),
                "noisy_inputs": stability,
                "at_baseline": None if equal is None else float(equal[b]),
            }
        )
    return rows


def _known(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _equal_to_baseline(subject: Subject) -> Tensor | None:
    """The share of places where an input is its baseline, so that a path between them says nothing
    of them; None for methods without such a path.
    """
    method, x = subject.method, subject.inputs
    if not (isinstance(method, str) or hasattr(method, "recipe")):
        return None
    recipe = read_method(method).recipe()  # type: ignore[arg-type]
    if not isinstance(recipe, WeightedSum):
        return None
    if recipe.baseline != "one" or recipe.factor != "difference":
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
        # The same for all examples, so that a batch changes nothing.
        noise = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        near = x + NOISE * span * noise.to(x.device, x.dtype)
        other = subject.of(near, subject.explain(near))
        total += correlation(subject.places, other.places).cpu()
    return total / count
