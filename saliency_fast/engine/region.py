"""Region: the part of the inputs that a call is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saliency_fast.engine.bind import Call
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.graph.receptive_field import Box
from saliency_fast.model.layout import Axes

Region = Tensor | Sequence[slice | tuple[int, int]] | None


@dataclass(frozen=True)
class Part:
    """A box of an input's spatial axes, and the mask within it that is asked for, if it is not all.

    box: (start, stop) per axis; mask: bool like the whole of those axes. axes: the input's layout.
    """

    box: Box
    axes: Axes
    mask: Tensor | None = field(default=None, compare=False)

    def kept(self, values: Tensor) -> Tensor:
        """`values` [B, K, *], like the input behind K, with zeros outside of the part."""
        return self.axes.back(self._kept(self.axes.standard(values, 2)), 2)

    @property
    def first(self) -> bool:
        """Whether the input has its channels before its places, as convolutions take them."""
        return self.axes.channel == 1

    def _kept(self, values: Tensor) -> Tensor:
        if self.mask is not None:
            return values * self.mask
        found = torch.zeros_like(values)
        target, source = found, values
        for axis, (start, stop) in enumerate(self.box, start=values.dim() - len(self.box)):
            target = target.narrow(axis, start, stop - start)
            source = source.narrow(axis, start, stop - start)
        target.copy_(source)
        return found


def read_region(region: Region, call: Call) -> Part | None:
    """The part of a call's input; raises InputError or InputTypeError with the cure."""
    if region is None:
        return None
    shape = call.inputs[0].shape
    if len(call.inputs) != 1 or (len(shape) < 3 and call.layouts.settled != ("BT",)):
        raise InputError(
            "region needs one input [B, C, *spatial]: got "
            f"{[list(x.shape) for x in call.inputs]}; mask the values of other inputs yourself"
        )
    axes = call.layouts.need(0, "region=")
    size = axes.size(shape)
    if isinstance(region, Tensor):
        return _masked(region, size, axes, call.device)
    if not isinstance(region, (tuple, list)):
        raise InputTypeError(
            f"region must be a bool mask or one slice per spatial axis: got {type(region).__name__}"
        )
    if len(region) != len(size):
        raise InputError(
            f"region must have one slice for each spatial axis: got {len(region)}, the input has "
            f"{list(size)}"
        )
    box = tuple(_span(one, n) for one, n in zip(region, size, strict=True))
    if any(start >= stop for start, stop in box):
        raise InputError(f"region is empty, or outside of {list(size)}: got {list(box)}")
    return Part(box, axes)


def _masked(mask: Tensor, size: tuple[int, ...], axes: Axes, device: torch.device) -> Part:
    if mask.dtype != torch.bool or mask.shape != size:
        raise InputError(
            f"region: a mask must be bool {list(size)}: got {mask.dtype} {list(mask.shape)}"
        )
    places = mask.nonzero()
    if not len(places):
        raise InputError("region is empty: got a mask without a single True")
    low, high = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    return Part(tuple(zip(low, high, strict=True)), axes, mask.to(device))


def _span(given: slice | tuple[int, int], size: int) -> tuple[int, int]:
    if isinstance(given, slice):
        start, stop, step = given.indices(size)
        if step == 1:
            return start, stop
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        start, stop = given
        if 0 <= start <= stop <= size:
            return int(start), int(stop)
    raise InputError(
        f"region: each axis needs a slice with step 1 or (start, stop) within its {size} places: "
        f"got {given!r}"
    )
