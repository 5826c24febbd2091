"""Hessian-vector products and interactions of regions, against autograd's Hessian and the paper."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, ModelError
from saliency_fast.methods.parts.quadrature import gauss_logarithm
from tests import naive_paths as naive
from tests.models import SHAPES, Audio, Image, Multimodal, Tabular, Tokens, Video, make, randn
from tests.naive import relative_l2

FLOAT64 = 1e-12


def numbers(*shape: int, count: int) -> Tensor:
    """Region numbers that belong to no grid."""
    return torch.arange(torch.Size(shape).numel()).mul(5).remainder(count).view(1, *shape)


class TestHessianVectorProduct:
    @pytest.mark.parametrize("kind", [Tabular, Tokens, Audio, Video])
    def test_autograd(self, kind: type[nn.Module]) -> None:
        shape = SHAPES[kind]
        model, x, start = make(kind), randn(2, *shape), randn(2, *shape, seed=3)
        target = [[0, 1], [4, 2]]
        method = sf.HessianVectorProduct()
        found = sf.explain(model, x, target=target, method=method, baseline=start)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for i in range(2):
                for k, c in enumerate(target[i]):
                    _, expected = torch.autograd.functional.hvp(
                        lambda p, c=c: model(p[None])[0, c], x[i], x[i] - start[i]
                    )
                    assert relative_l2(found.values[i, k], expected) < FLOAT64
        assert found.delta is None

    def test_no_second_derivative_is_said(self) -> None:
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        with pytest.warns(UserWarning, match=r"no second derivative .* pass softplus"):
            found = sf.explain(model, randn(1, 7), target=1, method="hessian_vector_product")
        assert not bool(found.values.any())


class TestIntegratedHessians:
    @pytest.mark.parametrize("count", [2, 3, 7])
    def test_the_double_integral(self, count: int) -> None:
        """Int int a b H(ab) da db = int -t ln t H(t) dt, and the same of the gradient."""
        model, x, start = make(Tabular), randn(2, 7), randn(2, 7, seed=3)
        region = numbers(7, count=count)
        method = sf.IntegratedHessians(12)
        for size in (1, 5, None):
            found = sf.explain(
                *(model, x),
                target=[[1, 0], [4, 2]],
                baseline=start,
                method=method,
                features=region,
                points_per_launch=size,
            )
            pairs = found.extras["interactions"]
            assert pairs.shape == (2, 2, count, count)
            for i in range(2):
                for k, c in enumerate([[1, 0], [4, 2]][i]):

                    def score(p: Tensor, c: int = c) -> Tensor:
                        return model(p)[:, c]

                    expected = naive.integrated_hessians(score, x[i], start[i], region[0], 24)
                    # Both rules are exact to rounding on so smooth a model.
                    assert relative_l2(pairs[i, k], expected) < 1e-10

    @pytest.mark.parametrize("kind", [Tabular, Audio, Tokens])
    def test_axioms(self, kind: type[nn.Module]) -> None:
        shape = SHAPES[kind]
        model, x, start = make(kind), randn(2, *shape), randn(2, *shape, seed=3)
        region = torch.cat([numbers(*shape, count=4), numbers(*shape, count=4).flip(1)])
        method = sf.IntegratedHessians(64)
        found = sf.explain(model, x, target=1, baseline=start, method=method, features=region)
        pairs = found.extras["interactions"]
        gain = found.scores - found.baseline_scores
        tight = 1e-6 * gain.abs()
        assert bool(((pairs.sum((1, 2)) - gain).abs() < tight).all())
        assert bool((found.delta.abs() < tight).all())
        assert relative_l2(pairs.mT, pairs) < FLOAT64
        # A region's values are what it makes with all others and alone.
        by_region = torch.zeros(2, 4).double()
        by_region.scatter_add_(1, region.flatten(1), found.values.flatten(1))
        assert relative_l2(by_region, pairs.sum(2)) < 1e-10
        straight = sf.IntegratedGradients(200, "gauss_legendre")
        ig = sf.explain(model, x, target=1, baseline=start, method=straight)
        assert relative_l2(found.values, ig.values) < 1e-5

    def test_a_product_of_two_features(self) -> None:
        x, start = randn(3, 4), randn(3, 4, seed=1)

        def model(z: Tensor) -> Tensor:
            return z[:, 0] * z[:, 1] + 2 * z[:, 2]

        found = sf.explain(model, x, baseline=start, method=sf.IntegratedHessians(2))
        way = x - start
        pairs = torch.zeros(3, 4, 4).double()
        # H is 1 at (0, 1); -t ln t integrates to 1/4, -ln t (s + t d) to s + d / 4.
        pairs[:, 0, 1] = pairs[:, 1, 0] = way[:, 0] * way[:, 1] / 4
        pairs[:, 0, 0] = way[:, 0] * (start[:, 1] + way[:, 1] / 4)
        pairs[:, 1, 1] = way[:, 1] * (start[:, 0] + way[:, 0] / 4)
        pairs[:, 2, 2] = 2 * way[:, 2]
        assert relative_l2(found.extras["interactions"], pairs) < FLOAT64

    def test_several_inputs(self) -> None:
        model, x = make(Multimodal), (randn(1, 3, 12, 12), randn(1, 7, seed=1))
        features = (numbers(3, 12, 12, count=3), numbers(7, count=2) + 3)
        # The image's part has kinks; its product with the table is smooth in the table.
        found = sf.explain(
            lambda a, b: model(a.tanh(), b),
            x,
            target=1,
            method=sf.IntegratedHessians(16),
            features=features,
        )
        pairs = found.extras["interactions"]
        assert pairs.shape == (1, 5, 5)
        assert relative_l2(pairs.mT, pairs) < FLOAT64
        assert float(pairs[0, :3, 3:].abs().max()) > 0

    def test_linear_models_have_no_interactions(self) -> None:
        model, x = nn.Linear(5, 3).double(), randn(2, 5)
        found = sf.explain(model, x, target=1, method="integrated_hessians")
        pairs = found.extras["interactions"]
        assert relative_l2(pairs, torch.diag_embed(x * model.weight[1].detach())) < FLOAT64

    def test_relu_needs_softplus(self) -> None:
        x = randn(2, 7)
        model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)).double()
        with pytest.raises(ModelError, match=r"no second derivative .* pass softplus=10"):
            sf.explain(model, x, target=1, method=sf.IntegratedHessians(8))
        found = sf.explain(model, x, target=1, method=sf.IntegratedHessians(64, softplus=10.0))

        def smooth(z: Tensor) -> Tensor:
            return model[2](nn.functional.softplus(model[0](z), 10.0))

        other = sf.explain(smooth, x, target=1, method=sf.IntegratedHessians(64))
        assert relative_l2(found.extras["interactions"], other.extras["interactions"]) < FLOAT64
        assert bool((found.delta.abs() < 1e-3 * (found.scores - found.baseline_scores).abs()).all())
        torch.testing.assert_close(found.scores, smooth(x)[:, 1].detach())

    def test_too_many_regions(self) -> None:
        with pytest.raises(InputError, match="interactions of 432 regions are too many"):
            sf.explain(make(Image), randn(1, 3, 12, 12), target=1, method="integrated_hessians")
        with pytest.raises(InputError, match="steps must be at most 256"):
            sf.IntegratedHessians(300)


@pytest.mark.parametrize("n", [1, 2, 7, 32, 64, 256])
def test_gauss_for_a_logarithm(n: int) -> None:
    """Exact for polynomials up to degree 2n - 1: the integral of -t^p ln t is 1 / (p + 1)^2."""
    nodes, weights = gauss_logarithm(n)
    assert all(a < b for a, b in pairwise(nodes))
    assert nodes[0] > 0
    assert nodes[-1] < 1
    assert weights.min() > 0
    for power in range(2 * n):
        exact = 1 / (power + 1) ** 2
        assert float(weights @ nodes**power) == pytest.approx(exact, rel=1e-12)


class Masked(nn.Module):
    """Attention with a mask, and work in place on the input."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        mask = None if self.causal else torch.ones(5, 5, dtype=torch.bool).tril()
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, x.sin(), x, mask, is_causal=self.causal).square().sum((1, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_work_in_place(causal: bool) -> None:
    model, x = Masked(causal), randn(2, 5, 4)
    kept = x.clone()
    found = sf.explain(model, x, method=sf.HessianVectorProduct())
    assert torch.equal(x, kept)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for i in range(2):
            _, expected = torch.autograd.functional.hvp(
                lambda p: model(p[None] * 1.0)[0], x[i], x[i]
            )
            assert relative_l2(found.values[i], expected) < FLOAT64
