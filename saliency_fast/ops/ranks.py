"""Ranks: points of which the elements that come first in a ranking are taken from elsewhere.

A ranking numbers the last P elements of an example as segments do (ops/segments.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saliency_fast.ops.points import fake_points
from saliency_fast.ops.registry import Sample, define
from saliency_fast.ops.segments import SHAPES, repeated


def _ranks(x: Tensor, fill: Tensor, rank: Tensor, example: Tensor, count: Tensor) -> Tensor:
    replaced = rank[example % len(rank)] < count[:, None]
    return torch.where(repeated(replaced, x), fill[example % len(fill)], x[example]).contiguous()


def _counts(positions: int) -> Tensor:
    """None, one, some, all but one and all of P positions, and numbers that no rank reaches."""
    some = [0, 1, positions // 2, positions - 1, positions, positions + 1, -1]
    return torch.tensor([*some, 2**31 - 1, 2**31, 2**40, -(2**31), -(2**31) - 1, -(2**40)])


def _rankings(rows: int, positions: int) -> Tensor:
    """P ranks in any order, one order a row."""
    return torch.rand(rows, positions).argsort(1).int()


def _samples() -> Iterator[Sample]:
    kinds = (torch.float32, torch.float64, torch.int64, torch.float16, torch.uint8)
    for dtype in kinds:
        for shape, positions in SHAPES:
            x = (100 * torch.randn(shape)).to(dtype)
            rank, count = _rankings(len(x), positions), _counts(positions)
            example = torch.arange(len(count)) % len(x)
            yield Sample((x, x.flip(0) + 1, rank, example, count))
            yield Sample((x, x[:1] + 1, rank[:1], example, count))
    x, rank = torch.randn(2, 5, 8, 3).permute(0, 3, 1, 2), torch.rand(40, 2).argsort(0).int().T
    example, count = torch.tensor([1, 0, 1, 1]), torch.tensor([17, 40, 23, -1])
    yield Sample((x, x.flip(2), rank, example, count))
    last = torch.randn(2, 3, 5, 8).contiguous(memory_format=torch.channels_last)
    yield Sample((last, -last[:1], rank, example, count))
    half = torch.randn(2, 3, 40).bfloat16()
    yield Sample((half, -half, rank, example, count))
    ends = torch.tensor([[-(2**31), -1, 0, 0, 2**31 - 1]], dtype=torch.int32)
    count, x = _counts(5), torch.randn(3, 2, 5)
    yield Sample((x, -x, ends, torch.arange(len(count)) % 3, count))
    example, count = torch.arange(201) % 3, torch.arange(201) * 11
    yield Sample((*torch.randn(2, 3, 2, 2053), _rankings(3, 2053), example, count))


rank_points = define(
    schema="rank_points(Tensor x, Tensor fill, Tensor rank, Tensor example, Tensor count)"
    " -> Tensor",
    reference=_ranks,
    fake=fake_points(3),
    samples=_samples,
    triton="ranks",
)
"""rank_points(x [B, *], fill [B | 1, *], rank int32 [B | 1, P], example, count int64 [R]) ->
[R, *]: element e of row r is the fill's where the rank of e % P is below count[r], else that of
example[r]: the steps of a deletion curve, and of an insertion curve where x and fill change places
(Petsiuk, 2018). Ranks and counts are any numbers, count may lie outside of [0, P]. x and fill have
one type, of any kind: elements are copied."""
