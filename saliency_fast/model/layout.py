"""Layers as maps: which axis of a layer's output holds channels, and where its places lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.errors import InputError
from saliency_fast.model.axes import Axes
from saliency_fast.model.follow import Inside
from saliency_fast.model.followed import Followed, Lattice, lattice_of, order_of

_SPECIAL = 16
"""The most leading tokens without a place that are looked for."""
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def channel_axis(layer: nn.Module, shape: tuple[int, ...], default: int = 1) -> int:
    """1 or -1: the axis of a layer's output [R, ...] that holds its channels.

    The layer's last part that knows its number of features tells; convolutions and batch norms
    have them on axis 1 where both axes fit.
    """
    for part in reversed(list(layer.modules())):
        early = _number(part, "out_channels", "num_channels", "num_features")
        late = _number(part, "out_features", "embed_dim", "embedding_dim", "hidden_size")
        if late is None and isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1:
            late = part.normalized_shape[0]
        known = early if late is None else late
        fits = [axis for axis in (1, -1) if shape[axis] == known]
        if fits:
            return fits[0] if early is not None else fits[-1]
    return default


def _number(part: nn.Module, *names: str) -> int | None:
    found = [getattr(part, name, None) for name in names]
    return next((one for one in found if isinstance(one, int)), None)


@dataclass(frozen=True)
class Layout:
    """How a layer's output is read as maps [R, C, *grid], and the input's space they belong to.

    last: channels are the last axis. index: the tokens at the points of the grid, where the layer
    gives tokens; others have no place. size: the input's spatial size. shape: of one example's map,
    as the input has its axes: [1, *size], or with the 1 where the input has its channels. order:
    of the layer's spatial axes, where it is another than the input's. fold: so many steps of an
    example are rows of their own.
    """

    last: bool
    index: tuple[int, ...] | None
    grid: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    fold: int = 1

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output, or gradients of its shape, as maps [R, C, *grid]."""
        if self.fold > 1:
            output = output.reshape(-1, self.fold, *output.shape[1:])
            output = output if self.last else output.movedim(2, 1)
        if self.last:
            output = output.movedim(-1, 1)
        if self.index is not None:
            places = torch.tensor(self.index, device=output.device)
            return output.index_select(2, places).reshape(*output.shape[:2], *self.grid)
        return output if self.order is None else output.permute(0, 1, *self.order)


@dataclass(frozen=True)
class Space:
    """An input's space: its shape [B, ...] and layout, and what is known of where the elements of
    layers lie in it, as number `number` of the inputs.
    """

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
    """The layout of what layer `at` gives, of `shape` [R, ...].

    grid, special: of tokens [R, T, C], where neither what becomes of the input's places nor the
    model's patches tell.
    """
    name, size = type(layer).__name__, space.size
    if len(shape) < 3:
        raise no_space(name, shape)
    last = channel_axis(layer, shape, -1 if len(shape) == 3 and len(size) > 1 else 1) == -1
    found = tuple(shape[1:-1] if last else shape[2:])
    followed = space.inside.of(at, space.number)
    if last and len(found) == 1 and not _folded(followed):
        lattice = tokens_at(f"layer {name}", found[0], space, grid, special, model, followed)
        return Layout(True, lattice.index, lattice.grid, size, space.of_map)
    if grid is not None or special:
        raise InputError(
            f"grid and special are for tokens [B, T, C]: got a layer ({name}) of output "
            f"{list(shape)}; leave them out"
        )
    if math.prod(found) == 1:
        raise no_space(name, shape)
    fold, order = _steps(followed, space), None
    places = len(found) + (fold > 1)
    if places != len(size):
        raise InputError(
            f"a map needs as many spatial axes as the input {list(space.shape)} has: got {places} "
            f"in the output {list(shape)} of layer {name}, expected {len(size)}; choose another "
            "layer, and pass what has no space through forward_args"
        )
    if followed is not None:
        first = 1 if last else 2
        axes = [*([0] if fold > 1 else []), *range(first, first + len(found))]
        known = order_of(followed, axes, space.axes.places)
        order = None if known is None else tuple(2 + axes.index(axis) for axis in known)
    grid = (*((fold,) if fold > 1 else ()), *found)
    if order is not None:
        grid = tuple(grid[axis - 2] for axis in order)
    return Layout(last, None, grid, size, space.of_map, order, fold)


