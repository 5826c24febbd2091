"""Segments: points that keep some parts of an example and take the others from elsewhere.

Segments and masks number the last P elements of an example; an example of more has a multiple of
P, and its leading axes (channels) repeat them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saliency_fast.ops.points import fake_points
from saliency_fast.ops.registry import Sample, define


def repeated(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [R, P] along the elements of points like x: [R, *]."""
    numel = x[0].numel()
    return rows.repeat(1, numel // rows.shape[1]).view(-1, *x.shape[1:])


def _segments(
    x: Tensor, fill: Tensor, segment: Tensor, present: Tensor, example: Tensor, coalition: Tensor
) -> Tensor:
    kept = present[coalition].gather(1, segment[example % len(segment)])
    return torch.where(repeated(kept, x), x[example], fill[example % len(fill)]).contiguous()


SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    # shape of x, elements that are numbered
    ((1, 1), 1),
    ((3, 7), 7),
    ((2, 3, 5, 9), 45),
    ((2, 3, 5, 9), 135),
    ((2, 6, 1), 2),
    ((2, 4099), 4099),
    ((2, 2, 2053), 2053),
)
_CHOSEN = (0, 3, 1, 3, 2, 0, 1)


def _segment_samples() -> Iterator[Sample]:
    coalition = torch.tensor(_CHOSEN)
    for dtype in (torch.float32, torch.float64, torch.int64):
        for shape, positions in SHAPES:
            x = (100 * torch.randn(shape)).to(dtype)
            example = torch.arange(len(coalition)) % len(x)
            features = min(positions, 11)
            segment = torch.randint(0, features, (len(x), positions))
            present = torch.rand(4, features) < 0.5
            yield Sample((x, -x, segment, present, example, coalition))
            yield Sample((x, -x[:1], segment[:1], present, example, coalition))
    x = torch.randn(2, 5, 8, 3).permute(0, 3, 1, 2)
    segment = (torch.arange(80).view(40, 2).T) // 7
    present = (torch.rand(12, 4) < 0.5).T
    example, coalition = torch.tensor([1, 0, 1]), torch.tensor([2, 3, 0])
    yield Sample((x, x.flip(2), segment, present, example, coalition))
    half = torch.randn(2, 3, 40).bfloat16()
    yield Sample((half, -half, segment, present, example, coalition))
    bits = torch.randint(0, 256, (2, 3, 40), dtype=torch.uint8)
    yield Sample((bits, ~bits, segment, present, example, coalition))


segment_points = define(
    schema="segment_points(Tensor x, Tensor fill, Tensor segment, Tensor present,"
    " Tensor example, Tensor coalition) -> Tensor",
    reference=_segments,
    fake=fake_points(4),
    samples=_segment_samples,
    triton="segments",
)
"""segment_points(x [B, *], fill [B | 1, *], segment int64 [B | 1, P], present bool [M, F], example,
coalition int64 [R]) -> [R, *]: element e of row r is that of example[r] where the segment of e % P
is present in coalition[r], else the fill's, as feature ablation, LIME (Ribeiro, 2016) and Shapley
values (Lundberg and Lee, 2017) ask for. Segments lie in [0, F). x and fill have one type, of any
kind: elements are copied."""


def _masks(x: Tensor, fill: Tensor, mask: Tensor, example: Tensor, number: Tensor) -> Tensor:
    base = fill[example % len(fill)]
    kept = repeated(mask[number].to(x.dtype), x)
    return (base + kept * (x[example] - base)).contiguous()


def _mask_samples() -> Iterator[Sample]:
    number = torch.tensor(_CHOSEN)
    for dtype in (torch.float32, torch.float64):
        for shape, positions in SHAPES:
            x = torch.randn(shape, dtype=dtype)
            example = torch.arange(len(number)) % len(x)
            mask = torch.rand(4, positions, dtype=dtype)
            yield Sample((x, x.flip(0) / 2, mask, example, number))
            yield Sample((x, 0 * x[:1], mask.double(), example, number))
    x = torch.randn(2, 5, 8, 3).permute(0, 3, 1, 2)
    example, number = torch.tensor([1, 0, 1]), torch.tensor([2, 3, 0])
    yield Sample((x, x.flip(2), torch.rand(40, 4).T, example, number))


mask_points = define(
    schema="mask_points(Tensor x, Tensor fill, Tensor mask, Tensor example, Tensor number)"
    " -> Tensor",
    reference=_masks,
    fake=fake_points(3),
    samples=_mask_samples,
    triton="segments",
)
"""mask_points(x [B, *], fill [B | 1, *], mask floating [M, P], example, number int64 [R]) ->
[R, *]: fill + mask[number[r], e % P] * (x - fill) at element e of example[r], seen through a smooth
mask, as in RISE (Petsiuk, 2018) and Score-CAM (Wang, 2020)."""
