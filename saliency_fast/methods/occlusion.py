"""Occlusion: the change of the score where a sliding window hides the input."""

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
from saliency_fast.engine.recipe import Maps, Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import window_points

Window = int | tuple[int, ...] | tuple[int | tuple[int, ...] | None, ...] | None


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
    """Points without the chosen windows [B, n] of each input, whose effects go to `effects`
    [B, K, n]. Windows are numbered on from input to input.
    """
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
    """The share of the chosen windows bool [B, n] with the largest effect [B, K, n] for any target.
    Effects are relative to the largest one of their target.
    """
    size = effect.abs()
    tiny = torch.finfo(size.dtype).tiny
    weight = (size / size.amax(2, keepdim=True).clamp_min(tiny)).amax(1)
    order = torch.where(chosen, weight, -1.0).argsort(dim=1, descending=True, stable=True)
    count = (share * chosen.sum(1, keepdim=True)).ceil()
    rank = torch.arange(chosen.shape[1], device=order.device)
    return torch.zeros_like(chosen).scatter(1, order, rank < count)


# --- Windows ----------------------------------------------------------------------------------


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
        """For each element of `shape` the mean of the values of the windows that cover it. values:
        float64 [*, *grid]. Boxes are separable: summed axis by axis.
        """
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
