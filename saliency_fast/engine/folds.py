"""Accumulators of a call, their two folds, and the error estimate that folds give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.hoist import Hoist
from saliency_fast.engine.recipe import Recipe, Rows, Source


@dataclass(frozen=True)
class Estimate:
    """Maps so far: values [S, *] per input, sums float64 [S], relative error float64 [S]."""

    values: Inputs
    sums: Tensor
    error: Tensor


WORKING_COPIES = 4
"""Maps that `Folds.estimate` holds beside the accumulators while it works."""


class Folds:
    """Accumulators of S = B * K maps, each in two folds; slot 2s + fold belongs to map s.

    With one level the folds are two rules of half the points each, and half their difference
    estimates the error of their mean. With several, fold 0 holds the map of the earlier levels and
    fold 1 the new one, and the error is what the level changed. A recipe that looks at the input
    alone has one fold and no error. With `hoist` gradients are summed behind the model's prefix.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        baselines: Inputs,
        maps: int,
        hoist: Hoist | None = None,
        among: Tensor | None = None,
    ) -> None:
        """among: the examples int64 [E] that maps are of, which may repeat; all, unless given."""
        self.recipe, self.maps, self.hoist, self.among = recipe, maps, hoist, among
        if among is not None:
            inputs = tuple(x[among] for x in inputs)
            if recipe.baseline == "one":
                baselines = tuple(one if len(one) == 1 else one[among] for one in baselines)
        self.inputs, self.baselines = inputs, baselines
        self.batch = len(inputs[0])
        self.width = 1 if recipe.at_input else 2
        self.nested = len(recipe.levels) > 1
        shapes = [x.shape[1:] for x in inputs] if hoist is None else hoist.shapes
        self.totals = tuple(self._accumulator(shape) for shape in shapes)
        moments = recipe.reduction == "variance"
        self.means = tuple(torch.zeros_like(total) for total in self.totals) if moments else ()
        self.counts = tuple(self._per_slot() for _ in self.means)
        self.weight = self._per_slot()

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for total in self.totals + self.means)

    def _accumulator(self, shape: Sequence[int]) -> Tensor:
        x = self.inputs[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        slots = self.batch * self.maps * self.width
        return torch.zeros(slots, *shape, dtype=dtype, device=x.device)

    def _per_slot(self) -> Tensor:
        slots = self.batch * self.maps * self.width
        return torch.zeros(slots, dtype=torch.float64, device=self.inputs[0].device)

    def begin(self, keep: float, active: Tensor) -> None:
        """Starts a level for the examples `active`: the earlier map counts `keep` times in it."""
        for pair in self._pairs() if self.nested else ():
            pair[active, :, 0] = pair[active, :, 1]
            pair[active, :, 1] *= keep

    def add(
        self,
        rows: Rows,
        grads: list[Inputs],
        source: Source,
        scale: float | Tensor = 1.0,
        place: Tensor | None = None,
    ) -> None:
        """Folds a launch in; grads holds for each of K targets the gradients [R, *] per input,
        `scale` times as large as they are. place: the rows' places among the maps, their examples'
        unless given.
        """
        fold = torch.ones_like(rows.fold) if self.nested else rows.fold
        place = rows.item if place is None else place
        directions = source.direction(rows) if self.recipe.factor == "path" else None
        for k, one in enumerate(grads):
            slot = (place * self.maps + k) * self.width + fold
            self.weight.index_add_(0, slot, rows.weight)
            for number, gradient in enumerate(one):
                if directions is not None:
                    gradient = gradient.to(self.totals[number].dtype) * directions[number]
                self._fold(number, gradient, slot, rows, source, scale)

    def _fold(
        self,
        number: int,
        gradient: Tensor,
        slot: Tensor,
        rows: Rows,
        source: Source,
        scale: float | Tensor,
    ) -> None:
        total, weight = self.totals[number], rows.weight
        # Not `scale != 1.0` alone: of a tensor that would wait for its device.
        scaled = isinstance(scale, Tensor) or scale != 1.0
        if self.recipe.reduction == "variance":
            count = self.counts[number]
            gradient = gradient.to(total.dtype) / scale if scaled else gradient
            ops.accumulate_moments(self.means[number], total, count, gradient, slot)
        elif self.recipe.factor == "line":
            lines = source.lines(number, rows)
            ops.accumulate_random_lines(total, gradient, slot, weight / scale, *lines)
        else:
            if scaled:
                weight = weight / (scale**2 if self.recipe.reduction == "square" else scale)
            ops.accumulate(total, gradient, slot, weight, self.recipe.reduction)

    def estimate(self) -> Estimate:
        """The maps from all that was folded in so far, each scaled to the weight it has seen."""
        values, sums, squares, gaps = [], [], [], []
        for number, (whole, gap) in enumerate(self._wholes_and_gaps()):
            value, total = self._multiplied(number, whole)
            values.append(value)
            sums.append(total)
            if gap is not None:
                squares.append(square_norm(value))
                gaps.append(square_norm(self._multiplied(number, gap)[0]))
        sum_of_all = torch.stack(sums).sum(0)
        if not gaps:
            return Estimate(tuple(values), sum_of_all, torch.zeros_like(sum_of_all))
        norm, gap_norm = torch.stack(squares).sum(0), torch.stack(gaps).sum(0)
        error = torch.sqrt(gap_norm / norm.clamp_min(torch.finfo(torch.float64).tiny))
        if not self.nested:
            empty = (self.weight.view(-1, 2) == 0).any(1)
            error = torch.where(empty, torch.nan, error)
        return Estimate(tuple(values), sum_of_all, error)

    def _wholes_and_gaps(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each input what `_whole_and_gap` gives, at the input."""
        numbers = range(len(self.totals))
        if self.hoist is None:
            yield from map(self._whole_and_gap, numbers)
            return
        wholes, gaps = zip(*map(self._whole_and_gap, numbers), strict=True)
        known = [gap for gap in gaps if gap is not None]
        lower = partial(self.hoist.lower, among=self.among)
        lowered = lower(tuple(known)) if known else (None,) * len(self.inputs)
        yield from zip(lower(wholes), lowered, strict=True)

    def _whole_and_gap(self, number: int) -> tuple[Tensor, Tensor | None]:
        """A map and the difference that tells its error, before the factor: [S, *] each."""
        total = self.totals[number]
        if self.width == 1:
            return total, None
        zero, one = total.view(-1, 2, *total.shape[1:]).unbind(1)
        if self.nested:
            return one.contiguous(), one - zero
        shape = (-1, 2, *(1,) * (total.dim() - 1))
        if self.recipe.reduction == "variance":
            mean = self.means[number].view(-1, 2, *total.shape[1:])
            return _variances(mean, zero, one, self.counts[number].view(shape).to(total.dtype))
        weight = self.weight.view(shape)
        whole = (zero + one).mul_(weight.sum(1).reciprocal().to(total.dtype))
        # An empty fold gives NaN here, and its error is reported as unknown.
        share = (0.5 / weight).to(total.dtype)
        return whole, (zero * share[:, 0]).addcmul_(one, share[:, 1], value=-1)

    def _multiplied(self, number: int, part: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inputs[number] if self.recipe.factor in ("input", "difference") else None
        baseline = self.baselines[number] if self.recipe.factor == "difference" else None
        values, sums = ops.finish(part, x, baseline, "none")
        return values, sums

    def _pairs(self) -> list[Tensor]:
        """Views [B, K, 2, *] of the accumulators."""
        shape = (self.batch, self.maps, self.width)
        return [total.view(*shape, *total.shape[1:]) for total in self.totals]


def _variances(mean: Tensor, zero: Tensor, one: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Chan's merge (1983) of two folds' moments, and half the difference of their variances."""
    first, second = count.unbind(1)
    both = first + second
    shift = mean[:, 1] - mean[:, 0]
    spread = shift.square_().mul_(first * second / both).add_(zero).add_(one)
    return spread.div_(both), (zero / first).sub_(one / second).mul_(0.5)


def square_norm(values: Tensor) -> Tensor:
    """Squared L2 norm of each map: float64 [S]."""
    # In pieces of 2**20 elements, since on CPUs PyTorch first casts what it is given to float64.
    pieces = torch.split(values.flatten(1), max(1, 2**20 // len(values)), dim=1)
    norms = [torch.linalg.vector_norm(one, dim=1, dtype=torch.float64) for one in pieces]
    return torch.stack(norms).square().sum(0)


def norm_of(values: Inputs) -> Tensor:
    """L2 norm of each map over all inputs: float64 [S]."""
    return torch.stack([square_norm(one) for one in values]).sum(0).sqrt()
