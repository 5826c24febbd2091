"""`features=`: forms, numbering, segmentations by name, what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from saliency_fast.engine.features import numbered, read_features
from saliency_fast.errors import InputError, InputTypeError
from tests.models import randn

X, TABLE = randn(2, 3, 4, 6), randn(2, 5)


def test_none_is_every_element() -> None:
    assert read_features(None, (X,)) == ()
    image, table = numbered(None, (X, TABLE))
    assert image.flatten().tolist() == list(range(72))
    assert table.flatten().tolist() == list(range(72, 77))
    assert image.shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    "shape",
    [(), (6,), (4, 6), (4, 1), (3, 1, 1), (1, 4, 6), (1, 1, 4, 6), (2, 1, 1, 1), (2, 3, 4, 6)],
)
def test_numbers_broadcast_and_lose_their_gaps(shape: tuple[int, ...]) -> None:
    given = 7 * (torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)) - 2)
    (found,) = read_features(given, (X,))
    rows = 2 if len(shape) == 4 and shape[0] == 2 else 1
    assert found.shape == (rows, 3, 4, 6)
    assert found.dtype == torch.int64
    known = torch.unique(given)
    wanted = torch.searchsorted(known, given.expand(rows, 3, 4, 6).contiguous())
    assert torch.equal(found, wanted)
    assert int(found.max()) == len(known) - 1


def test_numbers_span_inputs_and_generated_ones_follow() -> None:
    image, table = torch.tensor([-3, 8, 8, 8, -3, 5]), torch.tensor([8, 9, 9, -3, 100])
    found = read_features((image, table), (X, TABLE))
    assert found[0][0, 0, 0].tolist() == [0, 2, 2, 2, 0, 1]
    assert found[1].tolist() == [[2, 3, 3, 0, 4]]
    found = read_features((None, table), (X, TABLE))
    assert found[1].tolist() == [[1, 2, 2, 0, 3]]
    assert found[0].flatten().tolist() == list(range(4, 76))
    found = read_features(("grid:2", table), (X, TABLE))
    assert torch.unique(found[0]).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("shape", "cells"), [((4, 6), (3, 3)), ((7,), (3,)), ((3, 4, 6), (3, 3, 3))]
)
def test_a_grid_has_blocks_of_all_channels(shape: tuple[int, ...], cells: tuple[int, ...]) -> None:
    (found,) = read_features("grid:3", (randn(2, 5, *shape),))
    assert torch.equal(found, found[:, :1].expand_as(found))
    counts = torch.bincount(found[0, 0].flatten())
    assert len(counts) == torch.tensor(cells).prod()
    assert int(counts.max()) <= 2 ** sum(cell == 3 for cell in cells) * int(counts.min())


def test_a_grid_of_a_table() -> None:
    (found,) = read_features("grid:2", (TABLE,))
    assert found.tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 24, 24), (2, 40), (1, 8, 12, 12)])
def test_superpixels_follow_the_edges(shape: tuple[int, ...]) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    x = torch.zeros(2, *shape, dtype=torch.float64)
    half = shape[-1] // 2
    x[0, ..., half:], x[1, ..., :half] = 1.0, 0.7
    (found,) = read_features("slic:4", (x,))
    assert found.shape == x.shape
    assert torch.equal(found, found[:, :1].expand_as(found))
    for one in found:
        left, right = one[..., :half], one[..., half:]
        assert not set(left.unique().tolist()) & set(right.unique().tolist())


def test_without_scikit_image_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(InputError, match=r"pip install 'saliency-fast\[segments\]'"):
        read_features("slic", (X,))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (torch.zeros(6), InputTypeError, r"whole numbers: got torch.float32; use .long\(\)"),
        (torch.zeros(5, dtype=torch.int64), InputError, r"got \[5\], the input is \[2, 3, 4, 6\]"),
        (torch.zeros(1, 1, 1, 1, 6, dtype=torch.int64), InputError, "broadcast to it"),
        (torch.zeros(4, 3, 4, 6, dtype=torch.int64), InputError, "broadcast to it"),
        ("blobs", InputError, "'grid', 'slic'"),
        ("grid:0", InputError, "such as 'grid:8'"),
        ("grid:many", InputError, "such as 'grid:8'"),
        (3.5, InputTypeError, "None, a tensor of whole numbers, a name"),
        ((None, None), InputError, "for each of 1 inputs: got 2"),
    ],
)
def test_what_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_features(given, (X,))


def test_superpixels_of_a_table_are_refused() -> None:
    with pytest.raises(InputError, match="axes behind the channels"):
        read_features("slic", (TABLE,))
