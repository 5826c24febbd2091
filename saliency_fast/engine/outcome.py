"""Outcome: the engine's answer, its mean over several baselines, and whether it is finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.folds import norm_of
from saliency_fast.engine.ties import Tied
from saliency_fast.errors import ModelError


@dataclass(frozen=True)
class Outcome:
    """The engine's answer for B examples with K maps each.

    values: per input [B, K, *]. scores, baseline_scores, sums (of the values), error (relative L2,
    estimated): float64 [B, K]; classes int64 [B, K] where targets are classes. points int64 [B]
    visited, converged bool [B] where a tolerance was asked for. precision_error [B, K]: what of
    the error its precision costs, where that is not float32, and `underflow` the share of gradients
    that it could not hold. tied: what hangs on ties, where anybody looked. extras: further results
    [B, K, *] by name.
    """

    values: Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    sums: Tensor
    error: Tensor
    points: Tensor
    converged: Tensor | None
    classes: Tensor | None
    halvings: int = 0
    precision_error: Tensor | None = None
    underflow: float = 0.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Tied | None = None

    @property
    def delta(self) -> Tensor | None:
        """Completeness: the sum of the values less what the score gained over the baseline."""
        if self.baseline_scores is None:
            return None
        return self.sums - (self.scores - self.baseline_scores)


def average(outcomes: list[Outcome]) -> Outcome:
    """The mean over several baselines; its error is at most the mean of theirs, by the triangle
    inequality: absolute errors add up, and the mean map may be smaller than each.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    share, last = 1.0 / len(outcomes), outcomes[-1]
    baseline_scores = [one.baseline_scores for one in outcomes if one.baseline_scores is not None]
    converged = [one.converged for one in outcomes if one.converged is not None]
    values = tuple(
        sum(parts[1:], parts[0]) * share
        for parts in zip(*(one.values for one in outcomes), strict=True)
    )
    tiny = torch.finfo(torch.float64).tiny
    norms, norm = [_norm(one.values) for one in outcomes], _norm(values).clamp_min(tiny)

    def relative(errors: list[Tensor]) -> Tensor:
        pairs = zip(errors, norms, strict=True)
        return torch.stack([error * size for error, size in pairs]).mean(0) / norm

    lost = [one.precision_error for one in outcomes if one.precision_error is not None]
    return replace(
        last,
        values=values,
        sums=torch.stack([one.sums for one in outcomes]).mean(0),
        error=relative([one.error for one in outcomes]),
        baseline_scores=torch.stack(baseline_scores).mean(0) if baseline_scores else None,
        converged=torch.stack(converged).all(0) if converged else None,
        points=torch.stack([one.points for one in outcomes]).sum(0),
        halvings=max(one.halvings for one in outcomes),
        precision_error=relative(lost) if lost else None,
        underflow=max(one.underflow for one in outcomes),
        tied=Tied.of_all([one.tied for one in outcomes if one.tied is not None]),
        extras={
            name: torch.stack([one.extras[name].double() for one in outcomes]).mean(0)
            for name in last.extras
        },
    )


def _norm(values: Inputs) -> Tensor:
    """L2 norm of each map over all inputs: float64 [B, K]."""
    return norm_of(tuple(one.flatten(0, 1) for one in values)).view(values[0].shape[:2])


def need_finite(outcome: Outcome, precision: str = "float32") -> None:
    """Raises ModelError where the model gave NaN or infinity."""
    half = "" if precision == "float32" else f", or precision='float32' instead of {precision!r}"
    found = {"scores": outcome.scores, "attributions": outcome.sums}
    if outcome.baseline_scores is not None:
        found["scores at the baseline"] = outcome.baseline_scores
    if bool(torch.isfinite(torch.stack(list(found.values()))).all()):
        return
    for name, numbers in found.items():
        bad = ~torch.isfinite(numbers).all(1)
        if bool(bad.any()):
            raise ModelError(
                f"the model gives NaN or infinite {name} for examples "
                f"{bad.nonzero().flatten().tolist()[:8]}: expected finite numbers; check the "
                f"model's output and gradient there (torch.autograd.set_detect_anomaly helps){half}"
            )
