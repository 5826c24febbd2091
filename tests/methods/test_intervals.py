"""How certain each pixel of a noisy method is: standard errors, intervals, and their coverage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import GradientShap
from scipy import stats
from torch import Tensor

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.methods.sampling import GROUPS, student
from saliency_fast.ops import philox
from tests import naive
from tests.models import Image, Multimodal, Tabular, make, randn
from tests.naive import relative_l2

FLOAT64 = 1e-12


def drawn(model: Callable, x: Tensor, k: int, sigma: float, n: int, seed: int, pairs: bool):
    """The gradients of all samples of one example [n, *]."""
    found = naive.noisy_gradients(model, lambda y: y[:, k], (x[None],), [sigma], n, seed, pairs)
    return torch.stack([one[0][0] for one in found])


def uniform(z: Tensor) -> Tensor:
    """Its derivative is uniform on (-1, 1) for normal z."""
    return z * torch.erf(z / 2**0.5) + (2 / torch.pi) ** 0.5 * torch.exp(-(z**2) / 2)


DRAWS = {
    # A function of normal noise, the variance of its derivative, and what intervals cover at least.
    "normal": (lambda z: z**2 / 2, 1.0, 0.93),
    "uniform": (uniform, 1 / 3, 0.93),
    "skewed": (lambda z: z**3 / 3, 2.0, 0.85),
    "a kink": (lambda z: z.relu(), 0.25, 0.90),
}


class TestSmoothGrad:
    @pytest.mark.parametrize("pairs", [False, True])
    @pytest.mark.parametrize("samples", [32, 27])
    def test_standard_error(self, pairs: bool, samples: int) -> None:
        model, x = make(Image), randn(2, 3, 12, 12)
        fields = {"samples": samples, "sigma": 0.4, "seed": 5, "antithetic": pairs}
        method = sf.SmoothGrad(**fields, standard_error=True)
        plain = sf.explain(model, x, target=3, method=sf.SmoothGrad(**fields))
        for size in (3, None):
            found = sf.explain(model, x, target=3, method=method, points_per_launch=size)
            assert relative_l2(found.values, plain.values) < FLOAT64
            for i in range(2):
                every = drawn(model, x[i], 3, 0.4, samples, 5, pairs)
                number = torch.arange(samples) // (2 if pairs else 1) % GROUPS
                mean, square = every.mean(0), 0.0
                for group in range(GROUPS):
                    own = every[number == group]
                    square = square + (len(own) / samples * (own.mean(0) - mean)) ** 2
                expected = (square * GROUPS / (GROUPS - 1)).sqrt()
                assert relative_l2(found.extras["standard_error"][i], expected) < FLOAT64
                whole = expected.norm() / mean.norm()
                torch.testing.assert_close(found.error[i], whole, rtol=1e-10, atol=0)

    def test_several_targets_and_inputs(self) -> None:
        model, x = make(Multimodal), (randn(2, 3, 12, 12), randn(2, 7, seed=1))
        method = sf.SmoothGrad(16, seed=2, standard_error=True)
        found = sf.explain(model, x, target=[[0, 1], [2, 3]], method=method)
        assert found.extras["standard_error.0"].shape == (2, 2, 3, 12, 12)
        assert found.extras["standard_error.1"].shape == (2, 2, 7)
        alone = sf.explain(model, x, target=[1, 3], method=method)
        for part, other in zip(found.values, alone.values, strict=True):
            assert relative_l2(part[:, 1], other) < FLOAT64

    @pytest.mark.parametrize("name", DRAWS)
    def test_coverage(self, name: str) -> None:
        """Of the mean by Student's intervals from the standard error, over 2000 pixels."""
        of, mean = DRAWS[name][0], {"skewed": 1.0, "a kink": 0.5}.get(name, 0.0)
        x = torch.zeros(1, 2000).double()
        fields = {"sigma": 1.0, "seed": 3, "antithetic": False, "standard_error": True}
        found = sf.explain(lambda z: of(z).sum(1), x, method=sf.SmoothGrad(64, **fields))
        reach = student(0.95, GROUPS - 1) * found.extras["standard_error"]
        covered = float(((found.values - mean).abs() <= reach).double().mean())
        assert 0.92 < covered < 0.97

    def test_shared_noise(self) -> None:
        x = randn(2, 3, 4, 5)
        method = sf.SmoothGrad(6, sigma=0.3, seed=9, shared_axis=2, antithetic=False)
        found = sf.explain(lambda z: (z**3).flatten(1).sum(1), x, method=method)
        total = 0.0
        for sample in range(6):
            rows = torch.tensor([9]), torch.tensor([sample])
            noise = philox.normals(*rows, 15, 0).view(1, 3, 1, 5)
            total = total + 3 * (x + 0.3 * noise) ** 2 / 6
        assert relative_l2(found.values, total) < FLOAT64
        with pytest.raises(InputError, match="shared_axis must be an axis behind the batch"):
            sf.explain(make(Tabular), randn(1, 7), target=0, method=sf.SmoothGrad(shared_axis=2))


