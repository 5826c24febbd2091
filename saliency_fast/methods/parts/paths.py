"""Paths from the baselines to the inputs, straight ones and those that avoid large gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import RoundContext, RoundResult
from saliency_fast.methods.parts.maps import by_example

CLOSE = 1e-9
"""Share of a path's length that counts as nothing."""
HELD = 11
"""Maps that a `GuidedPath` holds at once."""


class StraightPath:
    """Points at `alphas` on straight lines, example after example, and pairs of neighbours.

    A launch may end anywhere: its last point is kept for the first pair of the next launch.
    """

    def __init__(self, context: RoundContext, alphas: Sequence[float]) -> None:
        x = context.inputs[0]
        self.context, self.count = context, len(alphas)
        self.example = torch.arange(len(x), device=x.device).repeat_interleave(self.count)
        self.alpha = torch.tensor(alphas, dtype=torch.float64, device=x.device).repeat(len(x))
        self._last: RoundResult | None = None

    def write(self, example: Tensor, alpha: Tensor) -> Inputs:
        ends = zip(self.context.inputs, self.context.baselines, strict=True)
        return tuple(ops.line_points(x, baseline, example, alpha) for x, baseline in ends)

    def pairs(
        self, rows: slice, result: RoundResult
    ) -> Iterator[tuple[Tensor, Tensor, RoundResult, RoundResult]]:
        """(example int64 [P], weight float64 [P], result at a point, result at the next point).

        The weight is 0 where the next point is the first one of another example, else 1.
        """
        if self._last is not None:
            yield *self._step(rows.start - 1, rows.start), self._last, _rows(result, 0, 1)
        if (count := rows.stop - rows.start) > 1:
            here, there = _rows(result, 0, count - 1), _rows(result, 1, count)
            yield *self._step(rows.start, rows.stop - 1), here, there
        self._last = _rows(result, count - 1, count, copied=True)

    def _step(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(start, stop, device=self.alpha.device)
        return row // self.count, ((row + 1) % self.count != 0).double()


def _rows(result: RoundResult, start: int, stop: int, *, copied: bool = False) -> RoundResult:
    def own(several: Inputs) -> Inputs:
        rows = tuple(one[start:stop] for one in several)
        return tuple(one.clone() for one in rows) if copied else rows

    (scores,) = own((result.scores,))
    return RoundResult(scores, [own(one) for one in result.grads], own(result.taps))


class GuidedPath:
    """S = B * K paths that move first where the gradient is small (Kapishnikov, 2021).

    The N elements of all inputs are in one row. progress [S, N]: share of its own displacement that
    each element has moved; total [S, N]: sum of gradient times movement; gradient [S, N]: at the
    present points.
    """

    def __init__(self, context: RoundContext) -> None:
        self.context, self.targets = context, context.scores.shape[1]
        x = context.inputs[0]
        self.example = torch.arange(len(x), device=x.device).repeat_interleave(self.targets)
        self.target = torch.arange(self.targets, device=x.device).repeat(len(x))
        ends = zip(context.inputs, context.baselines, strict=True)
        displacements = [(one - baseline).flatten(1) for one, baseline in ends]
        self.displacement = torch.cat(displacements, 1).repeat_interleave(self.targets, dim=0)
        self.distance = self.displacement.abs()
        self.progress, self.total, self.gradient = (
            torch.zeros_like(self.displacement) for _ in range(3)
        )

    def write(self, example: Tensor, target: Tensor) -> Inputs:
        shares = self._per_input(self.progress[example * self.targets + target])
        points = []
        for x, baseline, share in zip(
            self.context.inputs, self.context.baselines, shares, strict=True
        ):
            start = baseline[example % len(baseline)]
            points.append(start + share.to(x.dtype) * (x[example] - start))
        return tuple(points)

    def keep_gradients(self, rows: slice, result: RoundResult) -> None:
        """Keeps the gradient of each row's own target."""
        for k, grads in enumerate(result.grads):
            own = self.target[rows] == k
            flat = torch.cat([one.flatten(1) for one in grads], 1)
            self.gradient[rows][own] = flat[own].to(self.gradient.dtype)

    def step(self, alpha: float, fraction: float, reach: float) -> None:
        """Moves on until the share 1 - `alpha` of each path's L1 length is left."""
        low, high = (
            self.displacement.new_tensor(min(max(alpha + d, 0.0), 1.0)) for d in (-reach, reach)
        )
        size = self.gradient.abs()
        length = _sum(self.distance)
        left = length * (1.0 - alpha)
        # Elements that lag behind the straight path move whatever their gradient.
        self._move(torch.maximum(self.progress, low))
        rank = math.floor(fraction * (self.displacement.shape[1] - 1)) + 1
        active = length > 0
        while True:
            room = self.distance * (high - self.progress)
            over = _sum(self.distance * (1.0 - self.progress)) - left
            ranked = torch.where(room > 0, size, torch.inf)
            chosen = (room > 0) & (ranked <= ranked.kthvalue(rank, dim=1, keepdim=True).values)
            # NaN gradients are never chosen; where nothing can move, rounding alone is left.
            active = active & (over > CLOSE * length) & chosen.any(1)
            if not bool(active.any()):
                return
            share = over / _sum(room * chosen)
            part = share.clamp_max(1.0).to(self.displacement.dtype)[:, None]
            there = torch.where(part < 1.0, self.progress.lerp(high, part), high)
            self._move(torch.where(chosen & active[:, None], there, self.progress))
            active &= share > 1.0

    def _move(self, progress: Tensor) -> None:
        self.total += self.gradient * self.displacement * (progress - self.progress)
        self.progress = progress

    @property
    def values(self) -> Inputs:
        """The maps so far: per input [B, K, *]."""
        return by_example(self._per_input(self.total), self.targets)

    def _per_input(self, rows: Tensor) -> Inputs:
        """Rows [R, N] of all elements as inputs [R, *]."""
        inputs = self.context.inputs
        parts = torch.split(rows, [x[0].numel() for x in inputs], dim=1)
        return tuple(part.reshape(-1, *x.shape[1:]) for part, x in zip(parts, inputs, strict=True))


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(1, dtype=torch.float64)
