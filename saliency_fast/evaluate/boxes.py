"""Boxes: where the object is, from corners or masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError


def masks_of(boxes: Any, inputs: Tensor) -> Tensor:
    """Masks, bool [B, *spatial] for inputs [B, C, *spatial].

    boxes: integers [B, 2 D], first the D starts, then the D stops (half-open), as (top, left,
    bottom, right), or bool masks [B, *spatial].
    """
    spatial = inputs.shape[2:] if inputs.dim() > 2 else inputs.shape[1:]
    if not isinstance(boxes, Tensor):
        try:
            boxes = torch.as_tensor(boxes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputTypeError(
                f"boxes must be a tensor of corners or masks: got {type(boxes).__name__}"
            ) from error
    boxes = boxes.to(inputs.device)
    if boxes.dtype == torch.bool:
        return _masks(boxes, len(inputs), spatial)
    if boxes.numel() and (boxes.is_floating_point() or boxes.is_complex()):
        raise InputTypeError(
            f"boxes must be whole numbers or bool masks: got {boxes.dtype}; use .long() or .bool()"
        )
    if boxes.shape != (len(inputs), 2 * len(spatial)):
        if boxes.shape in ((len(inputs), *spatial), (len(inputs), 1, *spatial)):
            raise InputTypeError(f"masks must be bool: got {boxes.dtype}; use .bool()")
        raise InputError(
            f"boxes must be [B, {2 * len(spatial)}], the starts and then the stops of each axis, or"
            f" masks {[len(inputs), *spatial]}: got {list(boxes.shape)} for {len(inputs)} inputs"
        )
    inside = torch.ones((len(inputs), *spatial), dtype=torch.bool, device=inputs.device)
    for axis, size in enumerate(spatial):
        start, stop = boxes[:, axis], boxes[:, len(spatial) + axis]
        wrong = ((start < 0) | (stop > size) | (start >= stop)).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise InputError(
                f"boxes must lie inside of the image and hold something: box {row} is "
                f"{boxes[row].tolist()}, expected 0 <= start < stop <= {size} on axis {axis}"
            )
        place = torch.arange(size, device=inputs.device)
        within = (place >= start[:, None]) & (place < stop[:, None])
        rest = len(spatial) - axis - 1
        inside &= within.view(len(inputs), *(1,) * axis, size, *(1,) * rest)
    return inside


def _masks(masks: Tensor, batch: int, spatial: torch.Size) -> Tensor:
    if masks.shape == (batch, 1, *spatial):
        masks = masks[:, 0]
    if masks.shape != (batch, *spatial):
        raise InputError(
            f"masks must match the inputs: got {list(masks.shape)}, expected {[batch, *spatial]}"
        )
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"masks must hold something: those of examples {empty[:8]} are empty")
    return masks
