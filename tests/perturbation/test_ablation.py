"""FeatureAblation and FeaturePermutation against loops and against Captum."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.features import numbered, read_features
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.perturbation import permutations
from tests.models import SHAPES, Image, Multimodal, Tabular, make, randn
from tests.naive import relative_l2
from tests.perturbation import naive_perturbation as naive

GRID = torch.arange(12)[:, None] // 4 * 3 + torch.arange(12) // 4


def slow_ablation(model: nn.Module, x: Any, fill: Any, features: Any, target: int) -> list[Tensor]:
    """Row by row, per input."""
    rows = []
    for row in range(len(x[0])):
        own = tuple(one[row % len(one)][None] for one in features)
        start = tuple(one[row % len(one)][None] for one in fill)
        part = tuple(one[row : row + 1] for one in x)
        with torch.no_grad():
            values = naive.ablation(lambda *p: model(*p)[0, target], part, start, own)
        rows.append(naive.spread(values, own))
    return [torch.cat(one) for one in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("fill", [1, 2])
def test_every_element(kind: type[nn.Module], fill: int) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind])
    baseline = randn(fill, *SHAPES[kind], seed=3)
    found = sf.explain(model, x, target=1, method="feature_ablation", baseline=baseline)
    theirs = captum.attr.FeatureAblation(model).attribute(
        x, baseline, target=1, perturbations_per_eval=64
    )
    assert relative_l2(found.values, theirs) < 1e-12
    if x[0].numel() < 100:
        slow = slow_ablation(model, (x,), (baseline,), numbered(None, (x,)), 1)
        assert relative_l2(found.values, slow[0]) < 1e-12
    assert found.points.tolist() == [x[0].numel()] * 2
    assert found.delta is None


@pytest.mark.parametrize(
    "features",
    [
        GRID,
        -5 * GRID,
        GRID[None, None],
        torch.arange(3)[:, None, None],
        torch.stack([GRID, GRID // 3])[:, None],
    ],
    ids=["grid", "negative", "deep", "channels", "per example"],
)
def test_groups(features: Tensor) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    own = read_features(features, (x,))
    slow = slow_ablation(model, (x,), (torch.zeros_like(x),), own, 2)[0]
    found = sf.explain(model, x, target=2, method="feature_ablation", features=features)
    assert relative_l2(found.values, slow) < 1e-12
    # Groups that an example does not have cost it nothing.
    assert found.points.tolist() == [len(own[0][row % len(own[0])].unique()) for row in range(2)]
    assert found.extras["features"].shape == (2, int(own[0].max()) + 1)


def test_groups_span_inputs() -> None:
    model, x = make(Multimodal), (randn(2, *SHAPES[Image]), randn(2, *SHAPES[Tabular]))
    features = (GRID, torch.arange(7) * 2)
    slow = slow_ablation(
        model, x, tuple(torch.full_like(one, 0.5) for one in x), read_features(features, x), 0
    )
    found = sf.explain(
        model, x, target=0, method="feature_ablation", features=features, baseline=0.5
    )
    theirs = captum.attr.FeatureAblation(model).attribute(
        x, (0.5, 0.5), target=0, feature_mask=(GRID[None, None], features[1][None])
    )
    for ours, other, captums in zip(found.values, slow, theirs, strict=True):
        assert relative_l2(ours, other) < 1e-12
        assert relative_l2(ours, captums) < 1e-12


def test_several_targets_and_baselines() -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    targets = torch.tensor([[0, 4], [1, 3]])
    both: dict[str, Any] = {"method": "feature_ablation", "features": GRID}
    found = sf.explain(model, x, target=targets, baseline=[0.0, "blur"], **both)
    for place in range(2):
        alone = [
            sf.explain(model, x, target=targets[:, place], baseline=one, **both).values
            for one in (0.0, "blur")
        ]
        assert relative_l2(found.values[:, place], sum(alone) / 2) < 1e-12


def test_integers_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(11, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()
    ids = torch.arange(12).view(2, 6) % 11
    found = sf.explain(model, ids, target=1, method="feature_ablation", baseline=4)
    theirs = captum.attr.FeatureAblation(model).attribute(ids, 4, target=1)
    assert relative_l2(found.values, theirs) < 1e-12


def test_permutations_are_seeded_and_move_something() -> None:
    first = permutations(torch.arange(50), 3, seed=4)
    assert torch.equal(first[7:], permutations(torch.arange(7, 50), 3, seed=4))
    assert not torch.equal(first, permutations(torch.arange(50), 3, seed=5))
    assert torch.equal(first.sort(dim=1).values, torch.arange(3).expand(50, 3))
    assert not bool((first == torch.arange(3)).all(1).any())
    # All five others come about.
    assert len(torch.unique(first, dim=0)) == 5


@pytest.mark.parametrize("repeats", [1, 3])
def test_permutation(repeats: int) -> None:
    model, x = make(Tabular), randn(4, *SHAPES[Tabular])
    features = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    method = sf.FeaturePermutation(repeats, seed=9)
    found = sf.explain(model, x, target=1, method=method, features=features, points_per_launch=3)
    slow = torch.zeros(repeats, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for number in range(repeats * 4):
            order = permutations(torch.tensor([number]), 4, 9)[0]
            point = torch.where(features == number % 4, x[order], x)
            slow[number // 4, :, number % 4] = (model(x) - model(point))[:, 1]
    mean = slow.mean(0)
    assert relative_l2(found.extras["features"], mean) < 1e-12
    assert relative_l2(found.values, mean[:, features]) < 1e-12
    if repeats == 1:
        assert bool(found.error.isnan().all())
    else:
        spread = slow.std(0)[:, features] / repeats**0.5
        expected = spread.norm(dim=1) / found.values.norm(dim=1)
        torch.testing.assert_close(found.error, expected, rtol=1e-10, atol=0.0)


def test_what_permutation_refuses() -> None:
    with pytest.raises(InputError, match="got 1 example, expected 2 or more"):
        sf.explain(make(Tabular), randn(1, 7), target=1, method="feature_permutation")
    with pytest.raises(InputError, match="repeats must be at least 1"):
        sf.FeaturePermutation(0)
    with pytest.raises(InputTypeError, match="one int, since examples are permuted together"):
        sf.FeaturePermutation(seed=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="compares with nothing"):
        sf.explain(make(Tabular), randn(2, 7), target=1, method="feature_permutation", baseline=1.0)
