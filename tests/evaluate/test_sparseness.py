"""Sparseness and complexity against the sums of their definitions and Quantus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metrics.sparseness import Complexity, Sparseness
from tests.evaluate import naive_metrics as naive
from tests.models import randn

SHAPES = [(7,), (2, 9), (3, 6, 5), (2, 3, 4, 3)]
PAIRS = [(Sparseness, naive.gini), (Complexity, naive.entropy)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per", ["place", "element"])
@pytest.mark.parametrize(("kind", "slow"), PAIRS)
def test_shares_are_the_loop(shape: tuple[int, ...], per: str, kind: Any, slow: Any) -> None:
    values = randn(4, *shape)
    values[1] = values[1].round()
    seen = values if per == "element" or values.dim() == 2 else values.sum(1)
    layout = {2: "BF", 3: "BCT", 4: "BCHW", 5: "BCDHW"}[values.dim()]
    found = kind(per)(None, values, values, layout=layout)
    np.testing.assert_allclose(
        found.values.numpy(), [slow(one.numpy()) for one in seen], rtol=1e-10
    )
    assert found.parameters == {"per": per}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_are_those_of_quantus(dtype: torch.dtype, channels: int) -> None:
    quantus = pytest.importorskip("quantus")
    values = randn(4, channels, 10, 10).to(dtype)
    common: dict[str, Any] = {
        "normalise": False,
        "disable_warnings": True,
        "display_progressbar": False,
    }
    for ours, theirs in (
        (Sparseness("element"), quantus.Sparseness(**common)),
        (Complexity("element"), quantus.Complexity(**common)),
    ):
        found = ours(None, values, values).values
        y = np.zeros(4, dtype=int)
        expected = theirs(
            model=None, x_batch=values.numpy(), y_batch=y, a_batch=values.numpy().copy()
        )
        # Quantus adds 1e-7 to magnitudes and 1e-12 to shares.
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_ends_of_the_scales() -> None:
    x = torch.zeros(3, 1, 4, 5)
    values = torch.zeros_like(x)
    values[0] = -3.0
    values[1, 0, 2, 2] = 7.0
    gini, entropy = Sparseness()(None, x, values), Complexity()(None, x, values)
    assert gini.values[:2].tolist() == pytest.approx([0.0, 0.95], abs=1e-12)
    assert entropy.values[:2].tolist() == pytest.approx([math.log(20), 0.0], abs=1e-12)
    assert entropy.details["relative"][0].item() == pytest.approx(1.0, abs=1e-12)
    for found in (gini, entropy):
        assert math.isnan(found.values[2])
        assert "1 of 3 maps are zero" in found.caveats[0]
    assert (gini.better, entropy.better) == ("higher", "lower")


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_unit_of_a_map_does_not_matter(scale: float) -> None:
    values = randn(2, 3, 6, 6)
    for metric in (Sparseness(), Complexity()):
        expected = metric(None, values, values).values
        found = metric(None, values, values * scale).values
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_one_place_is_as_sparse_as_it_can_be() -> None:
    x = torch.ones(2, 1)
    assert Sparseness()(None, x, x).values.tolist() == [0.0, 0.0]
    assert Complexity()(None, x, x).values.tolist() == [0.0, 0.0]


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="per must be one of place, element: got 'pixel'"):
        Sparseness(per="pixel")
