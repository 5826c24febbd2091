"""Methods that change the input and compare scores: ablation, permutation, occlusion and RISE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import is_finite
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.coalitions import PARTIAL_MAPS, Game, feature_count, own_seeds
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import mask_points, philox, random_bits, segment_points, window_points
from saliency_fast.ops.segments import repeated

Window = int | tuple[int, ...] | tuple[int | tuple[int, ...] | None, ...] | None


@dataclass(frozen=True)
class FeatureAblation:
    """Score less the score with one feature at its baseline, for each feature (Zeiler, 2014).

    `features=` of the call says what a feature is; without it every element is one. Every element
    gets its feature's value.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.FeatureAblation()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1], x, method=method).values
        tensor([[2., 2., 0.]])
    """

    name = "feature_ablation"

    def recipe(self) -> RoundsRecipe:
        return RoundsRecipe(
            _ablated, feature_count, baseline="fill", gradients=False, features=True
        )


def _ablated(context: RoundContext) -> Rounds:
    game = Game.of(context)
    values = context.scores.new_zeros((*context.scores.shape, game.count))
    # Examples may have segments of their own: values of features that one lacks are zero.
    feature, example = (game.elements() > 0).expand(len(values), -1).T.nonzero().unbind(1)

    def members(example: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        return _all_but(feature, game.count), torch.arange(len(feature), device=feature.device)

    def each(rows: slice, result: RoundResult) -> None:
        own = example[rows]
        values[own, :, feature[rows]] = context.scores[own] - result.scores

    yield Round(game.writer(members), example, feature, each=each)
    return game.maps(values, None, sums=False)


def _all_but(feature: Tensor, count: int) -> Tensor:
    """Coalitions bool [R, F] of all features but one."""
    return torch.arange(count, device=feature.device) != feature[:, None]


@dataclass(frozen=True)
class FeaturePermutation:
    """Score less the score with one feature permuted within the batch (Breiman, 2001).

    `features=` of the call says what a feature is. A map depends on the other examples of the
    batch, of which there must be two or more.

    Args:
        repeats: Permutations of each feature, whose differences are averaged.
        seed: One int.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), sf.FeaturePermutation()
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[-2.,  0.],
                [ 2.,  0.]])
    """

    repeats: int = 1
    seed: int = 0
    name = "feature_permutation"

    def __post_init__(self) -> None:
        checks.fields(self, repeats=1, seed=checks.seed)
        if not isinstance(self.seed, int):
            raise InputTypeError(
                f"seed must be one int, since examples are permuted together: got {self.seed!r}"
            )

    def recipe(self) -> RoundsRecipe:
        rounds = partial(_permuted, repeats=self.repeats, seed=self.seed)

        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return self.repeats * feature_count(inputs, features)

        return RoundsRecipe(rounds, points, gradients=False, features=True)


def _permuted(context: RoundContext, repeats: int, seed: int) -> Rounds:
    game, batch = Game.of(context), len(context.inputs[0])
    if batch < 2:
        raise InputError(
            "feature_permutation permutes features within the batch: got 1 example, expected 2 or "
            "more; use feature_ablation for one"
        )

    def write(example: Tensor, draw: Tensor) -> Inputs:
        row = torch.arange(len(draw), device=draw.device)
        present = _all_but(draw % game.count, game.count)
        other = permutations(draw, batch, seed)[row, example]
        points = []
        for x, segment in zip(context.inputs, game.segments, strict=True):
            own = segment if len(segment) == 1 else segment[example]
            columns = own.view(len(own), -1), present, row, row
            points.append(segment_points(x[example], x[other], *columns))
        return tuple(points)

    losses = context.scores.new_zeros((repeats * game.count, *context.scores.shape))

    def each(rows: slice, result: RoundResult) -> None:
        own = example[rows]
        losses[draw[rows], own] = context.scores[own] - result.scores

    example, draw = every_row(context, repeats * game.count)
    yield Round(write, example, draw, each=each)
    drawn = losses.view(repeats, game.count, *context.scores.shape).permute(2, 3, 1, 0)
    # The variance of a single permutation is unknown: 0 / 0.
    spread = (drawn - drawn.mean(3, keepdim=True)).square().sum(3)
    return game.maps(drawn.mean(3), spread / (repeats * (repeats - 1.0)), sums=False)


def permutations(number: Tensor, batch: int, seed: int) -> Tensor:
    """The permutations of these numbers of a batch, never the identity: int64 [R, B]."""
    words = random_bits(torch.full_like(number, seed), number, batch, 0, philox.ORDER)
    order = words.argsort(dim=1, stable=True)
    still = (order == torch.arange(batch, device=order.device)).all(1, keepdim=True)
    return torch.where(still, order.roll(1, 1), order)


# Windows that slide over the input.


@dataclass(frozen=True)
class Occlusion:
    """Score less the score with a window of the input at its baseline (Zeiler, 2014).

    Each element gets the mean over the windows that cover it. The last window of an axis is cut at
    the edge.

    Args:
        window: Size of the window in elements: an int for every spatial axis, one int per spatial
            axis (a window covers all channels) or per axis behind the batch, or a tuple of these
            per input. None is an eighth of each axis, or a 64th of the only spatial axis.
        stride: Step of the window, in the same forms. None is half of the window.
        hierarchy: Levels of coarser windows that are evaluated first, each twice as wide per axis.
            Effects that cancel out in a coarse window are missed.
        keep: Share of the coarse windows, those with the largest effects, that are split into finer
            ones; the effects of the others are spread evenly over theirs.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.Occlusion(window=2, stride=1)
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[3., 4., 5.]])
    """

    window: Window = None
    stride: Window = None
    hierarchy: int = 0
    keep: float = 0.25
    name = "occlusion"

    def __post_init__(self) -> None:
        checks.fields(self, window=_check_sizes, stride=_check_sizes)
        checks.fields(self, hierarchy=0, keep=checks.positive_fraction)

    def recipe(self) -> RoundsRecipe:
        rounds = partial(occlusion_rounds, method=self)
        return RoundsRecipe(rounds, self.points, baseline="fill", gradients=False)

    def points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        """Windows of an example, the most where there is a hierarchy."""
        total = 0
        for grid in read_windows(self.window, self.stride, layouts):
            levels = hierarchy(grid, self.hierarchy)[::-1]
            total += (evaluated := levels[0].count)
            for coarse, fine in itertools.pairwise(levels):
                axes = sum(n > m for n, m in zip(fine.shape, coarse.shape, strict=True))
                split = math.ceil(self.keep * evaluated) * 2**axes
                total += (evaluated := min(fine.count, split))
        return total


def occlusion_rounds(context: RoundContext, method: Occlusion) -> Rounds:
    """One round for each level of windows, coarse levels first."""
    device, shape = context.scores.device, context.scores.shape
    grids = read_windows(method.window, method.stride, context.layouts)
    each = [hierarchy(grid.to(device), method.hierarchy) for grid in grids]
    coarse: tuple[Grid, ...] = ()
    chosen: list[Tensor] = []
    effects: list[Tensor] = []
    for level in reversed(list(zip(*each, strict=True))):
        if not coarse:
            chosen = [torch.ones(shape[0], g.count, dtype=torch.bool, device=device) for g in level]
            effects = [context.scores.new_zeros(*shape, g.count) for g in level]
        else:
            parents = [one.parents() for one in level]
            parts = list(zip(coarse, level, parents, effects, chosen, strict=True))
            chosen = [_largest(e, own, method.keep)[:, p] for _, _, p, e, own in parts]
            # The effect of a window that stays whole is spread evenly over its elements.
            effects = [e[..., p] * (g.volume() / c.volume()[p]) for c, g, p, e, _ in parts]
        yield _round(context, level, chosen, effects)
        coarse = level
    values = []
    for x, grid, effect in zip(context.inputs, coarse, effects, strict=True):
        # Scores of inputs that are whole numbers keep all their digits.
        dtype = x.dtype if x.is_floating_point() else torch.float64
        values.append(grid.mean(effect.view(*shape, *grid.shape), tuple(x.shape[1:])).to(dtype))
    return Maps(tuple(values))


def _round(
    context: RoundContext, grids: tuple[Grid, ...], chosen: list[Tensor], effects: list[Tensor]
) -> Round:
    """Points without the chosen windows [B, n] of each input; effects go to `effects` [B, K, n]."""
    firsts = [0, *itertools.accumulate(own.shape[1] for own in chosen)][:-1]
    pairs = [own.T.nonzero().unbind(1) for own in chosen]
    window = torch.cat([own + first for (own, _), first in zip(pairs, firsts, strict=True)])
    example = torch.cat([own for _, own in pairs])
    ends = list(itertools.accumulate(len(own) for own, _ in pairs))

    def write(example: Tensor, window: Tensor) -> Inputs:
        points = []
        parts = zip(context.inputs, context.baselines, grids, firsts, strict=True)
        for x, baseline, grid, first in parts:
            start, stop = grid.boxes((window - first).clamp(0, grid.count - 1))
            # Windows of other inputs leave this one whole.
            own = (window >= first) & (window < first + grid.count)
            stop = torch.where(own[:, None], stop, start)
            points.append(window_points(x, baseline, example, start, stop))
        return tuple(points)

    def each(rows: slice, result: RoundResult) -> None:
        lost = context.scores[example[rows]] - result.scores
        for effect, first, end, (own, _) in zip(effects, firsts, ends, pairs, strict=True):
            # By the order of rows: a mask would have to be counted, for which a GPU is waited for.
            part = slice(max(rows.start, end - len(own)), max(rows.start, min(rows.stop, end)))
            mine = lost[max(0, part.start - rows.start) : max(0, part.stop - rows.start)]
            effect[example[part], :, window[part] - first] = mine

    return Round(write, example, window, each=each)


def _largest(effect: Tensor, chosen: Tensor, share: float) -> Tensor:
    """The share of the chosen windows bool [B, n] with the largest relative effects [B, K, n]."""
    size = effect.abs()
    tiny = torch.finfo(size.dtype).tiny
    weight = (size / size.amax(2, keepdim=True).clamp_min(tiny)).amax(1)
    order = torch.where(chosen, weight, -1.0).argsort(dim=1, descending=True, stable=True)
    count = (share * chosen.sum(1, keepdim=True)).ceil()
    rank = torch.arange(chosen.shape[1], device=order.device)
    return torch.zeros_like(chosen).scatter(1, order, rank < count)


@dataclass(frozen=True)
class Grid:
    """Windows over one input. bounds: (start, stop) int64 [n] for every axis behind the batch."""

    bounds: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]) -> Grid:
        """Windows of a shape and stride; the last one of an axis is cut at the edge."""
        bounds = []
        for size, width, step in zip(shape, window, stride, strict=True):
            start = torch.arange(1 + -(-(size - width) // step), device="cpu") * step
            bounds.append((start, (start + width).clamp_max(size)))
        return Grid(tuple(bounds))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(start) for start, _ in self.bounds)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device) -> Grid:
        return Grid(tuple((start.to(device), stop.to(device)) for start, stop in self.bounds))

    def coarser(self) -> Grid:
        """Every two neighbours of an axis in one window that covers both."""
        stops = [torch.cat([stop[1::2], stop[-1:]]) for _, stop in self.bounds]
        starts = [start[::2] for start, _ in self.bounds]
        return Grid(tuple((a, b[: len(a)]) for a, b in zip(starts, stops, strict=True)))

    def parents(self) -> Tensor:
        """The flat index in `coarser()` of the window that covers each of these, int64 [n]."""
        index = torch.zeros(1, dtype=torch.int64, device=self.bounds[0][0].device)
        for n in self.shape:
            own = torch.arange(n, device=index.device) // 2
            index = (index[:, None] * -(-n // 2) + own).flatten()
        return index

    def boxes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The start and stop [R, axes] of windows by their flat index [R]."""
        pairs = list(zip(self.bounds, torch.unravel_index(index, self.shape), strict=True))
        start = torch.stack([bound[0][own] for bound, own in pairs], dim=1)
        return start, torch.stack([bound[1][own] for bound, own in pairs], dim=1)

    def volume(self) -> Tensor:
        """How many elements each window covers, float64 [n]."""
        return _outer([(stop - start).double() for start, stop in self.bounds]).flatten()

    def mean(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mean of values, float64 [*, *grid], of windows over each element, axis by axis."""
        lead = values.dim() - len(shape)
        for axis, covers in enumerate(self._covers(shape), lead):
            values = (values.movedim(axis, -1) @ covers).movedim(-1, axis)
        return values / self.covering(shape)

    def covering(self, shape: tuple[int, ...]) -> Tensor:
        """How many windows cover each element of `shape`, float64."""
        return _outer([covers.sum(0) for covers in self._covers(shape)])

    def _covers(self, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """For each axis 1 where a window covers a position, float64 [windows, positions]."""
        for (start, stop), size in zip(self.bounds, shape, strict=True):
            position = torch.arange(size, device=start.device)
            yield ((position >= start[:, None]) & (position < stop[:, None])).double()


def _outer(factors: list[Tensor]) -> Tensor:
    return reduce(lambda whole, one: whole[..., None] * one, factors)


def hierarchy(grid: Grid, levels: int) -> list[Grid]:
    """A grid, and so many coarser ones."""
    grids = [grid]
    for _ in range(levels):
        grids.append(grids[-1].coarser())
    return grids


def read_windows(window: Any, stride: Any, layouts: Layouts) -> list[Grid]:
    """The grid of each input [B, *] from the user's window and stride, as of `Occlusion`."""
    shapes = list(layouts.shapes)
    parts = zip(shapes, _per_input(window, shapes), _per_input(stride, shapes), strict=True)
    grids = []
    for number, (shape, width, step) in enumerate(parts):
        # Sizes for every axis mean the same in all layouts.
        named = isinstance(width, (tuple, list)) and len(width) == len(shape) - 1
        named = named and (step is None or isinstance(step, int) or len(step) == len(shape) - 1)
        spatial = () if named else layouts.need(number, "a window").places
        grids.append(Grid.of(tuple(shape[1:]), *_sizes(width, step, spatial, shape)))
    return grids


def _per_input(given: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    nested = isinstance(given, (tuple, list)) and any(not isinstance(one, int) for one in given)
    if not nested:
        return [given] * len(shapes)
    if len(given) != len(shapes):
        raise InputError(
            f"window and stride: a tuple of tuples has one for each of {len(shapes)} inputs: got "
            f"{len(given)}"
        )
    return list(given)


def _sizes(
    window: Any, stride: Any, spatial: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The window and the stride along each axis behind the batch."""
    if window is None:
        # About as many windows of a series as of a picture.
        share = 64 if len(spatial) == 1 else 8
        window = [-(-shape[axis] // share) for axis in spatial]
    widths = _by_axis("window", window, spatial, shape)
    # A window covers all channels unless it has a size for them.
    widths = [n if one is None else one for one, n in zip(widths, shape[1:], strict=True)]
    if stride is None or isinstance(stride, int):
        stride = (stride,) * len(widths)
    steps = _by_axis("stride", stride, spatial, shape)
    steps = [max(1, n // 2) if one is None else one for one, n in zip(steps, widths, strict=True)]
    for axis, (width, step, size) in enumerate(zip(widths, steps, shape[1:], strict=True), 1):
        if width > size:
            raise InputError(
                f"window is larger than the input: got {width} on axis {axis}, which has {size}; "
                "use a smaller window"
            )
        if step > width and width < size:
            raise InputError(
                f"stride is larger than the window, which would leave gaps: got {step} on axis "
                f"{axis}, expected at most {width}"
            )
    return tuple(widths), tuple(steps)


def _by_axis(name: str, given: Any, spatial: tuple[int, ...], shape: tuple[int, ...]) -> list[Any]:
    """The sizes of a window or a stride by axis behind the batch; None where there is no size."""
    if isinstance(given, int):
        given = (given,) * len(spatial)
    if len(given) == len(shape) - 1:
        return list(given)
    if len(given) != len(spatial):
        raise InputError(
            f"{name} must have a number for each spatial axis ({len(spatial)}) or for each axis "
            f"behind the batch ({len(shape) - 1}) of an input {list(shape)}: got {tuple(given)}"
        )
    sizes = dict(zip(spatial, given, strict=True))
    return [sizes.get(axis) for axis in range(1, len(shape))]


def _check_sizes(name: str, given: Any) -> None:
    """Raises unless `given` is None, an int, or tuples of ints, 1 or more each."""
    if isinstance(given, (tuple, list)) and given:
        for one in given:
            _check_sizes(name, one)
    elif given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise InputTypeError(
            f"{name} must be a whole number, a tuple of them or a tuple of tuples, one per input: "
            f"got {given!r}"
        )
    elif given is not None and given < 1:
        raise InputError(f"{name} must be at least 1: got {given}")


# Random masks.


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
    sums = [context.scores.new_zeros(2, batch * targets, math.prod(size)) for size in sizes]

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
        channels = x[0].numel() // math.prod(size)
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
    """Masks of input `number`, float64 [M, positions]: a grid of zeros and ones is enlarged
    linearly to one cell more than the input, and a random window of its size is cut out.
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
