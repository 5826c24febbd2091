"""Layouts of inputs by letters such as "BTCHW", and layers' outputs as maps over their axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.errors import InputError, InputTypeError, warn
from saliency_fast.model.follow import Coordinates, Inside, Lattice, lattice_of, order_of
from saliency_fast.model.layers import channel_axis

LETTERS = "BCFTDHW"
LayoutLike = str | Sequence[str | None] | None
"""One letter per axis of an input, or a tuple of such strings, one per input (None: inferred)."""

_CANDIDATES = {
    3: "'BCT' (channels first, as torch.nn.Conv1d takes them), 'BTF' (steps first, features last) "
    "or 'BHW' (a picture without a channel axis)",
    4: "'BCHW' (channels first) or 'BHWC' (channels last)",
    5: "'BCDHW' (a volume), 'BCTHW' or 'BTCHW' (a clip)",
}
_CONVENTION = {4: "BCHW"}
"""Where neither the caller nor the model says: PyTorch's order of pictures, with a warning."""
_STANDARD = {2: "BF", 3: "BCT", 4: "BCHW", 5: "BCDHW", 6: "BCTDHW"}
_SPECIAL = 16
"""The most tokens without a place that are inferred."""
_MOST_AXES = 3
"""Spatial axes that tokens may make a map of."""
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LayoutWarning(UserWarning):
    """A layout was taken by convention, since neither the caller nor the model says it."""


@dataclass(frozen=True)
class Axes:
    """The layout of an input: one letter for each axis.

    B is the batch, C channels, F features, T time, D, H and W space. Channels are C, or F where
    there is no C; all other axes behind the batch are places, as are F and T of [B, F] and [B, T].
    The standard form is [B, C, *places], with one channel where there is none, and [B, F].
    """

    letters: str

    @cached_property
    def channel(self) -> int | None:
        """The axis of the channels, None where each place has one number."""
        if len(self.letters) == 2:
            return None
        axis = self.letters.find("C" if "C" in self.letters else "F")
        return None if axis < 0 else axis

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The axes behind the batch that are no channels, in their order."""
        return tuple(axis for axis in range(1, len(self.letters)) if axis != self.channel)

    @property
    def spatial(self) -> bool:
        """Whether neighbours on its places are neighbours in time or space: not so of tables."""
        return len(self.letters) > 2 or self.letters == "BT"

    @property
    def is_standard(self) -> bool:
        return self.channel == 1 or not self.spatial

    def standard(self, x: Tensor, lead: int = 1) -> Tensor:
        """`x` in standard form behind its `lead` axes, as a view [*lead, C, *places]."""
        if not self.spatial:
            return x
        if self.channel is None:
            return x.unsqueeze(lead)
        return x.movedim(self.channel - 1 + lead, lead)

    def back(self, x: Tensor, lead: int = 1) -> Tensor:
        """The reverse of `standard`; [*lead, 1, *places] where channels were summed."""
        if not self.spatial:
            return x
        if self.channel is None:
            return x.squeeze(lead)
        return x.movedim(lead, self.channel - 1 + lead)

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the places of an input of `shape` [B, ...]."""
        return tuple(shape[axis] for axis in self.places)


