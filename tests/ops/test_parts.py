"""Windows, segments, masks and ranks against loops over single elements, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.ops import OPS
from saliency_fast.ops.dispatch import forced, native_library

VERSIONS = ("dispatched", "reference")
each_version = pytest.mark.parametrize("version", VERSIONS)
native = pytest.mark.skipif(
    native_library() is None or forced() not in (None, "native"),
    reason="the C++ CPU ops are not built or SALIENCY_FAST_BACKEND forces another backend",
)


def of(name: str, version: str):
    return OPS[name] if version == "dispatched" else OPS[name].reference


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (1000 * torch.randn(shape, generator=generator)).to(dtype)


@each_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (2, 3, 1, 2, 3)], ids=str)
def test_windows_one_element_at_a_time(version: str, dtype: torch.dtype, size) -> None:
    x, fill = numbers((2, *size), dtype), -numbers((2, *size), dtype)
    boxes = torch.tensor(list(itertools.product([(-1, 1), (0, 9), (1, 2)], repeat=len(size))))
    boxes = torch.cat([boxes, torch.tensor([[(1, 1)] * len(size), [(9, 0)] * len(size)])])
    item = torch.arange(len(boxes)) % 2
    start, stop = boxes.unbind(2)
    for fills in (fill, fill[:1]):
        found = of("window_points", version)(x, fills, item, start, stop)
        for row, example in enumerate(item.tolist()):
            for place in itertools.product(*map(range, size)):
                at = torch.tensor(place)
                hidden = bool((at >= start[row]).all() and (at < stop[row]).all())
                source = fills[example % len(fills)] if hidden else x[example]
                assert found[(row, *place)] == source[place]


@each_version
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_segments_one_element_at_a_time(version: str, dtype: torch.dtype, shared: bool) -> None:
    x, fill = numbers((2, 3, 2, 5), dtype), -numbers((2, 3, 2, 5), dtype)
    segment = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 3, 3], [3, 2, 1, 0, 3, 2, 1, 0, 3, 2]])
    present = torch.tensor([[True, False, True, False], [False, True, True, True]])
    item, place = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    if shared:
        fill, segment = fill[:1], segment[:1]
    found = of("segment_points", version)(x, fill, segment, present, item, place).flatten(1)
    for row, (example, coalition) in enumerate(zip(item, place, strict=True)):
        for e in range(30):
            kept = present[coalition, segment[example % len(segment), e % 10]]
            source = x[example] if kept else fill[example % len(fill)]
            assert found[row, e] == source.flatten()[e]


@each_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_one_element_at_a_time(version: str, dtype: torch.dtype) -> None:
    x, fill = numbers((2, 3, 2, 5), dtype) / 1e3, -numbers((2, 3, 2, 5), dtype) / 2e3
    mask = torch.rand(3, 10).to(dtype)
    mask[0, 0], mask[0, 1] = 0, 1
    item, place = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 2, 1, 1])
    found = of("mask_points", version)(x, fill, mask, item, place).flatten(1)
    eps = torch.finfo(dtype).eps
    for row, (example, m) in enumerate(zip(item.tolist(), place.tolist(), strict=True)):
        for e in range(30):
            share = mask[m, e % 10].item()
            seen, hidden = x[example].flatten()[e].item(), fill[example].flatten()[e].item()
            want = (1 - share) * hidden + share * seen
            # Three roundings of numbers that are no larger than these.
            assert abs(found[row, e].item() - want) <= 2 * eps * (abs(seen) + abs(hidden))


@each_version
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.float16, torch.uint8, torch.bool]
)
def test_ranks_one_element_at_a_time(version: str, dtype: torch.dtype, shared: bool) -> None:
    x, fill = numbers((2, 3, 2, 5), dtype), numbers((2, 3, 2, 5), dtype).flip(0, 2, 3)
    rank = torch.tensor([[3, 1, 4, 0, 5, 9, 2, 6, 8, 7], [0, 0, 1, 1, -2, 9, 7, 2**31 - 1, 4, 4]])
    rank = rank.int()
    count = torch.tensor([0, 1, 5, 10, 99, 2**31 - 1, 2**31, 2**62, -1, -(2**31) - 1, -(2**62)])
    item = torch.arange(len(count)).repeat(2) // len(count)
    count = count.repeat(2)
    if shared:
        fill, rank = fill[:1], rank[1:]
    found = of("rank_points", version)(x, fill, rank, item, count).flatten(1)
    assert found.dtype == dtype
    for row, (example, steps) in enumerate(zip(item.tolist(), count.tolist(), strict=True)):
        for e in range(30):
            replaced = rank[example % len(rank), e % 10].item() < steps
            source = fill[example % len(fill)] if replaced else x[example]
            assert found[row, e] == source.flatten()[e]


def test_insertion_is_deletion_with_both_ends_exchanged() -> None:
    x, fill, rank = numbers((1, 3, 5), torch.float32), torch.zeros(1, 3, 5), torch.randperm(5)
    count, item = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    rank = rank.int()[None]
    deleted = ops.rank_points(x, fill, rank, item, count)
    inserted = ops.rank_points(fill, x, rank, item, count)
    assert torch.equal(deleted + inserted, x.expand(6, 3, 5))
    assert torch.equal(deleted[0], x[0])
    assert torch.equal(deleted[-1], fill[0])


def test_not_a_number_is_hidden_and_kept() -> None:
    """Selection copies: what is replaced does not matter, what is kept stays."""
    x, fill = torch.tensor([[torch.nan, 1.0]]), torch.tensor([[0.0, torch.inf]])
    item, start, stop = torch.tensor([0, 0]), torch.tensor([[0], [1]]), torch.tensor([[1], [2]])
    found = ops.window_points(x, fill, item, start, stop)
    assert found.nan_to_num(9.0, posinf=8.0).tolist() == [[0.0, 1.0], [9.0, 8.0]]
    segment, present = torch.tensor([[0, 1]]), torch.tensor([[False, True], [True, False]])
    parts = ops.segment_points(x, fill, segment, present, item, torch.tensor([0, 1]))
    assert torch.equal(parts.nan_to_num(9.0), found.nan_to_num(9.0))
    rank, count = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([1, 0])
    steps = ops.rank_points(x, fill, rank, item, count)
    assert steps.nan_to_num(9.0).tolist() == [[0.0, 1.0], [9.0, 1.0]]


@native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_masks_are_rounded_once(dtype: torch.dtype) -> None:
    x, fill = torch.randn(2, 2, 3, 7).to(dtype)
    item, place, mask = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), torch.rand(3, 7)
    got = ops.mask_points(x, fill, mask, item, place)
    want = ops.mask_points(x.double(), fill.double(), mask.double(), item, place)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


_X, _ITEM = torch.zeros(2, 3, 4), torch.tensor([0, 1])
_CORNER, _SEGMENT = torch.zeros(2, 2).long(), torch.zeros(1, 4).long()
_PRESENT, _MASK = torch.ones(2, 3).bool(), torch.ones(2, 4)
_RANK = torch.zeros(2, 4).int()


@native
@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        ("window_points", (_X, _X[:, :1], _ITEM, _CORNER, _CORNER), RuntimeError, "rows of fill"),
        ("window_points", (_X, _X.double(), _ITEM, _CORNER, _CORNER), RuntimeError, "type of x"),
        (
            "window_points",
            (_X, _X[:0], _ITEM, _CORNER, _CORNER),
            RuntimeError,
            "fill must have one",
        ),
        ("window_points", (_X, _X, _ITEM + 1, _CORNER, _CORNER), IndexError, "item must lie"),
        (
            "window_points",
            (_X, _X, _ITEM, _CORNER[:, :1], _CORNER),
            RuntimeError,
            r"start must be \[2, 2\]: got \[2, 1\]",
        ),
        ("window_points", (_X, _X, _ITEM, _CORNER, _CORNER.int()), RuntimeError, "stop must be"),
        (
            "window_points",
            (_X[:, 0, 0], _X[:, 0, 0], _ITEM, _CORNER[:, :0], _CORNER[:, :0]),
            RuntimeError,
            "1 to 5 axes behind the batch",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT + 3, _PRESENT, _ITEM, _ITEM),
            IndexError,
            r"segment must lie in \[0, 3\): got 3",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT - 1, _PRESENT, _ITEM, _ITEM),
            IndexError,
            r"segment must lie in \[0, 3\): got -1",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT[:, :3].repeat(1, 3), _PRESENT, _ITEM, _ITEM),
            RuntimeError,
            "an example of 12 elements a multiple of P: got",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT.repeat(3, 1), _PRESENT, _ITEM, _ITEM),
            RuntimeError,
            "one row or those of x",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT, _PRESENT.float(), _ITEM, _ITEM),
            RuntimeError,
            "present must be bool",
        ),
        (
            "segment_points",
            (_X, _X, _SEGMENT, _PRESENT, _ITEM, _ITEM + 1),
            IndexError,
            r"place must lie in \[0, 2\): got 2",
        ),
        ("mask_points", (_X.long(), _X.long(), _MASK, _ITEM, _ITEM), RuntimeError, "x must be"),
        ("mask_points", (_X, _X, _MASK > 0, _ITEM, _ITEM), RuntimeError, "mask must be floating"),
        (
            "mask_points",
            (_X, _X, _MASK[0], _ITEM, _ITEM),
            RuntimeError,
            r"mask must be \[rows, P\]",
        ),
        ("rank_points", (_X, _X, _RANK.long(), _ITEM, _ITEM), RuntimeError, "rank must be int32"),
        ("rank_points", (_X, _X, _RANK, _ITEM, _ITEM.int()), RuntimeError, "count must be int64"),
        ("rank_points", (_X, _X, _RANK, _ITEM.int(), _ITEM), RuntimeError, "item must be int64"),
        ("rank_points", (_X, _X, _RANK, _ITEM + 1, _ITEM), IndexError, "item must lie in"),
        (
            "rank_points",
            (_X, _X, _RANK, _ITEM, _ITEM[:1]),
            RuntimeError,
            r"count must be \[2\]: got \[1\]",
        ),
        (
            "rank_points",
            (_X, _X, _RANK[:, :0], _ITEM, _ITEM),
            RuntimeError,
            r"rank must be \[rows, P\], an example of 12 elements a multiple of P: got \[2, 0\]",
        ),
        (
            "rank_points",
            (_X, _X, _RANK.repeat(2, 1), _ITEM, _ITEM),
            RuntimeError,
            "rank must have one row or those of x",
        ),
        ("rank_points", (_X, _X.double(), _RANK, _ITEM, _ITEM), RuntimeError, "type of x"),
        (
            "rank_points",
            (_X.to(torch.complex128),) * 2 + (_RANK, _ITEM, _ITEM),
            RuntimeError,
            "elements of 1 to 8 bytes",
        ),
    ],
)
def test_errors_say_what_was_wrong(name: str, args, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OPS[name](*args)
