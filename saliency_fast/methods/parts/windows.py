"""Windows: boxes that slide over an input, their sizes and strides, and coarser grids of them."""

from __future__ import annotations

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
        return Grid(tuple((start[::2], _last_of_two(stop)) for start, stop in self.bounds))

    def parents(self) -> Tensor:
        """The flat index in `coarser()` of the window that covers each of these, int64 [n]."""
        wider = [-(-n // 2) for n in self.shape]
        places = torch.unravel_index(
            torch.arange(self.count, device=self.bounds[0][0].device), self.shape
        )
        found = torch.zeros_like(places[0])
        for place, count in zip(places, wider, strict=True):
            found = found * count + place // 2
        return found

    def boxes(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The start and stop [R, axes] of windows by their flat index [R]."""
        places = torch.unravel_index(index, self.shape)
        pairs = list(zip(self.bounds, places, strict=True))
        start = torch.stack([bound[0][place] for bound, place in pairs], dim=1)
        return start, torch.stack([bound[1][place] for bound, place in pairs], dim=1)

    def volume(self) -> Tensor:
        """How many elements each window covers, float64 [n]."""
        return _outer([(stop - start).double() for start, stop in self.bounds]).flatten()

    def mean(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """For each element of `shape` the mean of the values of the windows that cover it.

        values: float64 [*, *grid]. Boxes are separable: the sum is taken axis by axis.
        """
        lead = values.dim() - len(shape)
        for axis, covers in enumerate(self._covers(shape)):
            values = (values.movedim(lead + axis, -1) @ covers).movedim(-1, lead + axis)
        return values / self.covering(shape)

    def covering(self, shape: tuple[int, ...]) -> Tensor:
        """How many windows cover each element of `shape`, float64."""
        return _outer([covers.sum(0) for covers in self._covers(shape)])

    def _covers(self, shape: tuple[int, ...]) -> list[Tensor]:
        """For each axis 1 where a window covers a place, float64 [windows, places]."""
        found = []
        for (start, stop), size in zip(self.bounds, shape, strict=True):
            place = torch.arange(size, device=start.device)
            found.append(((place >= start[:, None]) & (place < stop[:, None])).double())
        return found


def _last_of_two(stop: Tensor) -> Tensor:
    return torch.cat([stop[1::2], stop[-1:]]) if len(stop) % 2 else stop[1::2]


def _outer(factors: list[Tensor]) -> Tensor:
    return reduce(lambda whole, one: whole[..., None] * one, factors)


def hierarchy(grid: Grid, levels: int) -> list[Grid]:
    """A grid, and so many coarser ones."""
    found = [grid]
    for _ in range(levels):
        found.append(found[-1].coarser())
    return found


def read_windows(window: Any, stride: Any, layouts: Layouts) -> list[Grid]:
    """The grid of each input [B, *] from what the user gave: an int or None for all, or a tuple of
    ints (one input), or a tuple with an entry per input.
    """
    shapes = list(layouts.shapes)
    windows, strides = _per_input(window, shapes), _per_input(stride, shapes)
    grids = []
    for number, shape in enumerate(shapes):
        given = windows[number], strides[number]
        # What has a number for every axis means the same in all layouts.
        own = [one is None or _each(one, shape) for one in given]
        own[1] = own[1] or isinstance(given[1], int)
        named = own[0] and own[1] and given[0] is not None
        places = () if named else layouts.need(number, "a window").places
        width = _widths(given[0], shape, places)
        step = _steps(given[1], width, shape, places)
        _check(width, step, shape)
        grids.append(Grid.of(tuple(shape[1:]), width, step))
    return grids


def _each(given: Any, shape: tuple[int, ...]) -> bool:
    """Whether there is a number for every axis behind the batch."""
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


def _widths(given: Any, shape: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    """The window along each axis behind the batch; channels go together unless they are named."""
    if given is None:
        # About as many windows of a series as of a picture.
        share = 64 if len(places) == 1 else 8
        given = [-(-shape[place] // share) for place in places]
    widths = _named("window", given, places, shape)
    # Where channels go together, windows cover them all.
    return tuple(n if one is None else one for one, n in zip(widths, shape[1:], strict=True))


def _steps(
    given: Any, widths: tuple[int, ...], shape: tuple[int, ...], places: tuple[int, ...]
) -> tuple[int, ...]:
    """The stride along each axis behind the batch: half of the window unless it is named."""
    if isinstance(given, int):
        # Of channels too, where windows do not cover them all.
        given = (given,) * len(widths)
    steps: list[int | None] = [None] * len(widths)
    if given is not None:
        steps = _named("stride", given, places, shape)
    return tuple(
        max(1, n // 2) if one is None else one for one, n in zip(steps, widths, strict=True)
    )


def _named(
    name: str, given: Any, places: tuple[int, ...], shape: tuple[int, ...]
) -> list[int | None]:
    """The numbers of a window or a stride by axis; None where there is no number for it."""
    if isinstance(given, int):
        given = (given,) * len(places)
    if len(given) == len(shape) - 1:
        return list(given)
    if len(given) != len(places):
        raise InputError(
            f"{name} must have a number for each spatial axis ({len(places)}) or for each axis "
            f"behind the batch ({len(shape) - 1}) of an input {list(shape)}: got {tuple(given)}"
        )
    found: list[int | None] = [None] * (len(shape) - 1)
    for place, one in zip(places, given, strict=True):
        found[place - 1] = one
    return found


def _check(window: tuple[int, ...], stride: tuple[int, ...], shape: tuple[int, ...]) -> None:
    for axis, (width, step, size) in enumerate(zip(window, stride, shape[1:], strict=True), 1):
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


def check_whole(name: str, given: Any) -> None:
    """Raises unless it is None, an int, or tuples of ints, 1 or more each."""
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
