"""Tensors inside of a model whose elements are followed from its inputs, and what that tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Followed:
    """A tensor made of an input by moves of its elements, and by what keeps their order.

    where: for each axis of the input the coordinate of each element, like the tensor (expanded: no
    memory); -1 where it is padding. mixed: axes of the input that a product summed over.
    """

    number: int
    where: tuple[Tensor, ...]
    mixed: frozenset[int] = frozenset()

    def along(self, axis: int) -> frozenset[int]:
        """The input's axes whose coordinate changes along an axis of the tensor."""
        return frozenset(number for number, one in enumerate(self.where) if _changes(one, axis))

    def moved(self, change: Callable[[Tensor], Any]) -> list[Followed]:
        """What becomes of it where `change` moves elements: one for each tensor that is made."""
        made = [tree_flatten(change(one))[0] for one in self.where]
        return [replace(self, where=tuple(parts)) for parts in zip(*made, strict=True)]


def _changes(where: Tensor, axis: int) -> bool:
    size = where.shape[axis]
    if size < 2 or where.stride(axis) == 0:
        return False
    a, b = where.narrow(axis, 0, size - 1), where.narrow(axis, 1, size - 1)
    return bool(((a != b) & (a >= 0) & (b >= 0)).any())


def coordinates(x: Tensor) -> tuple[Tensor, ...]:
    found = []
    for axis, size in enumerate(x.shape):
        kind = torch.float32 if size < 2**24 else torch.float64
        place = torch.arange(size, dtype=kind, device=x.device)
        found.append(place.view(-1, *(1,) * (x.dim() - 1 - axis)).expand(x.shape))
    return tuple(found)


def channel_of(
    own: Followed, features: set[int], slid: set[int], shape: tuple[int, ...], taken: Tensor
) -> int | bool | None:
    """The input's axis that lies along the `features` of a tensor, and not along the axes `slid`
    over; None where the input has no channels, False where that does not tell.
    """
    over = frozenset().union(*(own.along(axis) for axis in slid))
    found = (own.mixed | frozenset().union(*(own.along(axis) for axis in features))) - over - {0}
    if len(found) == 1:
        return next(iter(found))
    if found:
        return False
    ones = [axis for axis, size in enumerate(shape) if axis and size == 1]
    if len(ones) > 1:
        # An axis of one is a channel's where the layer has its own.
        named = {axis % taken.dim() for axis in features}
        ones = [axis for axis in ones if taken.dim() == len(shape) and axis in named] or ones
    return ones[0] if ones else None


def by_convolution(
    own: Followed, taken: Tensor, values: Any, kwargs: Mapping[str, Any], shape: tuple[int, ...]
) -> int | bool | None:
    axes = set(range(2, taken.dim()))
    found = channel_of(own, {1}, axes, shape, taken)
    if found is not None or not axes:
        return found
    # The kernel lies on all of an axis: it does not slide there, and mixes it.
    weight = kwargs.get("weight", values[1] if len(values) > 1 else None)
    if isinstance(weight, Tensor) and weight.dim() == taken.dim():
        whole = {axis for axis in axes if weight.shape[axis] == taken.shape[axis] > 1}
        if whole and whole != axes:
            return channel_of(own, whole, axes - whole, shape, taken)
    # Each of an axis that was folded into the batch is seen by itself: channels, or steps?
    return False if own.along(0) - {0} else None


def by_attention(
    own: Followed, taken: Tensor, tokens: int, shape: tuple[int, ...]
) -> int | bool | None:
    """By attention over tokens: what is mixed into their vectors. An input [B, a, b] whose model
    brings its axes into another order first may attend to its channels, which does not tell.
    """
    over = own.along(tokens)
    found = (own.mixed | own.along(-1)) - over - {0}
    if len(found) != 1 or not over - {0}:
        return False
    axis = next(iter(found))
    return axis if len(shape) > 3 or axis == len(shape) - 1 else False


def letters_of(rank: int, channel: int | None, kernel: int) -> str | None:
    """A layout by its channel axis; names of the places by their number and the kernel's."""
    count = rank - 1 - (channel is not None)
    names = {
        1: "T",
        2: "DT" if kernel == 1 else "HW",
        3: "DHW" if kernel == 3 else "THW",
        4: "TDHW",
    }
    if count not in names:
        return None
    letters = list(names[count])
    if channel is not None:
        # Channels are C of convolutions and of pictures, and F of steps.
        letters.insert(channel - 1, "C" if kernel or rank > 3 else "F")
    return "B" + "".join(letters)


@dataclass(frozen=True)
class Lattice:
    """Tokens as places: the grid that they make over the places of an input, and the token at each
    of its points.
    """

    grid: tuple[int, ...]
    index: tuple[int, ...]


def lattice_of(found: Followed, places: Sequence[int]) -> Lattice | None:
    """The lattice of tokens [R, T, C] that are followed, None where they make none. Tokens that are
    made of no place of the input (of classes, registers) are left over.
    """
    where = found.where[0]
    # Rows of more than one place are windows, which are no sequence of an example.
    if where.dim() != 3 or not places or (found.along(0) - {0}) or found.along(-1) & set(places):
        return None
    at = torch.stack([found.where[axis][0, :, 0] for axis in places], 1)
    real = (at >= 0).all(1)
    numbers = [torch.unique(one, return_inverse=True) for one in at[real].unbind(1)]
    grid = tuple(len(values) for values, _ in numbers)
    flat = torch.zeros(int(real.sum()), dtype=torch.int64, device=at.device)
    for size, (_, number) in zip(grid, numbers, strict=True):
        flat = flat * size + number
    # As many tokens as points, and one for each.
    if not len(flat) or len(flat) != math.prod(grid) or len(torch.unique(flat)) != len(flat):
        return None
    return Lattice(grid, tuple(real.nonzero().flatten()[flat.argsort()].tolist()))


def order_of(found: Followed, space: Sequence[int], places: Sequence[int]) -> list[int] | None:
    """For each of the input's `places` the axis among `space` of a tensor that lies along it; None
    where that is not known, or not one to one.
    """
    along = [found.along(axis) & set(places) for axis in space]
    order = []
    for place in places:
        own = [axis for axis, one in zip(space, along, strict=True) if one == {place}]
        if len(own) != 1:
            return None
        order.append(own[0])
    return order
