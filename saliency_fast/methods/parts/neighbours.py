"""Neighbours: the points of straight paths, each with the one that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import RoundContext, RoundResult


@dataclass
class Neighbours:
    """Points at `alphas` from the baselines to the inputs, one example after another, and what was
    found at the last of them. A launch may end anywhere: its last point waits for the next one.
    """

    asked: RoundContext
    alphas: Sequence[float]
    last: RoundResult | None = field(default=None, init=False)

    @property
    def item(self) -> Tensor:
        """int64 [R], the example of each row."""
        x = self.asked.inputs[0]
        return torch.arange(len(x), device=x.device).repeat_interleave(len(self.alphas))

    @property
    def place(self) -> Tensor:
        """float64 [R], the alpha of each row."""
        x = self.asked.inputs[0]
        alphas = torch.tensor(self.alphas, dtype=torch.float64, device=x.device)
        return alphas.repeat(len(x))

    def write(self, item: Tensor, place: Tensor) -> Inputs:
        pairs = zip(self.asked.inputs, self.asked.baselines, strict=True)
        return tuple(ops.line_points(x, baseline, item, place) for x, baseline in pairs)

    def pairs(
        self, rows: slice, found: RoundResult
    ) -> Iterator[tuple[Tensor, Tensor, RoundResult, RoundResult]]:
        """(item int64 [P], weight float64 [P], here, there) of a launch's rows and the last one's
        end; weight 0 where the path of one example ends and another's begins.
        """
        count = rows.stop - rows.start
        if self.last is not None:
            yield *self._joint(rows.start - 1, rows.start), self.last, part(found, 0, 1)
        if count > 1:
            here, there = part(found, 0, count - 1), part(found, 1, count)
            yield *self._joint(rows.start, rows.stop - 1), here, there
        self.last = part(found, count - 1, count, copied=True)

    def _joint(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        number = torch.arange(start, stop, device=self.asked.inputs[0].device)
        item = torch.div(number, len(self.alphas), rounding_mode="floor")
        within = (number + 1) % len(self.alphas) != 0
        return item, within.double()


def part(found: RoundResult, start: int, stop: int, *, copied: bool = False) -> RoundResult:
    """The answers of some rows; copied: in memory of their own."""

    def own(several: Inputs) -> Inputs:
        rows = tuple(one[start:stop] for one in several)
        return tuple(one.clone() for one in rows) if copied else rows

    scores = own((found.scores,))[0]
    return RoundResult(scores, [own(one) for one in found.grads], own(found.taps))


def totals_like(tensors: Inputs, slots: int) -> Inputs:
    """Accumulators of zeros [slots, *] for tensors [R, *]."""
    return tuple(
        torch.zeros(
            (slots, *one.shape[1:]),
            dtype=torch.float64 if one.dtype == torch.float64 else torch.float32,
            device=one.device,
        )
        for one in tensors
    )


def unknown(asked: RoundContext) -> Tensor:
    """The error of maps that nothing estimates, [B, K]."""
    return torch.full_like(asked.scores, torch.nan)


def maps_of(totals: Inputs, maps: int) -> Inputs:
    """Accumulators [B * K, *] as values [B, K, *]."""
    return tuple(one.view(-1, maps, *one.shape[1:]) for one in totals)
