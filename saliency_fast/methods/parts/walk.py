"""Walk: paths that every map chooses for itself, feature by feature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import RoundContext, RoundResult

CLOSE = 1e-9
"""Share of a path's length that counts as nothing."""

HELD = 11
"""Maps that a walk holds at once."""


class Walk:
    """S = B * K paths from the baselines to the inputs, all features of all inputs in one row.

    progress [S, N]: the share of its own way that each feature has gone; total [S, N]: sum of
    gradient times movement; gradient [S, N]: where the paths are now.
    """

    def __init__(self, asked: RoundContext) -> None:
        self.asked, self.maps = asked, asked.scores.shape[1]
        x = asked.inputs[0]
        self.item = torch.arange(len(x), device=x.device).repeat_interleave(self.maps)
        self.place = torch.arange(self.maps, device=x.device).repeat(len(x))
        pairs = zip(asked.inputs, asked.baselines, strict=True)
        ways = [(one - baseline).flatten(1) for one, baseline in pairs]
        self.way = torch.cat(ways, 1).repeat_interleave(self.maps, dim=0)
        self.distance = self.way.abs()
        self.progress, self.total, self.gradient = (torch.zeros_like(self.way) for _ in range(3))

    def write(self, item: Tensor, place: Tensor) -> Inputs:
        gone = self._parts(self.progress[item * self.maps + place])
        triples = zip(self.asked.inputs, self.asked.baselines, gone, strict=True)
        found = []
        for x, baseline, share in triples:
            start = baseline[item % len(baseline)]
            found.append(start + share.to(x.dtype) * (x[item] - start))
        return tuple(found)

    def note(self, rows: slice, found: RoundResult) -> None:
        """Keeps the gradient of each row's own target."""
        for k, grads in enumerate(found.grads):
            own = self.place[rows] == k
            flat = torch.cat([one.flatten(1) for one in grads], 1)
            self.gradient[rows][own] = flat[own].to(self.gradient.dtype)

    def step(self, alpha: float, fraction: float, reach: float) -> None:
        """Goes on until the share 1 - `alpha` of each path's L1 length is left."""
        low, high = (self.way.new_tensor(min(max(alpha + d, 0.0), 1.0)) for d in (-reach, reach))
        size = self.gradient.abs()
        length = self._length(self.distance)
        left = length * (1.0 - alpha)
        # What lags behind is drawn along whatever its gradient.
        self._move(torch.maximum(self.progress, low))
        rank = math.floor(fraction * (self.way.shape[1] - 1)) + 1
        active = length > 0
        while True:
            room = self.distance * (high - self.progress)
            over = self._length(self.distance * (1.0 - self.progress)) - left
            ranked = torch.where(room > 0, size, torch.inf)
            chosen = (room > 0) & (ranked <= ranked.kthvalue(rank, dim=1, keepdim=True).values)
            # Of NaN nothing is chosen; where nothing can move, rounding alone parts path and end.
            active = active & (over > CLOSE * length) & chosen.any(1)
            if not bool(active.any()):
                return
            share = over / self._length(room * chosen)
            part = share.clamp_max(1.0).to(self.way.dtype)[:, None]
            there = torch.where(part < 1.0, self.progress.lerp(high, part), high)
            self._move(torch.where(chosen & active[:, None], there, self.progress))
            active &= share > 1.0

    def _move(self, progress: Tensor) -> None:
        self.total += self.gradient * self.way * (progress - self.progress)
        self.progress = progress

    @staticmethod
    def _length(parts: Tensor) -> Tensor:
        return parts.sum(1, dtype=torch.float64)

    @property
    def values(self) -> Inputs:
        """The maps so far: per input [B, K, *]."""
        return tuple(
            part.reshape(-1, self.maps, *x.shape[1:])
            for part, x in zip(self._parts(self.total), self.asked.inputs, strict=True)
        )

    def _parts(self, rows: Tensor) -> Inputs:
        """Rows of all features as inputs [R, *]."""
        sizes = [x[0].numel() for x in self.asked.inputs]
        parts = torch.split(rows, sizes, dim=1)
        return tuple(
            part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, self.asked.inputs, strict=True)
        )
