"""Shapley values: all orders, all coalitions, random orders, and what their errors say."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.features import read_features
from saliency_fast.errors import InputError
from tests.models import SHAPES, Image, Multimodal, Tabular, make, randn
from tests.naive import relative_l2
from tests.perturbation import naive_perturbation as naive

SIX = torch.arange(12)[:, None] // 4 * 2 + torch.arange(12) // 6


def slow_values(
    model: nn.Module, x: tuple[Tensor, ...], fill: Any, features: Any, target: int
) -> list[Tensor]:
    rows = []
    for row in range(len(x[0])):
        own = tuple(one[row % len(one)][None] for one in features)
        part = tuple(one[row : row + 1] for one in x)
        start = tuple(torch.full_like(one, fill) for one in part)
        with torch.no_grad():
            values = naive.shapley(lambda *p: model(*p)[0, target], part, start, own)
        rows.append(naive.spread(values, own))
    return [torch.cat(one) for one in zip(*rows, strict=True)]


@pytest.mark.parametrize("method", [sf.ShapleyValues(), sf.ShapleySampling(50), sf.KernelShap(128)])
def test_all_coalitions_are_all_orders(method: Any) -> None:
    """Exact where all coalitions are asked for, whichever method does."""
    model, x = make(Tabular), randn(2, 7)
    expected = slow_values(model, (x,), 0.3, (torch.arange(7)[None],), 1)
    found = sf.explain(model, x, target=1, method=method, baseline=0.3)
    assert relative_l2(found.values, expected[0]) < 1e-10
    assert float(found.delta.abs().max()) < 1e-12
    assert float(found.error.max()) == 0.0
    assert found.points.tolist() == [126, 126]


def test_like_captum() -> None:
    model, x, groups = make(Tabular), randn(2, 7), torch.arange(7) % 5
    found = sf.explain(model, x, target=1, method="shapley_values", baseline=0.3, features=groups)
    theirs = captum.attr.ShapleyValues(model).attribute(x, 0.3, 1, feature_mask=groups[None])
    # Captum adds up in float32.
    assert relative_l2(found.values, theirs) < 1e-5


def test_groups_of_several_inputs_and_targets() -> None:
    model, x = make(Multimodal), (randn(2, *SHAPES[Image]), randn(2, *SHAPES[Tabular]))
    features = (SIX % 4, torch.tensor([4, 4, 0, 3, 3, 5, 5]))
    targets = torch.tensor([[0, 3], [0, 3]])
    found = sf.explain(model, x, target=targets, method="shapley_values", features=features)
    for place, target in enumerate((0, 3)):
        slow = slow_values(model, x, 0.0, read_features(features, x), target)
        for values, other in zip(found.values, slow, strict=True):
            assert relative_l2(values[:, place], other) < 1e-10
    assert float(found.delta.abs().max()) < 1e-12


def test_segments_of_each_example() -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    features = torch.stack([SIX, SIX.T // 2])[:, None]
    slow = slow_values(model, (x,), 0.0, read_features(features, (x,)), 1)[0]
    found = sf.explain(model, x, target=1, method="shapley_values", features=features)
    assert relative_l2(found.values, slow) < 1e-10


def test_one_feature_is_the_gain() -> None:
    model, x = make(Tabular), randn(2, 7)
    one = torch.zeros(7, dtype=torch.int64)
    for method in ("shapley_values", "shapley_sampling", "kernel_shap"):
        found = sf.explain(model, x, target=1, method=method, features=one)
        gain = found.scores - found.baseline_scores
        torch.testing.assert_close(found.values, gain[:, None].expand(2, 7))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("orders", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", [4, (4, 11)])
def test_random_orders(antithetic: bool, orders: int, seed: Any) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    features = torch.arange(144).view(12, 12) // 12
    method = sf.ShapleySampling(orders, antithetic, seed)
    found = sf.explain(model, x, target=2, method=method, features=features, points_per_launch=9)
    own = features.expand(1, 3, 12, 12)
    for row in range(2):
        key = seed if isinstance(seed, int) else seed[row]
        walks = [naive.order(key, number, 12, antithetic) for number in range(orders)]
        part = (x[row : row + 1],)
        with torch.no_grad():
            values = naive.walk(
                lambda p: model(p)[0, 2], part, (torch.zeros_like(part[0]),), (own,), walks
            )
        assert relative_l2(found.values[row], naive.spread(values, (own,))[0][0]) < 1e-10
    assert float(found.delta.abs().max()) < 1e-12
    assert found.points.tolist() == [orders * 11] * 2
    assert bool(found.error.isnan().all()) == (orders <= (2 if antithetic else 1))


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_error_is_about_the_distance_to_the_exact_values(antithetic: bool) -> None:
    model, x = make(Image), randn(6, *SHAPES[Image])
    features = torch.arange(144).view(12, 12) // 12
    exact = sf.explain(model, x, target=2, method="shapley_values", features=features)
    errors, gaps = [], []
    for seed in range(8):
        method = sf.ShapleySampling(24, antithetic, seed)
        found = sf.explain(model, x, target=2, method=method, features=features)
        gap = (found.values - exact.values).flatten(1).norm(dim=1)
        errors.append(found.error.square())
        gaps.append((gap / exact.values.flatten(1).norm(dim=1)).square())
    ratio = (torch.stack(errors).mean(0) / torch.stack(gaps).mean(0)).sqrt()
    # Both are means over eight seeds of sums over twelve features.
    assert bool(((ratio > 0.5) & (ratio < 2.0)).all()), ratio


def test_what_is_refused() -> None:
    model, x = make(Image), randn(1, *SHAPES[Image])
    with pytest.raises(InputError, match="got 432 features, expected at most 20"):
        sf.explain(model, x, target=1, method="shapley_values")
    with pytest.raises(InputError, match="permutations must be at least 1"):
        sf.ShapleySampling(0)
