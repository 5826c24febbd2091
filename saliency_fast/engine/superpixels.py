"""Superpixels: segments of images, volumes and signals, all channels together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saliency_fast.errors import InputError


def spatial_axes(shape: torch.Size) -> tuple[int, ...]:
    """The axes behind the channels; the only one where there are no channels."""
    return tuple(range(2, len(shape))) or tuple(range(1, len(shape)))


def grid(x: Tensor, count: int) -> Tensor:
    """Blocks of a regular grid, `count` per axis (fewer on shorter ones), the same for all."""
    number = torch.zeros(1, *(1,) * (x.dim() - 1), dtype=torch.int64, device=x.device)
    for axis in spatial_axes(x.shape):
        size = x.shape[axis]
        cells = min(count, size)
        place = torch.arange(size, device=x.device) * cells // size
        number = number * cells + place.view(-1, *(1,) * (x.dim() - 1 - axis))
    return number


def slic(x: Tensor, count: int) -> Tensor:
    """About `count` SLIC superpixels of each example (Achanta, 2012), by scikit-image."""
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
    found = []
    for one in x.detach().double().cpu():
        low, high = torch.aminmax(one)
        scaled = (one - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
        # Signals are images of one row.
        image = scaled.movedim(0, -1) if x.dim() > 3 else scaled.movedim(0, -1)[None]
        colours = len(one) == 3
        labels = by_skimage(
            image.numpy(),
            n_segments=count,
            compactness=10.0 if colours else 0.1,
            channel_axis=-1,
            start_label=0,
        )
        found.append(torch.from_numpy(labels).long().view(1, *one.shape[1:]))
    return torch.stack(found).to(x.device)


SEGMENTATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "grid": (grid, 8),
    "slic": (slic, 50),
}
"""By name: what makes the segments, and about how many there are unless told."""


def segment(x: Tensor, name: str, count: int | None) -> Tensor:
    """Segment numbers from 0, int64 [B | 1, *], broadcastable to x."""
    make, usual = SEGMENTATIONS[name]
    found = make(x, usual if count is None else count)
    # Some numbers may be unused.
    numbers: Tensor = torch.unique(found, return_inverse=True)[1]
    return numbers