class Layouts:
    """The layouts of inputs of `shapes` [B, ...], given by the caller or inferred on demand, as
    `letters`; `cached_letters` are those known so far.

    find: infers the letters of each input from the model, None where it does not show them. look:
    from (layers, of_input) to where the elements of layers lie in the inputs.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        given: LayoutLike = None,
        find: Callable[[], Sequence[str | None]] | None = None,
        look: Callable[..., Any] | None = None,
    ) -> None:
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.cached_letters = _read(given, self.shapes)
        self.given = tuple(one is not None for one in self.cached_letters)
        self._find, self._look = find, look
        self._warned = False

    def _with(self, letters: Sequence[str | None], find: Any, look: Any) -> Layouts:
        """The same with letters where there are none, and other functions."""
        layouts = Layouts(self.shapes, None, find, look)
        layouts.given, pairs = self.given, zip(self.cached_letters, letters, strict=True)
        layouts.cached_letters = tuple(one or other for one, other in pairs)
        return layouts

    @property
    def letters(self) -> tuple[str | None, ...]:
        """Of each input, None where neither the caller nor the model says."""
        if None in self.cached_letters and self._find is not None:
            find, self._find = self._find, None
            pairs = zip(self.cached_letters, find(), strict=True)
            self.cached_letters = tuple(one or other for one, other in pairs)
        return self.cached_letters

    def with_letters(self, letters: Sequence[str | None]) -> Layouts:
        """The same with the model's layouts of its inputs."""
        return self._with(letters, None, self._look)

    def with_inferred(self, letters: Sequence[str | None]) -> Layouts:
        """The same with the layouts of some inputs; the others are still looked for."""
        return self._with(letters, self._find, self._look)

    def released(self) -> Layouts:
        """The same for a result, which holds no more of the model than is needed to find them."""
        return self._with(self.cached_letters, self._find, None)

    def __getstate__(self) -> dict[str, Any]:
        # The functions that find them hold the model.
        return vars(self._with(self.letters, None, None))

    def __len__(self) -> int:
        return len(self.shapes)

    def inside(self, layers: Sequence[Any] = (), of_input: bool = False) -> Any:
        """Where the elements of layers lie, `follow.Inside`; None where that cannot be found."""
        return None if self._look is None else self._look(layers, of_input)

    @property
    def described(self) -> str:
        """The layouts in words, with who says so."""
        parts = []
        for number, shape in enumerate(self.shapes):
            if self.given[number]:
                parts.append(f"{self.cached_letters[number]}, as given")
            elif self.letters[number] is not None:
                parts.append(f"{self.letters[number]}, by the model's first layer that tells")
            elif self.of(number) is None:
                parts.append(f"not known of {list(shape)}: pass layout= where it matters")
        return "; ".join(parts)

    def of(self, number: int) -> Axes | None:
        """The layout of an input, None where it is unknown."""
        if len(self.shapes[number]) == 2 and self.cached_letters[number] is None:
            return Axes("BF")
        letters = self.letters[number]
        return None if letters is None else Axes(letters)

    def or_conventional(self, number: int) -> Axes | None:
        """The layout of an input, by convention where it is unknown."""
        letters = _CONVENTION.get(len(self.shapes[number]))
        return self.of(number) or (letters and Axes(letters)) or None

    def need(self, number: int, what: str) -> Axes:
        """The layout of an input; raises an InputError that asks for it, on behalf of `what`."""
        if (axes := self.of(number)) is not None:
            return axes
        shape = self.shapes[number]
        letters = _CONVENTION.get(len(shape))
        name = f"input {number}" if len(self) > 1 else "the input"
        depends = f"{what} depends on which axis of {name} {list(shape)} holds its channels"
        if letters is None:
            such = _CANDIDATES.get(len(shape), "one of B, C, F, T, D, H, W for each axis")
            raise InputError(
                f"{depends}, and the model does not tell (no convolution or recurrent layer that "
                f"the input reaches by moved axes alone): pass layout=, such as {such}"
            )
        if not self._warned:
            self._warned = True
            warn(
                f"{depends}, and the model does not tell: taken as layout={letters!r}, channels "
                "first; pass layout= to say so, or 'BHWC' for channels last",
                LayoutWarning,
            )
        return Axes(letters)

    def needed(self, what: str) -> tuple[Axes, ...]:
        """The same, of every input."""
        return tuple(self.need(number, what) for number in range(len(self)))

    def spatial(self, number: int, what: str) -> Axes:
        """The same, of an input whose neighbouring places are neighbours in time or space."""
        if len(self.shapes[number]) > 2:
            return self.need(number, what)
        letters = self.letters[number]
        if letters is None or not (axes := Axes(letters)).spatial:
            name = f"input {number} " if len(self) > 1 else ""
            raise InputError(
                f"{what} needs axes of time or space: got {name}{list(self.shapes[number])}; pass "
                "layout='BT' if its second axis is time, or a baseline that is a number, a tensor "
                "or 'mean'"
            )
        return axes


def standard_layouts(inputs: Sequence[Tensor]) -> Layouts:
    """The layouts of inputs that are in their standard form."""
    return Layouts([x.shape for x in inputs], tuple(_STANDARD.get(x.dim()) for x in inputs))


