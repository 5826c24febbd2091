"""Outcome: what a metric found, for every example, with everything that it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError

RESAMPLES = 2000
"""Bootstrap samples: the ends of a 95 % interval then move by about 1 % of its width."""


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Values y, float64 [B, n], of every example over shared places x, float64 [n]."""

    x: Tensor
    y: Tensor
    x_name: str
    y_name: str

    def area(self) -> Tensor:
        """The area under each example's curve by the trapezoid rule, float64 [B]."""
        return torch.trapezoid(self.y, self.x, dim=1)


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its bootstrap interval; NaN where there is nothing to average."""

    mean: float
    low: float
    high: float
    confidence: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, eq=False, repr=False)
class Outcome:
    """What a metric found.

    values: float64 [B], NaN where the metric says nothing of an example. better: "higher", "lower"
    or "" where neither is. parameters: the metric's fields and all else that the numbers depend
    on. passed: the verdict of metrics that give one, by `threshold`. details: further numbers by
    name. caveats: what a reader must know.
    """

    metric: str
    values: Tensor
    better: str
    parameters: Mapping[str, Any]
    curve: Curve | None = None
    passed: bool | None = None
    threshold: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    caveats: tuple[str, ...] = ()

    def mean(self, confidence: float = 0.95, *, seed: int = 0) -> Interval:
        """The mean over examples, with its bootstrap interval (Efron, 1979)."""
        return bootstrap(self.values, confidence, seed=seed)

    def over(self, other: Outcome, confidence: float = 0.95, *, seed: int = 0) -> Interval:
        """How much larger the mean is than another's on the same examples, paired."""
        if other.values.shape != self.values.shape:
            raise InputError(
                "outcomes must be of the same examples: got "
                f"{len(self.values)} and {len(other.values)}"
            )
        return bootstrap(self.values - other.values, confidence, seed=seed)

    def __repr__(self) -> str:
        verdict = "" if self.passed is None else f", {'passed' if self.passed else 'FAILED'}"
        best = f", {self.better} is better" if self.better else ""
        lines = [f"{self.metric}: {self.mean()} over {len(self.values)} examples{verdict}{best}"]
        return "\n".join([*lines, *(f"  note: {one}" for one in self.caveats)])


def bootstrap(values: Tensor, confidence: float = 0.95, *, seed: int = 0) -> Interval:
    """The mean of values [B] and the percentile interval of means of resampled examples."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must lie between 0 and 1: got {confidence}")
    known = values.detach().double().cpu().flatten()
    known = known[known.isfinite()]
    count = len(known)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, confidence, 0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator, device="cpu")
    means = known[drawn].mean(1)
    tail = (1.0 - confidence) / 2.0
    ends = means.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64, device="cpu"))
    return Interval(float(known.mean()), float(ends[0]), float(ends[1]), confidence, count)
