"""Which convolutions of launches without gradients go by Winograd's algorithm."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from saliency_fast.ops.dispatch import forced, native_library
from saliency_fast.ops.winograd import CHANNELS

FILLED = 0.6
"""The share of the tiles' outputs that an image must have."""
WEIGHTS = 1 << 22
"""Elements of transformed weights up to which they stay in the cache that cores share."""
_TILE = 4
_CAPABLE = ("AVX2", "AVX512")


def pays(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether a convolution of float32 images on the CPU is faster by `ops.winograd`.

    Shapes of one image decide, so that the rows of a launch do not, nor any timing.
    """
    if weight.shape[2:] != (3, 3) or groups != 1 or max(*stride, *dilation) > 1:
        return False
    out, channels = weight.shape[:2]
    if out % CHANNELS or channels % CHANNELS or x.shape[1] != channels:
        return False
    if (_TILE + 2) ** 2 * out * channels > WEIGHTS or not built():
        return False
    if any(one is not None and one.dtype != torch.float32 for one in (weight, bias)):
        return False
    sizes = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    tiles = [-(-size // _TILE) for size in sizes]
    filled = sizes[0] * sizes[1] / max(1, tiles[0] * tiles[1] * _TILE**2)
    return min(sizes) > 0 and min(padding) >= 0 and filled >= FILLED


@cache
def built() -> bool:
    """Whether the C++ version runs here, on instructions for which it is made."""
    capable = torch.backends.cpu.get_cpu_capability() in _CAPABLE
    return capable and native_library() is not None and forced() in (None, "native")
