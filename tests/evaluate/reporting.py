"""What the tests of reports share: a small model, metrics of known answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Curve


def network(channels: int = 3, classes: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, classes)).to(dtype).eval()


def pictures(batch: int = 4, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, 12, 10, generator=generator).to(dtype)


@dataclass(frozen=True)
class Check(Metric):
    """Passes maps that hold a negative number.

    Args:
        threshold: The least number that is good.
    """

    threshold: float = 0.0
    name = "has signs"
    better = "lower"

    def _evaluate(self, data):
        least = data.places.flatten(1).amin(1)
        passed = bool((least < self.threshold).all())
        return self._outcome(least, passed=passed, threshold=self.threshold)


@dataclass(frozen=True)
class Known(Metric):
    """The first value of each map, NaN for the first example, with a curve of two places."""

    name = "known"
    better = "higher"

    def _evaluate(self, data):
        values = data.places.flatten(1)[:, 0].double().clone()
        values[0] = math.nan
        y = torch.stack([values, 2 * values], 1)
        curve = Curve(torch.tensor([0.0, 1.0]), y, "place", "value")
        return self._outcome(values, curve=curve, caveats=("the first is left out",))


@dataclass(frozen=True)
class Again(Metric):
    """Explains again."""

    name = "again"
    needs = ("model", "method")

    def _evaluate(self, data):
        gap = data.explain(data.inputs) - data.values
        return self._outcome(gap.flatten(1).abs().amax(1))
