"""Features: which elements of the inputs a perturbation takes away together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.superpixels import SEGMENTATIONS, segment
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.casts import cast
from saliency_fast.model.layout import Layouts, standard_layouts

Features = str | Tensor | tuple[Any, ...] | None
"""None: each element is a feature of its own. A tensor of whole numbers that broadcasts to the
input; "grid", "grid:8", "slic" or "slic:100"; or a tuple of these, one per input. Equal numbers are
one feature, in different inputs too."""


def read_features(features: Features, inputs: Inputs, layouts: Layouts | None = None) -> Inputs:
    """Feature numbers int64 [B | 1, *] per input, from 0 without gaps over all inputs; nothing
    where there are no features.

    Numbers that the user gave keep their order; generated ones follow them, input by input.
    layouts: of the inputs, in their standard form unless given.
    """
    return () if features is None else numbered(features, inputs, layouts)


def numbered(features: Features, inputs: Inputs, layouts: Layouts | None = None) -> Inputs:
    """The same, where no features mean that every element is one."""
    parts = _per_input(features, inputs)
    given = [_given(part, x) for part, x in zip(parts, inputs, strict=True)]
    known = [one for one in given if one is not None]
    unique = torch.unique(torch.cat([one.flatten() for one in known])) if known else None
    following = 0 if unique is None else unique.numel()
    layouts, found = layouts or standard_layouts(inputs), []
    for number, (part, own, x) in enumerate(zip(parts, given, inputs, strict=True)):
        if own is None:
            own = _generated(part, x, layouts, number) + following
            following = int(own.max()) + 1
        else:
            assert unique is not None
            own = torch.searchsorted(unique, own.contiguous())
        found.append(own.expand(-1, *x.shape[1:]).contiguous())
    return tuple(found)


def _per_input(features: Any, inputs: Inputs) -> Sequence[Any]:
    if features is None or isinstance(features, str):
        return [features] * len(inputs)
    parts = tuple(features) if isinstance(features, (tuple, list)) else (features,)
    if len(parts) != len(inputs):
        raise InputError(
            f"features: expected one entry for each of {len(inputs)} inputs: got {len(parts)}; "
            "pass a tuple, with None where every element is a feature of its own"
        )
    return parts


def _given(part: Any, x: Tensor) -> Tensor | None:
    """The user's numbers as int64 [B | 1, *], broadcastable behind; None where there are none."""
    if part is None or isinstance(part, str):
        return None
    if not isinstance(part, Tensor):
        raise InputTypeError(
            "features must be None, a tensor of whole numbers, a name such as 'grid:8' or 'slic', "
            f"or a tuple of these, one per input: got {type(part).__name__}"
        )
    if part.dtype.is_floating_point or part.dtype.is_complex:
        raise InputTypeError(
            f"features must be whole numbers: got {part.dtype}; use .long(), where equal numbers "
            "mean one feature"
        )
    if part.device != x.device:
        raise InputError(
            f"features are on another device: got {part.device}, the input is on {x.device}; move "
            "them with .to(x.device)"
        )
    aligned = cast(part.detach(), torch.int64, "features", "number them from 0")
    if part.dim() <= x.dim():
        aligned = aligned[(None,) * (x.dim() - part.dim())]
    sizes = zip(aligned.shape, x.shape, strict=False)
    if part.dim() > x.dim() or any(got not in (1, want) for got, want in sizes):
        raise InputError(
            f"features must match the input or broadcast to it: got {list(part.shape)}, the input "
            f"is {list(x.shape)}; features=None makes every element a feature"
        )
    return aligned


def _generated(part: str | None, x: Tensor, layouts: Layouts, number: int) -> Tensor:
    """Numbers from 0, int64 [B | 1, *], broadcastable behind."""
    if part is None:
        return torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    name, _, count = part.partition(":")
    if name not in SEGMENTATIONS or (count and not (count.isdecimal() and int(count) > 0)):
        valid = ", ".join(f"{name!r}" for name in SEGMENTATIONS)
        raise InputError(
            f"features: the names are {valid}, with a count behind a colon: got {part!r}; "
            "expected such as 'grid:8' or 'slic:100'"
        )
    axes = layouts.need(number, f"features={part!r}")
    return axes.back(segment(axes.standard(x), name, int(count) if count else None))