class TestVarGrad:
    @pytest.mark.parametrize("samples", [32, 37])
    def test_the_jackknife(self, samples: int) -> None:
        model, x = make(Image), randn(2, 3, 12, 12)
        fields = {"samples": samples, "sigma": 0.4, "seed": 5}
        plain = sf.explain(model, x, target=3, method=sf.VarGrad(**fields))
        method = sf.VarGrad(**fields, confidence=0.9)
        for size in (3, None):
            found = sf.explain(model, x, target=3, method=method, points_per_launch=size)
            assert relative_l2(found.values, plain.values) < FLOAT64
            for i in range(2):
                every = drawn(model, x[i], 3, 0.4, samples, 5, False)
                number = torch.arange(samples) % GROUPS
                whole = every.var(0).log()
                left = [every[number != group].var(0).log() for group in range(GROUPS)]
                pseudo = torch.stack([GROUPS * whole - (GROUPS - 1) * one for one in left])
                wide = stats.t.ppf(0.95, GROUPS - 1) * (pseudo.var(0) / GROUPS).sqrt()
                low, high = (pseudo.mean(0) + sign * wide for sign in (-1, 1))
                # Deleting a group is undone by a subtraction, which costs digits of a variance.
                assert relative_l2(found.extras["interval_low"][i], low.exp()) < 1e-9
                assert relative_l2(found.extras["interval_high"][i], high.exp()) < 1e-9

    @pytest.mark.parametrize("name", DRAWS)
    @pytest.mark.parametrize("samples", [64, 256])
    def test_coverage(self, name: str, samples: int) -> None:
        """Of 95 % intervals, over 2000 independent pixels."""
        of, variance, least = DRAWS[name]
        x = torch.zeros(1, 2000).double()
        method = sf.VarGrad(samples, sigma=1.0, seed=3, confidence=0.95)
        found = sf.explain(lambda z: of(z).sum(1), x, method=method)
        low, high = found.extras["interval_low"], found.extras["interval_high"]
        covered = float(((low <= variance) & (variance <= high)).double().mean())
        # Three standard deviations of 2000 pixels are .015.
        assert least - 0.015 < covered < 0.995

    def test_constant_gradients_are_certain(self) -> None:
        found = sf.explain(lambda z: z.sum(1), randn(1, 4), method=sf.VarGrad(16, confidence=0.95))
        assert not bool(found.values.any())
        assert not bool(found.extras["interval_high"].any())

    def test_the_plan_counts_what_groups_hold(self) -> None:
        model, x = make(Image), randn(2, 3, 12, 12)
        map_bytes = x.nbytes
        for method, least in (
            (sf.SmoothGrad(32, standard_error=True), GROUPS),
            (sf.VarGrad(32, confidence=0.95), 2 * GROUPS),
        ):
            assert sf.Engine(model, method).plan(x, 1).fixed_bytes >= least * map_bytes

    def test_fields(self) -> None:
        with pytest.raises(InputError, match="samples must be at least 16"):
            sf.VarGrad(8, confidence=0.95)
        with pytest.raises(InputError, match="confidence is a probability under 1"):
            sf.VarGrad(confidence=95)


@pytest.mark.parametrize("freedom", [1, 3, 7, 15])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_students_distribution(confidence: float, freedom: int) -> None:
    expected = stats.t.ppf(0.5 + confidence / 2, freedom)
    assert student(confidence, freedom) == pytest.approx(expected, rel=1e-11)


class TestGradientShap:
    def test_captum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x, rows = make(Image), randn(1, 3, 12, 12), randn(4, 3, 12, 12, seed=2)
        number = torch.arange(5)
        row, alpha = philox.line_draw(torch.zeros_like(number), number, len(rows))

        def ours(mean: float, deviation: Tensor) -> Tensor:
            noise = philox.normals(torch.zeros_like(number), number, x[0].numel(), 0)
            return mean + deviation * noise.view(-1, *x.shape[1:])

        monkeypatch.setattr(torch, "normal", ours)
        monkeypatch.setattr(np.random, "choice", lambda *_: row.numpy())
        monkeypatch.setattr(np.random, "uniform", lambda *_: alpha.numpy())
        for sigma in (0.0, 0.25):
            expected = GradientShap(model).attribute(x, rows, stdevs=sigma, target=1)
            method = sf.GradientShap(sigma=sigma)
            found = sf.explain(model, x, target=1, method=method, baseline=rows)
            # Captum draws alphas in float32.
            assert relative_l2(found.values, expected) < 1e-6

    def test_it_is_expected_gradients(self) -> None:
        model, x, rows = make(Image), randn(2, 3, 12, 12), randn(4, 3, 12, 12, seed=2)
        one = sf.explain(model, x, target=1, method=sf.GradientShap(9, seed=4), baseline=rows)
        same = sf.ExpectedGradients(9, seed=4)
        other = sf.explain(model, x, target=1, method=same, baseline=rows)
        assert torch.equal(one.values, other.values)
