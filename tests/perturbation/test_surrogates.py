"""LIME and Kernel SHAP against normal equations on the same coalitions, and their errors."""

from __future__ import annotations

import sys
from typing import Any

import captum.attr
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnRidge
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.ops import philox
from tests.models import SHAPES, Image, Multimodal, make, randn
from tests.naive import relative_l2
from tests.perturbation import naive_perturbation as naive

NINE = torch.arange(12)[:, None] // 4 * 3 + torch.arange(12) // 4


def coalitions(samples: int, features: int, seed: int) -> Tensor:
    rows = [naive.words(seed, n, features, philox.COALITION) >= 2**31 for n in range(samples)]
    return torch.stack(rows)


def answers(model: nn.Module, x: Tensor, fill: Tensor, table: Tensor, target: int) -> Tensor:
    with torch.no_grad():
        rows = [model(torch.where(one[NINE], x, fill))[0, target] for one in table]
    return torch.stack(rows)


def far(kind: str, z: Tensor, x: Tensor, fill: Tensor) -> Tensor:
    """The distance of each coalition, from its point where that is asked for."""
    if kind == "features":
        whole = torch.ones(z.shape[1], dtype=torch.float64)
        return torch.stack([1 - torch.cosine_similarity(row, whole, 0, eps=1e-300) for row in z])
    points = [torch.where(row.bool()[NINE], x, fill).flatten() for row in z]
    if kind == "cosine":
        return torch.stack([1 - torch.cosine_similarity(p, x.flatten(), 0) for p in points])
    return torch.stack([(p - x.flatten()).norm() for p in points])


@pytest.mark.parametrize(
    ("distance", "width"), [("features", 0.25), ("cosine", 0.5), ("euclidean", 12.0)]
)
@pytest.mark.parametrize("seed", [2, (2, 5)])
def test_lime_by_ridge(distance: str, width: float, seed: Any) -> None:
    model, x, fill = make(Image), randn(2, *SHAPES[Image]), randn(1, *SHAPES[Image], seed=1)
    method = sf.Lime(80, width, distance, alpha=0.3, seed=seed)
    found = sf.explain(
        model, x, target=1, method=method, baseline=fill, features=NINE, points_per_launch=11
    )
    for row in range(2):
        table = coalitions(80, 9, seed if isinstance(seed, int) else seed[row])
        y = answers(model, x[row : row + 1], fill, table, 1)
        z = table.double()
        weight = torch.exp(-(far(distance, z, x[row], fill[0]) ** 2) / (2 * width**2))
        slopes = naive.ridge(z, y, weight, 0.3)
        assert relative_l2(found.extras["features"][row], slopes) < 1e-10
        assert relative_l2(found.values[row], slopes[NINE].expand(3, 12, 12)) < 1e-10
    assert found.delta is None


@pytest.mark.parametrize("how", ["lasso", "ridge"])
def test_lime_like_captum(how: str) -> None:
    """The same coalitions through Captum, whose tables are in float32."""
    model, x = make(Image), randn(1, *SHAPES[Image])
    table = coalitions(120, 9, 7)

    def ours(_: Tensor, **__: Any) -> Any:
        yield from (row[None].long() for row in table)

    kind = {"lasso": SkLearnLasso(alpha=1e-4), "ridge": SkLearnRidge(alpha=1e-4)}[how]
    lime = captum.attr.Lime(model, interpretable_model=kind, perturb_func=ours)
    theirs = lime.attribute(x, target=1, feature_mask=NINE[None, None], n_samples=120)
    method = sf.Lime(120, 1.0, "cosine", how, 1e-4, seed=7)
    found = sf.explain(model, x, target=1, method=method, features=NINE)
    assert float(theirs.abs().max()) > 1e-3
    # The lasso stops at a tolerance of its own, on other roundings.
    assert relative_l2(found.values, theirs) < (1e-4 if how == "lasso" else 1e-5)


