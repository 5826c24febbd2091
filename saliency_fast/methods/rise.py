"""RISE: the mean of random smooth masks, weighted by the scores under them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import is_finite
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import PARTIAL_MAPS, own_seeds
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.ops import mask_points, philox, random_bits
from saliency_fast.ops.segments import repeated


@dataclass(frozen=True)
class Rise:
    """Mean of random masks, weighted by the score of the input under each (Petsiuk, 2018).

    Masked elements take the call's baseline. Values are mean scores where an element is kept, not
    differences of scores.

    Args:
        samples: Masks.
        grid: Cells of a mask per spatial axis, before it is made smooth and shifted.
        keep: Probability of a cell to be kept.
        seed: An int, or one for each example.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.ones(1, 1, 8, 8), sf.Rise(samples=50, grid=4)
        >>> sf.explain(lambda x: x.sum((1, 2, 3)), x, method=method, layout="BCHW").values.shape
        torch.Size([1, 1, 8, 8])
    """

    samples: int = 4000
    grid: int = 8
    keep: float = 0.5
    seed: Seed = 0
    name = "rise"

    def __post_init__(self) -> None:
        checks.fields(self, samples=1, grid=1, keep=checks.positive_fraction, seed=checks.seed)

    def recipe(self) -> RoundsRecipe:
        rounds = partial(_averaged, method=self)
        return RoundsRecipe(rounds, self.samples, baseline="fill", gradients=False)


def _averaged(context: RoundContext, method: Rise) -> Rounds:
    batch, targets = context.scores.shape
    seed = own_seeds(method.seed, context)
    axes = context.layouts.needed("rise")
    sizes = [one.size(x.shape) for one, x in zip(axes, context.inputs, strict=True)]
    for x, size in zip(context.inputs, sizes, strict=True):
        _check(x, size, method.grid)
    # In the standard form, where channels share a mask; inputs in this form are not copied.
    inputs, baselines = (
        [one.standard(x).contiguous() for one, x in zip(axes, several, strict=True)]
        for several in (context.inputs, context.baselines)
    )
    # Asked once: a GPU's launches would wait for the answer.
    finite = [all(map(is_finite, pair)) for pair in zip(inputs, baselines, strict=True)]
    draw = [partial(masks, method, number, size) for number, size in enumerate(sizes)]
    # Even and odd samples apart: half their difference is the error of their mean.
    sums = [context.scores.new_zeros(2, batch * targets, prod(size)) for size in sizes]

    def drawn(example: Tensor, sample: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The masks of a launch, each once, their samples, and the mask of each row. By the order
        of rows: to look which there are, a GPU's launches would wait. The last mask may be unused.
        """
        row, keys, owner = torch.arange(len(sample), device=sample.device), sample, example
        if len(seed) == 1:
            keys = sample[:1] + row[: (len(sample) - 2) // batch + 2]
            row, owner = sample - sample[:1], 0 * keys
        return [one(seed[owner], keys) for one in draw], keys, row

    def write(example: Tensor, sample: Tensor) -> Inputs:
        several, _, row = drawn(example, sample)
        parts = zip(axes, inputs, baselines, several, finite, strict=True)
        return tuple(
            one.back(_masked(x, fill, mask, example, row, finite=whole)).contiguous()
            for one, x, fill, mask, whole in parts
        )

    def each(rows: slice, result: RoundResult) -> None:
        several, drawn_sample, row = drawn(example[rows], sample[rows])
        weight = result.scores.new_zeros(batch, targets, len(drawn_sample))
        weight[example[rows], :, row] = result.scores
        # Counted by the host, as above; masks of even samples come first.
        first, each_of = start + rows.start // batch, batch if len(seed) > 1 else 1
        ahead = rows.start % batch if len(seed) > 1 else 0
        numbers = (first + (ahead + n) // each_of for n in range(len(drawn_sample)))
        order, even = torch.argsort(drawn_sample % 2, stable=True), sum(n % 2 == 0 for n in numbers)
        for parity, part in enumerate((order[:even], order[even:])):
            for total, one in zip(sums, several, strict=True):
                total[parity] += weight[..., part].flatten(0, 1) @ one[part]

    step = -(-method.samples // PARTIAL_MAPS)
    for start in range(0, method.samples, step):
        stop = min(start + step, method.samples)
        example, sample = every_row(context, stop - start)
        sample += start
        yield Round(write, example, sample, each=each)
        if stop < method.samples:
            yield _maps(context, sums, stop, method.keep)
    return _maps(context, sums, method.samples, method.keep)


def _masked(
    x: Tensor, fill: Tensor, mask: Tensor, example: Tensor, row: Tensor, *, finite: bool
) -> Tensor:
    points: Tensor = mask_points(x, fill, mask, example, row)
    if finite:
        return points
    # Zero times NaN is NaN: whole shares are copied. A part of a missing value is missing, too.
    share = repeated(mask[row], x)
    points = torch.where(share == 0.0, fill[example % len(fill)], points)
    return torch.where(share == 1.0, x[example], points)


def _maps(context: RoundContext, sums: list[Tensor], samples: int, keep: float) -> Maps:
    counts = (-(-samples // 2), samples // 2)
    gap = torch.zeros(sums[0].shape[1], dtype=torch.float64, device=sums[0].device)
    norm, values = gap.clone(), []
    axes = context.layouts.needed("rise")
    for one, x, (even, odd) in zip(axes, context.inputs, sums, strict=True):
        mean = (even + odd) / (keep * samples)
        # The error of a single sample is unknown: 0 / 0.
        half = (even / counts[0] - odd / counts[1]) / (2.0 * keep)
        size = one.size(x.shape)
        channels = x[0].numel() // prod(size)
        gap += channels * half.square().sum(1)
        norm += channels * mean.square().sum(1)
        shape = size if not one.spatial else (1, *size)
        of_input = one.back(mean.to(x.dtype).view(*context.scores.shape, *shape), 2)
        values.append(of_input.expand(-1, -1, *x.shape[1:]).contiguous())
    error = (gap / norm.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return Maps(tuple(values), error.view(context.scores.shape))


def masks(
    method: Rise, number: int, sizes: tuple[int, ...], seed: Tensor, sample: Tensor
) -> Tensor:
    """Masks for input `number`, float64 [M, positions], from the draws of (seed, sample, input). A
    grid of zeros and ones is enlarged linearly to one cell more than the input, and a random window
    of the input's sizes is cut out.
    """
    rank, cells = len(sizes), method.grid ** len(sizes)
    # Inputs have draws of their own, far apart.
    words = random_bits(seed, sample, cells + rank, number << 32, philox.MASK)
    share = (words >> 8).double() * 2.0**-24
    mask = (share[:, :cells] < method.keep).double().view(-1, *(method.grid,) * rank)
    for axis, size in enumerate(sizes):
        cell = -(-size // method.grid)
        shift = (words[:, cells + axis] * cell) >> 32
        position = shift[:, None].double() + torch.arange(size, device=words.device) + 0.5
        position = position * method.grid / ((method.grid + 1) * cell) - 0.5
        position = position.clamp(0.0, method.grid - 1.0)
        low = position.floor()
        index = low.long()
        lanes = mask.movedim(axis + 1, -1)
        shape = (len(words), *(1,) * (rank - 1), size)
        wide = (*lanes.shape[:-1], size)
        below = lanes.gather(-1, index.view(shape).expand(wide))
        above = lanes.gather(-1, (index + 1).clamp_max(method.grid - 1).view(shape).expand(wide))
        mask = torch.lerp(below, above, (position - low).view(shape)).movedim(-1, axis + 1)
    flat: Tensor = mask.flatten(1)
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
