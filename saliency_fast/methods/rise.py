"""RISE: scores under random smooth masks, which are then averaged by their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import is_finite
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import own_seeds
from saliency_fast.ops import mask_points, philox, random_bits
from saliency_fast.ops.segments import repeated

LOOKS = 16
"""Maps so far that a call gives on the way."""


@dataclass(frozen=True)
class Rise:
    """Mean of random masks weighted by the score of the input under them (Petsiuk, 2018).

    samples: masks. grid: their cells per spatial axis before they are made smooth and shifted;
    keep: the chance of a cell to stay. seed: an int, or one per example. What is masked away comes
    from the call's baseline. Values are scores' means where an element stays, not differences.
    """

    samples: int = 4000
    grid: int = 8
    keep: float = 0.5
    seed: Seed = 0
    name = "rise"

    def __post_init__(self) -> None:
        checks.whole("samples", self.samples, 1)
        checks.whole("grid", self.grid, 1)
        checks.positive("keep", self.keep)
        if self.keep > 1:
            raise InputError(f"keep is a chance, at most 1: got {self.keep}")
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        rounds = partial(_averaged, method=self)
        return RoundsRecipe(rounds, self.samples, baseline="fill", gradients=False)


def _averaged(asked: RoundContext, method: Rise) -> Rounds:
    batch, targets = asked.scores.shape
    seed = own_seeds(method.seed, asked)
    axes = asked.layouts.needed("rise")
    sizes = [one.size(x.shape) for one, x in zip(axes, asked.inputs, strict=True)]
    for x, size in zip(asked.inputs, sizes, strict=True):
        _check(x, size, method.grid)
    # In the standard form, a mask for all channels of a place; standard inputs are no copies.
    inputs, baselines = (
        [one.standard(x).contiguous() for one, x in zip(axes, several, strict=True)]
        for several in (asked.inputs, asked.baselines)
    )
    draw = [partial(masks, method, number, size) for number, size in enumerate(sizes)]
    # Even and odd samples apart: half their difference is the error of their mean.
    sums = [asked.scores.new_zeros(2, batch * targets, prod(size)) for size in sizes]

    def drawn(item: Tensor, place: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The masks of a launch, each once, their samples, and which of them every row has."""
        key = place if len(seed) == 1 else place * batch + item
        keys, row = torch.unique(key, return_inverse=True)
        sample, owner = (keys, 0 * keys) if len(seed) == 1 else (keys // batch, keys % batch)
        return [one(seed[owner], sample) for one in draw], sample, row

    def write(item: Tensor, place: Tensor) -> Inputs:
        found, _, row = drawn(item, place)
        parts = zip(axes, inputs, baselines, found, strict=True)
        return tuple(
            one.back(_faded(x, fill, mask, item, row)).contiguous() for one, x, fill, mask in parts
        )

    def each(rows: slice, found: RoundResult) -> None:
        own, place = item[rows], place_of[rows]
        mask, sample, row = drawn(own, place)
        weight = found.scores.new_zeros(batch, targets, len(sample))
        weight[own, :, row] = found.scores
        for fold in (0, 1):
            part = sample % 2 == fold
            for total, one in zip(sums, mask, strict=True):
                total[fold] += weight[..., part].flatten(0, 1) @ one[part]

    step = -(-method.samples // LOOKS)
    for start in range(0, method.samples, step):
        stop = min(start + step, method.samples)
        place_of = torch.arange(start, stop, device=seed.device).repeat_interleave(batch)
        item = torch.arange(batch, device=seed.device).repeat(stop - start)
        yield Round(write, item, place_of, each=each)
        if stop < method.samples:
            yield _maps(asked, sums, stop, method.keep)
    return _maps(asked, sums, method.samples, method.keep)


def _faded(x: Tensor, fill: Tensor, mask: Tensor, item: Tensor, row: Tensor) -> Tensor:
    points: Tensor = mask_points(x, fill, mask, item, row)
    if is_finite(x) and is_finite(fill):
        return points
    # Zero times NaN is NaN: whole shares are taken as they are. A part of what is missing is too.
    share = repeated(mask[row], x)
    points = torch.where(share == 0.0, fill[item % len(fill)], points)
    return torch.where(share == 1.0, x[item], points)


def _maps(asked: RoundContext, sums: list[Tensor], samples: int, keep: float) -> Maps:
    counts = (-(-samples // 2), samples // 2)
    gap = torch.zeros(sums[0].shape[1], dtype=torch.float64, device=sums[0].device)
    norm, values = gap.clone(), []
    axes = asked.layouts.needed("rise")
    for one, x, (even, odd) in zip(axes, asked.inputs, sums, strict=True):
        mean = (even + odd) / (keep * samples)
        # Of one sample alone nothing is known: 0 / 0.
        half = (even / counts[0] - odd / counts[1]) / (2.0 * keep)
        size = one.size(x.shape)
        channels = x[0].numel() // prod(size)
        gap += channels * half.square().sum(1)
        norm += channels * mean.square().sum(1)
        shape = size if not one.spatial else (1, *size)
        placed = one.back(mean.to(x.dtype).view(*asked.scores.shape, *shape), 2)
        values.append(placed.expand(-1, -1, *x.shape[1:]))
    error = (gap / norm.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return Maps(tuple(one.contiguous() for one in values), error.view(asked.scores.shape))


def masks(
    method: Rise, number: int, sizes: tuple[int, ...], seed: Tensor, sample: Tensor
) -> Tensor:
    """Masks for input `number`, float64 [M, places] of these sizes, from the draws of
    (seed, sample, input): a grid of zeros and ones, enlarged linearly to one cell more than the
    input, and cut out at a random place.
    """
    rank, cells = len(sizes), method.grid ** len(sizes)
    # Inputs have draws of their own, far apart.
    words = random_bits(seed, sample, cells + rank, number << 32, philox.MASK)
    share = (words >> 8).double() * 2.0**-24
    found = (share[:, :cells] < method.keep).double().view(-1, *(method.grid,) * rank)
    for axis, size in enumerate(sizes):
        cell = -(-size // method.grid)
        shift = (words[:, cells + axis] * cell) >> 32
        place = shift[:, None].double() + torch.arange(size, device=words.device) + 0.5
        place = place * method.grid / ((method.grid + 1) * cell) - 0.5
        place = place.clamp(0.0, method.grid - 1.0)
        low = place.floor()
        part = place - low
        index = low.long()
        lanes = found.movedim(axis + 1, -1)
        shape = (len(words), *(1,) * (rank - 1), size)
        wide = (*lanes.shape[:-1], size)
        below = lanes.gather(-1, index.view(shape).expand(wide))
        above = lanes.gather(-1, (index + 1).clamp_max(method.grid - 1).view(shape).expand(wide))
        found = torch.lerp(below, above, part.view(shape)).movedim(-1, axis + 1)
    flat: Tensor = found.flatten(1)
    return flat


def _check(x: Tensor, size: tuple[int, ...], grid: int) -> None:
    if not x.is_floating_point():
        raise InputTypeError(
            f"rise fades elements, so that inputs must be floating point: got {x.dtype}; use "
            "feature_ablation or occlusion"
        )
    smallest = min(size)
    if grid > smallest:
        raise InputError(
            f"grid is finer than the input: got {grid} cells per axis, the input is "
            f"{list(x.shape)}; expected at most {smallest}"
        )