def test_lime_of_several_inputs_and_targets() -> None:
    model, x = make(Multimodal), (randn(2, *SHAPES[Image]), randn(2, 7))
    features = (NINE, torch.arange(7) + 9)
    targets = torch.tensor([[0, 4], [1, 3]])
    method = sf.Lime(60, 0.5, "euclidean")
    found = sf.explain(model, x, target=targets, method=method, features=features)
    for place in range(2):
        alone = sf.explain(model, x, target=targets[:, place], method=method, features=features)
        for values, other in zip(found.values, alone.values, strict=True):
            assert relative_l2(values[:, place], other) < 1e-12


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seed", [2, (2, 5)])
def test_kernel_shap(paired: bool, seed: Any) -> None:
    model, x, fill = make(Image), randn(2, *SHAPES[Image]), randn(1, *SHAPES[Image], seed=1)
    found = sf.explain(
        model, x, target=1, method=sf.KernelShap(100, paired, seed), baseline=fill, features=NINE
    )
    for row in range(2):
        key = seed if isinstance(seed, int) else seed[row]
        table = torch.zeros(100, 9, dtype=torch.bool)
        for number in range(100):
            table[number, list(naive.kernel_coalition(key, number, 9, paired))] = True
        y = answers(model, x[row : row + 1], fill, table, 1)
        with torch.no_grad():
            none = float(model(fill)[0, 1])
            gain = float(model(x[row : row + 1])[0, 1]) - none
        expected = naive.kernel_shap(table.double(), y, none, gain)
        assert relative_l2(found.extras["features"][row], expected) < 1e-10
    assert float(found.delta.abs().max()) < 1e-12
    assert found.points.tolist() == [100, 100]


@pytest.mark.parametrize("paired", [True, False])
def test_kernel_shap_errs_as_much_as_it_says(paired: bool) -> None:
    model, x = make(Image), randn(4, *SHAPES[Image])
    exact = sf.explain(model, x, target=1, method="shapley_values", features=NINE)
    errors, gaps = [], []
    for seed in range(10):
        method = sf.KernelShap(200, paired, seed)
        found = sf.explain(model, x, target=1, method=method, features=NINE)
        gap = (found.values - exact.values).flatten(1).norm(dim=1)
        errors.append(found.error.square())
        gaps.append((gap / exact.values.flatten(1).norm(dim=1)).square())
    ratio = (torch.stack(errors).mean(0) / torch.stack(gaps).mean(0)).sqrt()
    assert bool(((ratio > 0.5) & (ratio < 2.0)).all()), ratio


def test_lime_errs_as_much_as_it_says() -> None:
    model, x = make(Image), randn(3, *SHAPES[Image])
    most = sf.explain(model, x, target=1, method=sf.Lime(20_000, alpha=1e-6), features=NINE)
    errors, gaps = [], []
    for seed in range(1, 9):
        method = sf.Lime(200, alpha=1e-6, seed=seed)
        found = sf.explain(model, x, target=1, method=method, features=NINE)
        gap = (found.values - most.values).flatten(1).norm(dim=1)
        errors.append(found.error.square())
        gaps.append((gap / most.values.flatten(1).norm(dim=1)).square())
    ratio = (torch.stack(errors).mean(0) / torch.stack(gaps).mean(0)).sqrt()
    assert bool(((ratio > 0.5) & (ratio < 2.0)).all()), ratio


def test_fewer_samples_than_slopes_have_no_known_error() -> None:
    model, x = make(Image), randn(1, *SHAPES[Image])
    found = sf.explain(model, x, target=1, method=sf.Lime(9), features=NINE)
    assert bool(found.error.isnan().all())
    assert bool(found.values.isfinite().all())


@pytest.mark.parametrize("how", ["ridge", "lasso", "linear"])
def test_weights_that_are_all_zero_are_refused(how: str) -> None:
    lime = sf.Lime(samples=40, distance="euclidean", fit=how)
    with pytest.raises(InputError, match="pass a larger kernel_width"):
        sf.explain(nn.Flatten(), 40.0 + torch.rand(1, 3, 8, 8), target=1, method=lime)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(Image), randn(1, *SHAPES[Image])
    with pytest.raises(InputError, match="more samples than features: got 300 for 432"):
        sf.explain(model, x, target=1, method=sf.KernelShap(300))
    with pytest.raises(InputError, match="samples must be at least 2"):
        sf.KernelShap(1)
    with pytest.raises(InputError, match="fit must be one of ridge, lasso, linear"):
        sf.Lime(fit="tree")
    with pytest.raises(InputError, match="distance must be one of features, cosine, euclidean"):
        sf.Lime(distance="far")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"pip install 'saliency-fast\[surrogates\]'"):
        sf.explain(model, x, target=1, method=sf.Lime(20, fit="lasso"), features=NINE)