def _read(given: LayoutLike, shapes: tuple[tuple[int, ...], ...]) -> tuple[str | None, ...]:
    """The caller's letters of each input; raises InputError or InputTypeError with the cure."""
    if given is None:
        return (None,) * len(shapes)
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, (tuple, list)):
        raise InputTypeError(
            "layout must be a string with one letter per axis, such as 'BTF', or a tuple of them, "
            f"one per input: got {type(given).__name__}"
        )
    if len(parts) != len(shapes):
        raise InputError(
            f"layout: expected one for each of {len(shapes)} inputs: got {given!r}; pass a tuple, "
            "with None where the model tells"
        )
    return tuple(_letters(one, shape) for one, shape in zip(parts, shapes, strict=True))


def _letters(given: Any, shape: tuple[int, ...]) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise InputTypeError(f"layout must be a string such as 'BTF': got {given!r}")
    letters = given.upper()
    valid = set(letters) <= set(LETTERS) and len(set(letters)) == len(letters)
    if not valid or not letters.startswith("B"):
        raise InputError(
            f"layout has one letter per axis, each once, and B, the batch, first: got {given!r}; "
            "C is channels, F features, T time, D, H and W space, as in 'BCHW' or 'BTF'"
        )
    if len(letters) != len(shape):
        raise InputError(
            f"layout must have one letter for each axis of the input {list(shape)}: got {given!r}, "
            f"expected {len(shape)} letters, such as {_CANDIDATES.get(len(shape), 'BF')}"
        )
    return letters


# Layers as maps.


@dataclass(frozen=True)
class Layout:
    """How a layer's output is read as maps [R, C, *grid], and the input's space they belong to.

    Attributes:
        last: Whether channels are the last axis.
        index: The tokens at the points of the grid, where the output is of tokens.
        size: The input's spatial size.
        shape: Of one example's map, with 1 where the input has its channels.
        order: Of the layer's spatial axes, where it is another than the input's.
        steps_per_example: How many steps of an example are rows of their own.
    """

    last: bool
    index: tuple[int, ...] | None
    grid: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    steps_per_example: int = 1

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output, or gradients of its shape, as maps [R, C, *grid]."""
        if self.steps_per_example > 1:
            output = output.reshape(-1, self.steps_per_example, *output.shape[1:])
            output = output if self.last else output.movedim(2, 1)
        if self.last:
            output = output.movedim(-1, 1)
        if self.index is not None:
            places = torch.tensor(self.index, device=output.device)
            return output.index_select(2, places).reshape(*output.shape[:2], *self.grid)
        return output if self.order is None else output.permute(0, 1, *self.order)


@dataclass(frozen=True)
class Space:
    """An input's shape [B, ...], layout and number, and where layers lie in it."""

    shape: tuple[int, ...]
    axes: Axes
    inside: Inside = field(default_factory=Inside)
    number: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        return self.axes.size(self.shape)

    @property
    def of_map(self) -> tuple[int, ...]:
        """The shape of one example's map."""
        return tuple(
            1 if axis == self.axes.channel else size for axis, size in enumerate(self.shape) if axis
        )


def read_layout(
    layer: nn.Module,
    shape: tuple[int, ...],
    space: Space,
    grid: tuple[int, ...] | None = None,
    special: int | None = None,
    model: object = None,
    at: int = 0,
) -> Layout:
    """The layout of an output of `shape` [R, ...]; grid, special: of tokens [R, T, C]."""
    name, size = type(layer).__name__, space.size
    no_space = InputError(
        f"layer {name} has no spatial output: got {list(shape)}, expected [B, C, *spatial] or "
        "tokens [B, T, C]; choose an earlier layer"
    )
    if len(shape) < 3:
        raise no_space
    last = channel_axis(layer, shape, -1 if len(shape) == 3 and len(size) > 1 else 1) == -1
    inner = tuple(shape[1:-1] if last else shape[2:])
    coordinates = space.inside.of(at, space.number)
    steps_per_example = 1 if coordinates is None else _steps(coordinates, space)
    if last and len(inner) == 1 and steps_per_example == 1:
        lattice = tokens_at(f"layer {name}", inner[0], space, grid, special, model, coordinates)
        return Layout(True, lattice.index, lattice.grid, size, space.of_map)
    if grid is not None or special:
        raise InputError(
            f"grid and special are for tokens [B, T, C]: got a layer ({name}) of output "
            f"{list(shape)}; leave them out"
        )
    if math.prod(inner) == 1:
        raise no_space
    places = len(inner) + (steps_per_example > 1)
    if places != len(size):
        raise InputError(
            f"a map needs as many spatial axes as the input {list(space.shape)} has: got {places} "
            f"in the output {list(shape)} of layer {name}, expected {len(size)}; choose another "
            "layer, and pass what has no space through forward_args"
        )
    order, grid = None, (*((steps_per_example,) if steps_per_example > 1 else ()), *inner)
    if coordinates is not None:
        first = 1 if last else 2
        axes = [*([0] if steps_per_example > 1 else []), *range(first, first + len(inner))]
        along = order_of(coordinates, axes, space.axes.places)
        order = None if along is None else tuple(2 + axes.index(axis) for axis in along)
    if order is not None:
        grid = tuple(grid[axis - 2] for axis in order)
    return Layout(last, None, grid, size, space.of_map, order, steps_per_example)


