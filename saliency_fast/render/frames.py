"""Frames: a map drawn over its input, as uint8 pictures."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.errors import InputError

# Colours (position, red, green, blue) between which the table is interpolated.
_ANCHORS = {
    "signed": (
        *((0.0, 20, 60, 160), (0.25, 90, 150, 230), (0.5, 245, 245, 245)),
        *((0.75, 240, 130, 80), (1.0, 170, 20, 30)),
    ),
    "heat": (
        *((0.0, 10, 5, 30), (0.3, 110, 20, 110), (0.6, 220, 70, 60)),
        *((0.85, 250, 180, 60), (1.0, 255, 250, 190)),
    ),
}
STYLES = tuple(_ANCHORS)


@cache
def colors(style: str) -> Tensor:
    """The colour table of a style, uint8 [256, 3]."""
    if style not in _ANCHORS:
        raise InputError(f"style must be one of {', '.join(STYLES)}: got {style!r}")
    anchors = np.array(_ANCHORS[style], dtype=np.float64)
    positions = np.linspace(0.0, 1.0, 256)
    table = [np.interp(positions, anchors[:, 0], anchors[:, channel]) for channel in (1, 2, 3)]
    return torch.from_numpy(np.stack(table, axis=1).round().astype(np.uint8))


def frames(
    x: Tensor,
    maps: Tensor,
    style: str,
    percentile: float,
    opacity: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Draws maps [B, *spatial] or [B, K, *spatial] over x [B, C, *spatial] as uint8 [..., 3].

    scale: the magnitude at full strength, one per map; the magnitude at `percentile` by default.
    """
    if not 0.0 <= percentile <= 100.0:
        raise InputError(f"percentile must lie in [0, 100]: got {percentile}")
    if not 0.0 <= opacity <= 1.0:
        raise InputError(f"opacity must lie in [0, 1]: got {opacity}")
    spatial = x.shape[2:]
    if len(spatial) not in (2, 3):
        raise InputError(
            f"only images, videos and volumes have a picture: got an input {list(x.shape)}; "
            "use Attribution.map()"
        )
    if maps.shape[-len(spatial) :] != spatial or len(maps) != len(x):
        raise InputError(
            f"the input is not the one explained: got {list(x.shape)} for maps {list(maps.shape)}"
        )
    lead = maps.shape[: maps.dim() - len(spatial)]
    shown = picture(x).to(maps.device)
    if len(lead) == 2:
        shown = shown.repeat_interleave(lead[1], dim=0)
    values = maps.reshape(-1, spatial.numel())
    if scale is None:
        scale = ops.magnitude_percentile(values, percentile)
    flat = shown.reshape(len(values), -1, 3)
    table = colors(style).to(maps.device)
    drawn: Tensor = ops.overlay(flat, values, scale, table, style == "signed", opacity)
    return drawn.view(*lead, *spatial, 3)


def picture(x: Tensor) -> Tensor:
    """An input [B, C, *spatial] as uint8 [B, *spatial, 3], each example scaled to its own range."""
    if x.shape[1] in (3, 4):
        channels = x[:, :3]
    else:
        channels = x[:, :1] if x.shape[1] <= 2 else x.mean(1, keepdim=True)
    low, high = torch.aminmax(channels.flatten(1), dim=1)
    shape = (-1, *(1,) * (x.dim() - 1))
    span = (high - low).clamp_min(torch.finfo(x.dtype).tiny).view(shape)
    levels = ((channels - low.view(shape)) / span * 255.0).round().to(torch.uint8)
    return levels.expand(-1, 3, *x.shape[2:]).movedim(1, -1).contiguous()


def grey(x: Tensor) -> Tensor:
    """The luma [B, 1, *] of a coloured picture: in an overlay only the map has colour."""
    if x.shape[1] not in (3, 4):
        return x
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return torch.einsum("bc...,c->b...", x[:, :3], weights)[:, None]
