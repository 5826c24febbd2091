"""Roc: how well scores tell two groups apart, at every threshold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.outcome import RESAMPLES, Interval

HELD = 2**22
"""Numbers of a bootstrap that are held at once."""


@dataclass(frozen=True, eq=False, repr=False)
class Roc:
    """The receiver operating characteristic of scores that are to be higher in the second group.

    thresholds float64 [n], falling, from infinity: what scores at least that is taken for one of
    the second group; of the first group a share `fpr` is, of the second `tpr`, both float64 [n],
    from 0 to 1. area: under tpr over fpr, the chance that one of the second group scores higher
    than one of the first (equal ones count half), with its bootstrap interval; count: of both.
    """

    fpr: Tensor
    tpr: Tensor
    thresholds: Tensor
    area: Interval
    clean: int
    attacked: int

    def rate_at(self, fpr: float) -> float:
        """The highest tpr whose fpr is no higher than that."""
        if not 0.0 <= fpr <= 1.0:
            raise InputError(f"fpr is a share, from 0 to 1: got {fpr}")
        return float(self.tpr[self.fpr <= fpr].max())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; the first threshold, infinity, is None."""
        return {
            "fpr": self.fpr.tolist(),
            "tpr": self.tpr.tolist(),
            "thresholds": [None, *self.thresholds[1:].tolist()],
            "area": self.area.mean,
            "area_low": self.area.low,
            "area_high": self.area.high,
            "confidence": self.area.confidence,
            "clean": self.clean,
            "attacked": self.attacked,
        }

    def __repr__(self) -> str:
        return f"<Roc area {self.area}; {self.clean} clean, {self.attacked} attacked>"


def roc(clean: Tensor, attacked: Tensor, confidence: float = 0.95, *, seed: int = 0) -> Roc:
    """The characteristic of scores [N] and [M], which are to be higher where attacked.

    The interval resamples both groups by themselves, 2000 times. Where one holds attacked versions
    of the other, it is rather too wide.
    """
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must lie between 0 and 1: got {confidence}")
    low, high = _read("clean", clean), _read("attacked", attacked)
    cuts = torch.unique(torch.cat([low, high])).flip(0)
    # Shares that score at least a cut: all but those that lie below.
    fpr, tpr = (
        (len(one) - torch.searchsorted(one, cuts)).double() / len(one) for one in (low, high)
    )
    start = torch.zeros(1, dtype=torch.float64, device="cpu")
    parts = {"fpr": fpr, "tpr": tpr}
    parts = {name: torch.cat([start, one]) for name, one in parts.items()}
    thresholds = torch.cat([start + torch.inf, cuts])
    area = float(
        _areas(
            low, high, torch.ones(1, len(low), device="cpu"), torch.ones(1, len(high), device="cpu")
        )
    )
    drawn = torch.cat(list(_resampled(low, high, seed)))
    tail = (1.0 - confidence) / 2.0
    ends = drawn.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64, device="cpu"))
    count = len(low) + len(high)
    interval = Interval(area, float(ends[0]), float(ends[1]), confidence, count)
    return Roc(**parts, thresholds=thresholds, area=interval, clean=len(low), attacked=len(high))


def _areas(low: Tensor, high: Tensor, drawn_low: Tensor, drawn_high: Tensor) -> Tensor:
    """Areas [R] of sorted groups whose members were drawn so often, [R, N] and [R, M]."""
    until = torch.zeros(len(drawn_low), len(low) + 1, dtype=torch.float64, device="cpu")
    torch.cumsum(drawn_low.double(), 1, out=until[:, 1:])
    below = torch.searchsorted(low, high)
    upto = torch.searchsorted(low, high, right=True)
    beaten = (until[:, below] + until[:, upto]) / 2.0
    return (beaten * drawn_high).sum(1) / (len(low) * len(high))


def _resampled(low: Tensor, high: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    most = max(1, HELD // max(len(low), len(high)))
    for start in range(0, RESAMPLES, most):
        rows = min(most, RESAMPLES - start)
        yield _areas(low, high, *(_counts(rows, len(one), generator) for one in (low, high)))


def _counts(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` was drawn in as many draws, float64 [rows, count]."""
    drawn = torch.randint(count, (rows, count), generator=generator, device="cpu")
    found = torch.zeros(rows, count, dtype=torch.float64, device="cpu")
    return found.scatter_add_(
        1, drawn, torch.ones(1, 1, dtype=torch.float64, device="cpu").expand(rows, count)
    )


def _read(name: str, scores: Tensor) -> Tensor:
    """Scores sorted, float64 on the CPU."""
    if not isinstance(scores, Tensor):
        raise InputTypeError(f"{name} must be a tensor: got {type(scores).__name__}")
    if scores.dim() != 1 or len(scores) == 0:
        raise InputError(f"{name} must be scores [N], one at least: got {list(scores.shape)}")
    found = scores.detach().double().cpu()
    if bool(found.isnan().any()):
        raise InputError(f"{name} must be numbers: {int(found.isnan().sum())} scores are NaN")
    return found.sort().values