def _steps(coordinates: Coordinates, space: Space) -> int:
    """How many steps of an example are rows of a layer; 1 where rows are examples."""
    steps = coordinates.along(0) - {0}
    if not steps:
        return 1
    rows = coordinates.where[0].flatten(1)[:, 0]
    if len(steps) != 1 or not steps <= set(space.axes.places) or bool((rows.diff() < 0).any()):
        raise InputError(
            "a layer must have the examples on its first axis, each with its steps one after the "
            f"other: got rows that mix axes {sorted(coordinates.along(0))} of the input "
            f"{list(space.shape)}; choose a layer before or behind the one that moves them"
        )
    return space.shape[next(iter(steps))]


def tokens_at(
    what: str,
    tokens: int,
    space: Space,
    grid: tuple[int, ...] | None,
    special: int | None,
    model: object = None,
    coordinates: Coordinates | None = None,
) -> Lattice:
    """Where tokens lie: as given, by followed coordinates, or by the patch convolution."""
    size, places = space.size, space.axes.places
    if grid is None:
        lattice = None if coordinates is None else lattice_of(coordinates, places)
        lattice = lattice or space.inside.sequence(tokens, places, space.number)
        left_over = 0 if lattice is None else tokens - len(lattice.index)
        if lattice is not None and special in (None, left_over, -left_over):
            return lattice
        if (tokens,) == size and not special:
            return Lattice(size, tuple(range(tokens)))
    if len(size) > _MOST_AXES:
        raise InputError(
            f"tokens make a map over up to 3 spatial axes: got an input {list(space.shape)}"
        )
    if grid is None and len(size) == 1 and tokens - abs(special or 0) == size[0]:
        grid = size
    patches = patch_grid(model, size)
    rest = -1 if patches is None else tokens - math.prod(patches)
    if grid is None and 0 <= rest <= _SPECIAL and (special is None or abs(special) == rest):
        grid = patches
    if grid is None:
        cut = "" if patches is None else f"; its convolution cuts {list(patches)} patches"
        raise InputError(
            f"where the {tokens} tokens of {what} lie in an input of {list(size)} cannot be told "
            f"from the model{cut}: pass grid= with a number of patches for each axis, such as "
            "grid=(14, 14), and special= for the number of tokens without a place"
        )
    rest = tokens - math.prod(grid)
    if rest < 0 or len(grid) != len(size) or (special is not None and abs(special) != rest):
        raise InputError(
            f"grid does not fit {what}: got {list(grid)} and special={special} for "
            f"{tokens} tokens over {list(size)}; their product and special must make that number"
        )
    start = max(rest if special is None else special, 0)
    return Lattice(grid, tuple(range(start, start + math.prod(grid))))


def patch_grid(model: object, space: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of a model's patches: the output of its first convolution with strides."""
    kind = _CONVOLUTIONS.get(len(space), ())
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if not isinstance(part, kind):
            continue
        if max(part.stride) > 1 and not isinstance(part.padding, str):
            parts = zip(
                space, part.padding, part.dilation, part.kernel_size, part.stride, strict=True
            )
            return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in parts)
    return None
