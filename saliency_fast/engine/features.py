"""Features: which elements of the inputs a perturbation replaces together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.casts import cast
from saliency_fast.model.layout import Layouts, standard_layouts

Features = str | Tensor | tuple[Any, ...] | None
"""None: each element is a feature of its own. A tensor of whole numbers that broadcasts to the
input; "grid", "grid:8", "slic" or "slic:100"; or a tuple of these, one per input. Equal numbers are
one feature, in different inputs too."""


def grid(x: Tensor, count: int | None) -> Tensor:
    """Blocks of a regular grid, `count` per axis, the same for all examples; 8, or fewer on shorter
    axes, where none is given. Raises InputError where an axis has fewer places.
    """
    axes = range(min(2, x.dim() - 1), x.dim())
    shortest = min(x.shape[axis] for axis in axes)
    if count is not None and count > shortest:
        raise InputError(
            f"a grid of {count} blocks per axis is finer than the input {list(x.shape)}, whose "
            f"shortest axis has {shortest} places: use 'grid:{shortest}' or less, or give the "
            "numbers of your own blocks as a tensor"
        )
    number = torch.zeros(1, *(1,) * (x.dim() - 1), dtype=torch.int64, device=x.device)
    for axis in axes:
        size = x.shape[axis]
        cells = min(8 if count is None else count, size)
        place = torch.arange(size, device=x.device) * cells // size
        number = number * cells + place.view(-1, *(1,) * (x.dim() - 1 - axis))
    return number


def slic(x: Tensor, count: int | None) -> Tensor:
    """About `count` SLIC superpixels of each example (Achanta, 2012), by scikit-image; 50, or fewer
    of smaller inputs, where none is given.

    About is within a third (`ABOUT`). Where noise, or a flat picture, makes other numbers of them,
    superpixels are made more compact, up to blocks. Raises InputError where that does not help.
    """
    if x.dim() not in (3, 4, 5):
        raise InputError(
            "features='slic' needs one to three axes behind the channels: got "
            f"{list(x.shape)}; use 'grid' or give the features"
        )
    try:
        from skimage.segmentation import slic as by_skimage
    except ImportError as error:
        raise InputError(
            "features='slic' needs scikit-image, which is not installed: use pip install "
            "'saliency-fast[segments]', or features='grid:8'"
        ) from error
    places = x[0, 0].numel()
    if count is not None and count > places:
        raise InputError(
            f"'slic:{count}' asks for more segments than the input {list(x.shape)} has places: got "
            f"{places}; ask for fewer, or leave features out, so that every element is one"
        )
    wanted = min(50, places) if count is None else count
    found = [_superpixels(by_skimage, one, wanted) for one in x.detach().double().cpu()]
    return torch.stack(found).to(x.device)


ABOUT = 1 / 3
"""How far the number of segments may be from what was asked for, as a share of it."""


def _superpixels(by_skimage: Callable[..., Any], one: Tensor, wanted: int) -> Tensor:
    """Superpixels [1, *places] of an example [C, *places]."""
    low, high = torch.aminmax(one)
    scaled = (one - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    # Signals are images of one row.
    image = scaled.movedim(0, -1) if one.dim() > 2 else scaled.movedim(0, -1)[None]
    usual = 10.0 if len(one) == 3 else 0.1
    seen = []
    for compactness in (usual, *(usual * 4.0**power for power in range(1, 9))):
        asked = wanted
        # The number that is asked for is a guide to it, too: its grid rounds.
        for _ in range(3):
            labels = by_skimage(
                image.numpy(),
                n_segments=asked,
                compactness=compactness,
                channel_axis=-1,
                start_label=0,
            )
            count = len(np.unique(labels))
            if abs(count - wanted) <= ABOUT * wanted:
                return torch.from_numpy(labels).long().view(1, *one.shape[1:])
            seen.append(count)
            if count < wanted / 4:
                # That is no rounding: segments have run together.
                break
            asked = max(1, round(asked * wanted / count))
    raise InputError(
        f"'slic:{wanted}' makes {min(seen)} to {max(seen)} segments of an example {list(one.shape)}"
        ", whatever their compactness: ask for another number, use 'grid:8', or give the numbers "
        "of your own segments as a tensor"
    )


SEGMENTATIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {"grid": grid, "slic": slic}
"""By name: what makes segments of inputs [B, C, *places], about so many."""


def segment(x: Tensor, name: str, count: int | None) -> Tensor:
    """Segment numbers from 0, int64 [B | 1, *], broadcastable to x."""
    found = SEGMENTATIONS[name](x, count)
    # Some numbers may be unused.
    numbers: Tensor = torch.unique(found, return_inverse=True)[1]
    return numbers


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
