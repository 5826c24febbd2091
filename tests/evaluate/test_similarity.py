"""Similarity of maps against SciPy and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr
from skimage.metrics import structural_similarity

from saliency_fast.errors import InputError
from saliency_fast.evaluate.maps import (
    correlation,
    largest,
    overlap,
    rank_correlation,
    ranks,
    ssim,
)
from tests.evaluate import naive_metrics as naive
from tests.models import randn

SHAPES = [(30,), (9, 8), (3, 7, 8), (8, 7, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(shape: tuple[int, ...], ties: bool) -> None:
    a, b = randn(4, *shape), randn(4, *shape, seed=1)
    b = b + 0.5 * a
    if ties:
        a, b = a.round(), b.round()
    for row in range(4):
        one, other = a[row].numpy().ravel(), b[row].numpy().ravel()
        assert ranks(a)[row].numpy().ravel() == pytest.approx(rankdata(one), abs=0)
        expected = pearsonr(one, other).statistic, spearmanr(one, other).statistic
        assert float(correlation(a, b)[row]) == pytest.approx(expected[0], abs=1e-12)
        assert float(rank_correlation(a, b)[row]) == pytest.approx(expected[1], abs=1e-12)


@pytest.mark.parametrize("shape", [(30,), (7,), (9, 8), (7, 20), (8, 7, 9)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_structure_is_that_of_scikit_image(shape: tuple[int, ...], scale: float) -> None:
    a = randn(3, *shape)
    b = a + 0.5 * randn(3, *shape, seed=1)
    found = ssim(a * scale, b)
    for row in range(3):
        one, other = (x[row].numpy() / np.abs(x[row].numpy()).max() for x in (a, b))
        span = max(one.max(), other.max()) - min(one.min(), other.min())
        expected = structural_similarity(one, other, data_range=span, win_size=7)
        # Variances are differences of squares near 1: some digits go.
        assert float(found[row]) == pytest.approx(expected, abs=1e-10)


def test_short_axes_take_smaller_windows() -> None:
    a = randn(2, 3, 4)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    found = ssim(a, a + 0.1 * randn(2, 3, 4, seed=1))
    assert bool((found < 1).all())
    one = ssim(randn(2, 1, 1), randn(2, 1, 1, seed=1))
    assert bool(one.isnan().all())


def test_structure_needs_one_to_three_axes() -> None:
    with pytest.raises(InputError, match="SSIM is of maps with one to three axes"):
        ssim(randn(2), randn(2))
    with pytest.raises(InputError, match="SSIM is of maps with one to three axes"):
        ssim(randn(1, 2, 2, 2, 2), randn(1, 2, 2, 2, 2))


def test_the_unit_of_a_map_does_not_matter() -> None:
    a, b = randn(3, 12, 12), randn(3, 12, 12, seed=1)
    for compare in (ssim, correlation, rank_correlation):
        torch.testing.assert_close(compare(a * 1e-150, b * 1e120), compare(a, b), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8, 9, 13, 21, 64])
def test_constant_maps_say_nothing(dtype: torch.dtype, size: int) -> None:
    a = randn(3, size, size).to(dtype)
    flat = torch.full_like(a, 0.1)
    for compare in (correlation, rank_correlation, ssim):
        for pair in ((a, flat), (flat, a), (flat, flat)):
            assert bool(compare(*pair).isnan().all()), compare.__name__


def test_equal_and_opposite_maps_are_at_the_ends() -> None:
    a = randn(3, 8, 8).float()
    for compare in (correlation, rank_correlation):
        torch.testing.assert_close(compare(a, a), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(compare(a, -a), -torch.ones(3, dtype=torch.float64))
    monotone = a.double().exp()
    torch.testing.assert_close(rank_correlation(a, monotone), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_overlap_is_the_loop(share: float) -> None:
    a, b = randn(4, 6, 7).round(), randn(4, 6, 7, seed=1)
    found = overlap(a, b, share)
    for row in range(4):
        expected = naive.iou_of_top(a[row].numpy(), b[row].numpy(), share)
        assert float(found[row]) == pytest.approx(expected, abs=1e-15)
    count = max(1, round(share * 42))
    assert largest(a, share).flatten(1).sum(1).tolist() == [count] * 4


def test_signed_zeros_are_one_number() -> None:
    a = torch.tensor([[0.0, -0.0, 1.0]])
    assert ranks(a).tolist() == [[1.5, 1.5, 3.0]]
    assert math.isnan(float(rank_correlation(a[:, :2], a[:, 1:])))