def _folded(followed: Followed | None) -> bool:
    return followed is not None and bool(followed.along(0) - {0})


def _steps(followed: Followed | None, space: Space) -> int:
    """How many steps of an example are rows of a layer, one after the other; 1 where it has the
    examples alone on its first axis.
    """
    if followed is None or not _folded(followed):
        return 1
    steps = followed.along(0) - {0}
    item = followed.where[0]
    rows = item.flatten(1)[:, 0]
    if len(steps) != 1 or not steps <= set(space.axes.places) or bool((rows.diff() < 0).any()):
        raise InputError(
            "a layer must have the examples on its first axis, each with its steps one after the "
            f"other: got rows that mix axes {sorted(followed.along(0))} of the input "
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
    followed: Followed | None = None,
) -> Lattice:
    """Where tokens lie in an input: by `grid` and `special` where these are given, else by what
    becomes of the input's places on their way, else by the arithmetic of the patch convolution.
    """
    size, places = space.size, space.axes.places
    if grid is None:
        known = None if followed is None else lattice_of(followed, places)
        known = known or space.inside.sequence(tokens, places, space.number)
        if known is not None and special in (None, *_left_over(known, tokens)):
            return known
        if (tokens,) == size and not special:
            return Lattice(size, tuple(range(tokens)))
    if len(size) > 3:
        raise InputError(
            f"tokens make a map over up to 3 spatial axes: got an input {list(space.shape)}"
        )
    if grid is None and len(size) == 1 and tokens - abs(special or 0) == size[0]:
        grid = size
    patches = patch_grid(model, size)
    special, grid = token_grid(what, tokens, size, grid, special, patches)
    start = max(special, 0)
    return Lattice(grid, tuple(range(start, start + math.prod(grid))))


def _left_over(lattice: Lattice, tokens: int) -> tuple[int, int]:
    """The number of tokens without a place, as `special` may say it."""
    count = tokens - len(lattice.index)
    return count, -count


def _convolutions(model: object, rank: int) -> list[Any]:
    """A model's convolutions of that many spatial axes."""
    kind = _CONVOLUTIONS.get(rank)
    if kind is None or not isinstance(model, nn.Module):
        return []
    return [part for part in model.modules() if isinstance(part, kind)]


def no_space(name: str, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"layer {name} has no spatial output: got {list(shape)}, expected [B, C, *spatial] or "
        "tokens [B, T, C]; choose an earlier layer"
    )


def patch_grid(model: object, space: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of a model's patches: what its first convolution with strides makes of the input."""
    for part in _convolutions(model, len(space)):
        if max(part.stride) > 1 and not isinstance(part.padding, str):
            parts = zip(
                space, part.padding, part.dilation, part.kernel_size, part.stride, strict=True
            )
            return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in parts)
    return None


def token_grid(
    what: str,
    tokens: int,
    space: tuple[int, ...],
    grid: tuple[int, ...] | None,
    special: int | None,
    patches: tuple[int, ...] | None,
) -> tuple[int, tuple[int, ...]]:
    """The number of tokens of `what` without a place, and the grid of the others.

    patches: the grid that the model's own patches make, where it is known.
    """
    rest = -1 if patches is None else tokens - math.prod(patches)
    if grid is None and 0 <= rest <= _SPECIAL and (special is None or abs(special) == rest):
        grid = patches
    if grid is None:
        cut = "" if patches is None else f"; its convolution cuts {list(patches)} patches"
        raise InputError(
            f"where the {tokens} tokens of {what} lie in an input of {list(space)} cannot be told "
            f"from the model{cut}: pass grid= with a number of patches for each axis, such as "
            "grid=(14, 14), and special= for the number of tokens without a place"
        )
    rest = tokens - math.prod(grid)
    if rest < 0 or len(grid) != len(space) or (special is not None and abs(special) != rest):
        raise InputError(
            f"grid does not fit {what}: got {list(grid)} and special={special} for "
            f"{tokens} tokens over {list(space)}; their product and special must make that number"
        )
    return (rest if special is None else special), grid
