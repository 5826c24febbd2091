"""Superpixels: segments of images, volumes and signals, all channels together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast.errors import InputError


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
