"""As many segments as were asked for, about, or an error: whatever the input looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.engine.features import ABOUT, segment
from saliency_fast.errors import InputError
from tests.models import randn


def disc(size: int) -> Tensor:
    places = torch.linspace(-1, 1, size, dtype=torch.float64)
    inside = (places[:, None] ** 2 + places**2 < 0.3).double()
    return inside.expand(1, 3, size, size)


def smooth(*shape: int) -> Tensor:
    return functional.interpolate(randn(1, 3, 4, 4), shape, mode="bicubic")


PICTURES = {
    "noise": randn(1, 3, 48, 40),
    "one channel of noise": randn(1, 1, 40, 48),
    "many channels of noise": randn(1, 6, 30, 30),
    "flat": torch.full((1, 3, 40, 40), 0.3),
    "black": torch.zeros(1, 1, 40, 40),
    "clean disc": disc(64),
    "speckled disc": (disc(64) + 0.3 * randn(1, 3, 64, 64)).clamp(0, 1),
    "tiny": torch.rand(1, 3, 12, 14),
    "stripes": (torch.arange(48) % 2).double().expand(1, 3, 40, 48),
    "smooth": smooth(60, 40),
    "large values": 1e6 * randn(1, 3, 40, 40),
    "narrow": randn(1, 3, 8, 90),
    "volume": randn(1, 1, 12, 14, 16),
    "flat volume": torch.zeros(1, 2, 12, 14, 16),
    "series": randn(1, 3, 200),
    "flat series": torch.zeros(1, 1, 200),
}


@pytest.mark.parametrize("count", [1, 5, 12, 30, 70])
@pytest.mark.parametrize("name", PICTURES)
def test_superpixels(name: str, count: int) -> None:
    pytest.importorskip("skimage")
    if (name, count) == ("tiny", 70):
        # Segments of two pixels: from so many of 168 no compactness makes 70.
        with pytest.raises(InputError, match=r"'slic:70' makes \d+ to \d+ segments"):
            segment(PICTURES[name], "slic", count)
        return
    found = segment(PICTURES[name], "slic", count)
    assert abs(len(found.unique()) - count) <= ABOUT * count
    assert len(segment(PICTURES[name], "slic", None).unique()) >= 30


def test_more_segments_than_places() -> None:
    pytest.importorskip("skimage")
    x = randn(1, 3, 5, 5)
    with pytest.raises(InputError, match=r"'slic:40' asks for more segments than .* got 25"):
        segment(x, "slic", 40)
    assert len(segment(x, "slic", None).unique()) <= 25


@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (2, 3, 20), (2, 1, 5, 9, 7)])
def test_grids(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    for count in (1, 2, 5):
        assert len(segment(x, "grid", count).unique()) == count ** (len(shape) - 2)
    shortest = min(shape[2:])
    with pytest.raises(InputError, match=rf"shortest axis has {shortest} places: use 'grid:"):
        sf.explain(
            lambda x: x.flatten(1).sum(1),
            x,
            method="feature_ablation",
            features=f"grid:{shortest + 1}",
            layout={3: "BCT", 4: "BCHW", 5: "BCDHW"}[len(shape)],
        )
    cells = [min(8, size) for size in shape[2:]]
    assert len(segment(x, "grid", None).unique()) == int(torch.tensor(cells).prod())
