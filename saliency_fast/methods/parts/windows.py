"""Windows that slide over an input: their sizes and strides, and coarser grids of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.layout import Layouts


@dataclass(frozen=True)
class Grid:
    """Windows over one input. bounds: (start, stop) int64 [n] for every axis behind the batch; the
    window of index (i, j, ...) is the box of their i-th, j-th, ... bounds.
    """

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
        return prod(self.shape)

    def to(self, device: torch.device) -> Grid:
        return Grid(tuple((start.to(device), stop.to(device)) for start, stop in self.bounds))

    def coarser(self) -> Grid:
        """Every two neighbours of an axis in one window that covers both."""
        return Grid(
            tuple(
                (start[::2], torch.cat([stop[1::2], stop[-1:]])[: len(start[::2])])
                for start, stop in self.bounds
            )
        )

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
        start, stop = (
            torch.stack([bound[side][own] for bound, own in pairs], dim=1) for side in (0, 1)
        )
        return start, stop

    def volume(self) -> Tensor:
        """How many elements each window covers, float64 [n]."""
        return _outer([(stop - start).double() for start, stop in self.bounds]).flatten()

    def mean(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """For each element of `shape` the mean of the values of the windows that cover it.

        values: float64 [*, *grid]. Boxes are separable: the sum is taken axis by axis.
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
        named = _for_every_axis(width, shape) and (
            step is None or isinstance(step, int) or _for_every_axis(step, shape)
        )
        spatial = () if named else layouts.need(number, "a window").places
        grids.append(Grid.of(tuple(shape[1:]), *_sizes(width, step, spatial, shape)))
    return grids


def _for_every_axis(given: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(given, (tuple, list)) and len(given) == len(shape) - 1


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


def check_whole(name: str, given: Any) -> None:
    """Raises unless `given` is None, an int, or tuples of ints, 1 or more each."""
    if given is None:
        return
    if isinstance(given, (tuple, list)) and given:
        for one in given:
            check_whole(name, one)
        return
    if isinstance(given, bool) or not isinstance(given, int):
        raise InputTypeError(
            f"{name} must be a whole number, a tuple of them or a tuple of tuples, one per input: "
            f"got {given!r}"
        )
    if given < 1:
        raise InputError(f"{name} must be at least 1: got {given}")
