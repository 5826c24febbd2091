"""Class activation maps: a layer's channels, weighted, summed and resized to the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define


def _written_in(activations: Tensor) -> torch.dtype:
    """Maps of half types are float32."""
    return torch.float64 if activations.dtype == torch.float64 else torch.float32


def _resized(maps: Tensor, axis: int, size: int) -> Tensor:
    """One axis resized; positions are counted in halves, so that shares are rounded once."""
    many, position = maps.shape[axis], torch.arange(size, device=maps.device)
    halves = ((2 * position + 1) * many - size).clamp(min=0)
    low = halves // (2 * size)
    share = (halves % (2 * size)).to(maps.dtype) / (2 * size)
    first = maps.index_select(axis, low)
    second = maps.index_select(axis, (low + 1).clamp(max=many - 1))
    return first + share.view(-1, *(1,) * (maps.dim() - axis - 1)) * (second - first)


def _cam(activations: Tensor, weights: Tensor, size: Sequence[int], rectify: bool) -> Tensor:
    weights = weights.view(*weights.shape, *(1,) * (activations.dim() - weights.dim()))
    total = (weights.double() * activations.double()).sum(1)
    if rectify:
        total = total.relu()
    for axis, many in enumerate(size, 1):
        total = _resized(total, axis, many)
    return total.to(_written_in(activations)).contiguous()


def _fake(activations: Tensor, weights: Tensor, size: Sequence[int], rectify: bool) -> Tensor:
    return activations.new_empty((len(activations), *size), dtype=_written_in(activations))


def _samples() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64):
        for shape, size in (
            ((1, 1, 1), (1,)),
            ((2, 5, 9), (31,)),
            ((1, 3, 1040), (77,)),
            ((2, 131, 7, 13), (33, 57)),
            ((1, 6, 5, 4), (5, 4)),
            ((2, 3, 14, 9), (5, 30)),
            ((1, 2, 2, 3, 4), (5, 9, 7)),
            ((2, 7, 5, 1, 3), (4, 6, 1)),
        ):
            activations = torch.randn(shape, dtype=dtype)
            weights = torch.randn(shape[:2], dtype=dtype)
            yield Sample((activations, weights, size, True))
            weights = torch.randn(shape, dtype=dtype)
            yield Sample((activations, weights, size, False))
    activations = torch.randn(2, 5, 6, 37).permute(0, 3, 2, 1)
    weights = torch.randn(37, 2).T
    yield Sample((activations, weights, (11, 10), True))
    yield Sample((activations.bfloat16(), weights, (11, 10), False))
    yield Sample((activations.half(), weights.half(), (11, 10), True))


cam = define(
    schema="cam(Tensor activations, Tensor weights, int[] size, bool rectify) -> Tensor",
    reference=_cam,
    fake=_fake,
    samples=_samples,
    triton="cam",
)
"""cam(activations [B, C, *s], weights [B, C] or [B, C, *s], size, rectify) -> [B, *size]: the
channels' weighted sum over 1 to 3 spatial axes, its negative part cut off where `rectify`, resized
linearly as `torch.nn.functional.interpolate` does with align_corners=False (Selvaraju, 2017).
Sums are float64; maps of half types are float32."""
