"""Groups: noisy samples in a few groups, which tell how certain each pixel is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.points import Noise
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, Rows, Source
from saliency_fast.methods.parts.neighbours import maps_of, totals_like

GROUPS = 8
"""More of them narrow the interval by a tenth at most, and each costs maps to hold."""
LEAST_SHARE = 1e-6
"""Of a variance, what groups without the one that made all of it have left, for a logarithm."""


@dataclass
class Groups:
    """Samples 0 to n - 1 of noise around the inputs, dealt to the groups in turn; pairs of opposite
    noise stay together. Holds a mean, and with `moments` a spread, for every map and group.
    """

    asked: RoundContext
    noise: Noise
    samples: int
    moments: bool

    @cached_property
    def count(self) -> int:
        return min(GROUPS, self.samples // (2 if self.moments or self.noise.antithetic else 1))

    @cached_property
    def source(self) -> Source:
        return self.noise.bind(self.asked.inputs, self.asked.baselines)

    @cached_property
    def slots(self) -> int:
        return self.asked.scores.numel() * self.count

    @cached_property
    def means(self) -> Inputs:
        return totals_like(self.asked.inputs, self.slots)

    @cached_property
    def spreads(self) -> Inputs:
        return totals_like(self.asked.inputs, self.slots)

    @cached_property
    def sizes(self) -> Tensor:
        """float64 [G], the samples of each group."""
        number = torch.arange(self.samples, device=self.asked.scores.device)
        return torch.bincount(self._group(number), minlength=self.count).double()

    def _group(self, sample: Tensor) -> Tensor:
        drawn = sample // 2 if self.noise.antithetic else sample
        return drawn % self.count

    def round(self) -> Round:
        """All samples of all examples, samples outermost."""
        x = self.asked.inputs[0]
        item = torch.arange(len(x), device=x.device).repeat(self.samples)
        place = torch.arange(self.samples, device=x.device).repeat_interleave(len(x))
        seen = [torch.zeros(self.slots, dtype=torch.float64, device=x.device) for _ in self.means]

        def write(item: Tensor, place: Tensor) -> Inputs:
            return self.source.write(Rows(item, place, place.double(), item))

        def each(rows: slice, found: RoundResult) -> None:
            group, maps = self._group(place[rows]), self.asked.scores.shape[1]
            for k, grads in enumerate(found.grads):
                slot = (item[rows] * maps + k) * self.count + group
                for number, gradient in enumerate(grads):
                    if self.moments:
                        state = self.means[number], self.spreads[number], seen[number]
                        ops.accumulate_moments(*state, gradient, slot)
                    else:
                        weight = 1.0 / self.sizes[group]
                        ops.accumulate(self.means[number], gradient, slot, weight, "sum")

        return Round(write, item, place, gradients=True, each=each)

    def grouped(self, totals: Inputs) -> list[tuple[Tensor, Tensor]]:
        """For each input the accumulators [S, G, *], and the groups' sizes beside them."""
        found = []
        for one in totals:
            size = self.sizes.to(one.dtype).view(-1, *(1,) * (one.dim() - 1))
            found.append((one.view(-1, self.count, *one.shape[1:]), size))
        return found


def smooth_rounds(asked: RoundContext, noise: Noise, samples: int) -> Rounds:
    """Mean gradients, with the standard error of every pixel from how the groups' means differ."""
    groups = Groups(asked, noise, samples, moments=False)
    yield groups.round()
    values, errors = [], []
    for means, size in groups.grouped(groups.means):
        share = size / samples
        mean = (share * means).sum(1)
        square = (share * (means - mean[:, None])).square_().sum(1)
        values.append(mean)
        errors.append(square.mul_(groups.count / (groups.count - 1)).sqrt_())
    return _maps(asked, values, errors, {"standard_error": errors})


def variance_rounds(asked: RoundContext, noise: Noise, samples: int, confidence: float) -> Rounds:
    """Variances of gradients, with an interval for every pixel: the jackknife over groups (Miller,
    1974) of the logarithm, on whose scale a variance is closest to normal.
    """
    groups = Groups(asked, noise, samples, moments=True)
    yield groups.round()
    values, errors, lows, highs = [], [], [], []
    pairs = zip(groups.grouped(groups.means), groups.grouped(groups.spreads), strict=True)
    wide = student(confidence, groups.count - 1)
    for (means, size), (spreads, _) in pairs:
        total, left = _spreads_without(means, spreads, size, samples)
        values.append(total / samples)
        whole = (total / (samples - 1)).clamp_min(torch.finfo(total.dtype).tiny)
        others = (left / (samples - size - 1)).maximum(LEAST_SHARE * whole[:, None]).log_()
        pseudo = groups.count * whole.log()[:, None] - (groups.count - 1) * others
        middle = pseudo.mean(1)
        deviation = pseudo.var(1).div_(groups.count).sqrt_()
        none = total == 0
        lows.append((middle - wide * deviation).exp_().masked_fill_(none, 0.0))
        highs.append((middle + wide * deviation).exp_().masked_fill_(none, 0.0))
        errors.append(deviation * values[-1])
    return _maps(asked, values, errors, {"interval_low": lows, "interval_high": highs})


def _spreads_without(
    means: Tensor, spreads: Tensor, size: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Sums of squared deviations [S, *] of all samples, and [S, G, *] without each group."""
    mean = (size * means).sum(1, keepdim=True) / samples
    away = (means - mean).square_()
    total = (spreads + size * away).sum(1)
    # Chan's merge (1983), solved for what is left when a group is taken out.
    left = total[:, None] - spreads - away * (size * samples / (samples - size))
    return total, left.clamp_min_(0.0)


def _maps(
    asked: RoundContext, values: list[Tensor], errors: list[Tensor], extras: dict[str, list[Tensor]]
) -> Maps:
    maps = asked.scores.shape[1]
    named = {}
    for name, parts in extras.items():
        for number, one in enumerate(parts):
            named[name if len(parts) == 1 else f"{name}.{number}"] = one
    norms = [
        torch.stack([one.double().flatten(1).square().sum(1) for one in parts]).sum(0).sqrt()
        for parts in (errors, values)
    ]
    error = norms[0] / norms[1].clamp_min(torch.finfo(torch.float64).tiny)
    own = {name: maps_of((one,), maps)[0] for name, one in named.items()}
    return Maps(maps_of(tuple(values), maps), error.view_as(asked.scores), extras=own)


def student(confidence: float, freedom: int) -> float:
    """How many standard errors a two-sided interval reaches, by Student's distribution."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(scale) / math.sqrt(math.pi)

    # With t = sqrt(freedom) tan(u) the density is a power of a cosine.
    def inside(u: float) -> float:
        powers = np.cos((nodes + 1.0) * u / 2.0) ** (freedom - 1)
        return scale * u * float(weights @ powers)

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
