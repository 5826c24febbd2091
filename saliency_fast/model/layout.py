"""Layers as maps: which axis of a layer's output holds channels, and where its places lie."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saliency_fast.errors import InputError

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

    last: channels are the last axis. special: so many leading tokens have no place (trailing ones
    where negative). size: the input's spatial size. shape: of one example's map, as the input has
    its axes: [1, *size], or with the 1 where the input has its channels.
    """

    last: bool
    special: int
    grid: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output, or gradients of its shape, as maps [R, C, *grid]."""
        if self.last:
            output = output.movedim(-1, 1)
        if self.special > 0:
            output = output[:, :, self.special :]
        elif self.special < 0:
            output = output[:, :, : self.special]
        return output.reshape(*output.shape[:2], *self.grid)


def read_layout(
    layer: nn.Module,
    shape: tuple[int, ...],
    x: tuple[int, ...],
    grid: tuple[int, ...] | None = None,
    special: int | None = None,
    model: object = None,
) -> Layout:
    """The layout of a layer's output of `shape` [R, ...] for an input of shape `x` [B, ...].

    grid, special: of tokens [R, T, C], where neither the model's patches nor their number tells.
    """
    name = type(layer).__name__
    if len(shape) < 3:
        raise no_space(name, shape)
    last = channel_axis(layer, shape, -1 if len(shape) == 3 and len(x) > 3 else 1) == -1
    found = tuple(shape[1:-1] if last else shape[2:])
    if last and len(found) == 1 and (grid, special) == (None, None) and x[1:-1] == found:
        return Layout(True, 0, found, found, (*found, 1))
    axis = input_axis(model, x)
    of_map = tuple(1 if number == axis else size for number, size in enumerate(x) if number)
    space = tuple(size for number, size in enumerate(x) if number not in (0, axis))
    if last and len(found) == 1:
        patches = patch_grid(model, space)
        special, found = token_grid(f"layer {name}", found[0], space, grid, special, patches)
    elif grid is not None or special:
        raise InputError(
            f"grid and special are for tokens [B, T, C]: got a layer ({name}) of output "
            f"{list(shape)}; leave them out"
        )
    if math.prod(found) == 1:
        raise no_space(name, shape)
    if len(found) != len(space):
        raise InputError(
            f"a map needs as many spatial axes as the input {list(x)} has: got {len(found)} in "
            f"the output {list(shape)} of layer {name}, expected {len(space)}; choose another "
            "layer, and pass what has no space through forward_args"
        )
    return Layout(last, special or 0, found, space, of_map)


def input_axis(model: object, x: tuple[int, ...]) -> int | None:
    """The axis of an input [B, ...] that holds its channels, None of [B, L].

    It is axis 1, unless a convolution takes as many channels as another has (frames first,
    channels last) and none as many as that.
    """
    if len(x) == 2:
        return None
    taken = [part.in_channels for part in _convolutions(model, len(x) - 2)]
    if not taken or x[1] in taken:
        return 1
    return next((axis for axis in (2, len(x) - 1) if x[axis] == taken[0]), 1)


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
    """The grid of a model's patches: of its first convolution whose patches do not overlap."""
    for part in _convolutions(model, len(space)):
        if part.stride == part.kernel_size and max(part.stride) > 1:
            pads = part.padding if isinstance(part.padding, tuple) else (0,) * len(space)
            sizes = zip(space, pads, part.stride, strict=True)
            return tuple((size + 2 * pad) // step for size, pad, step in sizes)
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
    if grid is None and patches is not None and 0 <= tokens - math.prod(patches) <= _SPECIAL:
        grid = patches
    if grid is not None:
        rest = tokens - math.prod(grid)
        if rest < 0 or (special is not None and abs(special) != rest):
            raise InputError(
                f"grid does not fit {what}: got {list(grid)} and special={special} for "
                f"{tokens} tokens; their product and special must make that number"
            )
        return (rest if special is None else special), grid
    fits = _fits(tokens, space, special)
    if len(fits) == 1:
        return fits[0]
    if fits:
        shown = " or ".join(f"grid={one} with special={count}" for count, one in fits)
        raise InputError(
            f"{tokens} tokens of {what} can lie in more than one grid: got {shown} for an "
            f"input of {list(space)}; pass the right one"
        )
    raise InputError(
        f"{tokens} tokens of {what} make no grid of the input's aspect {list(space)}; pass "
        "grid=(rows, columns), and special= for the number of tokens without a place"
    )


def _fits(
    tokens: int, space: tuple[int, ...], special: int | None
) -> list[tuple[int, tuple[int, ...]]]:
    """(tokens without a place, grid) with the fewest of the former.

    None and one are as likely; in the plane no number of tokens can be read in both ways.
    """
    counts = [(0, 1), *((one,) for one in range(2, _SPECIAL + 1))]
    for several in counts if special is None else [(special,)]:
        fits = [(one, grid) for one in several for grid in grids_of(tokens - abs(one), space)]
        if fits:
            return fits
    return []


def grids_of(tokens: int, space: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The grids of so many tokens in which patches are as wide as they are high.

    A row is cut into whole patches, and so is a cube, into cubes; of other volumes, and of clips,
    the number of tokens tells nothing.
    """
    if tokens < 1 or (len(space) > 2 and len(set(space)) > 1):
        return []
    divisors = [[n for n in range(1, size + 1) if tokens % n == 0] for size in space[:2]]
    rest = len(space) - 2
    grids = [(*one, *one[:1] * rest) for one in itertools.product(*divisors)]
    return [
        one
        for one in grids
        if math.prod(one) == tokens
        and (len(space) == 2 or not space[0] % one[0])
        and all(n * space[0] == one[0] * size for n, size in zip(one, space, strict=True))
    ]
