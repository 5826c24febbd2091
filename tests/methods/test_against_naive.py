"""Every method against the naive float64 loop of `tests/naive.py`, on models of every rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from tests import models, naive
from tests.models import SHAPES, make, randn

RULES = ("midpoint", "trapezoid", "gauss_legendre", "left", "right")
# Rounding of a sum of some dozen float64 terms, with room for the model's own conditioning.
FLOAT64, FLOAT32 = 1e-12, 1e-5


def column(k: int):
    return lambda output: output[:, k]


def check(found: Tensor, expected: list[Tensor], tolerance: float = FLOAT64) -> None:
    assert found.shape[0] == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert naive.relative_l2(one, other[0]) < tolerance


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients(kind: type[nn.Module], rule: str) -> None:
    model, x = make(kind), randn(3, *SHAPES[kind])
    baseline = randn(3, *SHAPES[kind], seed=1)
    method = sf.IntegratedGradients(steps=9, rule=rule)
    found = sf.explain(model, x, target=[1, 4, 0], method=method, baseline=baseline)
    expected = [
        naive.integrated_gradients(
            model, column(k), (x[i : i + 1],), (baseline[i : i + 1],), rule, 9
        )[0]
        for i, k in enumerate([1, 4, 0])
    ]
    check(found.values, expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients(kind: type[nn.Module]) -> None:
    model, x = make(kind), randn(3, *SHAPES[kind])
    expected = [naive.gradient(model, column(2), (x[i : i + 1],))[0] for i in range(3)]
    explain = partial(sf.explain, model, x, target=2)
    check(explain(method="gradient").values, expected)
    check(explain(method=sf.Gradient(absolute=True)).values, [one.abs() for one in expected])
    times_x = [one * x[i : i + 1] for i, one in enumerate(expected)]
    check(explain(method="input_x_gradient").values, times_x)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("antithetic", [False, True])
def test_smoothgrad_family(kind: type[nn.Module], antithetic: bool) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind])
    explain = partial(sf.explain, model, x, target=3)
    every = []
    for i in range(2):
        sigma = 0.2 * float(x[i].max() - x[i].min())
        drawn = naive.noisy_gradients(
            model, column(3), (x[i : i + 1],), [sigma], 7, seed=11, antithetic=antithetic
        )
        every.append(torch.stack([one[0] for one in drawn]))
    fields = {"samples": 7, "noise_level": 0.2, "seed": 11}
    smooth = sf.SmoothGrad(**fields, antithetic=antithetic)
    check(explain(method=smooth).values, [one.mean(0) for one in every])
    squared = sf.SmoothGradSquared(**fields, antithetic=antithetic)
    check(explain(method=squared).values, [one.square().mean(0) for one in every])
    if not antithetic:
        found = explain(method=sf.VarGrad(**fields)).values
        check(found, [one.var(0, correction=0) for one in every])


def test_smoothgrad_sigma_is_absolute_and_seeds_may_differ_per_example() -> None:
    model, x = make(models.Image), randn(3, 3, 12, 12)
    seeds = (5, -7, 2**40)
    method = sf.SmoothGrad(samples=4, sigma=0.3, seed=seeds)
    found = sf.explain(model, x, target=1, method=method)
    expected = []
    for i, seed in enumerate(seeds):
        drawn = naive.noisy_gradients(model, column(1), (x[i : i + 1],), [0.3], 4, seed, True)
        expected.append(torch.stack([one[0] for one in drawn]).mean(0))
    check(found.values, expected)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_expected_gradients(kind: type[nn.Module], noise: float) -> None:
    model, x, rows = make(kind), randn(2, *SHAPES[kind]), randn(5, *SHAPES[kind], seed=3)
    method = sf.ExpectedGradients(samples=9, noise_level=noise, seed=4)
    found = sf.explain(model, x, target=0, method=method, baseline=rows)
    expected = []
    for i in range(2):
        sigma = [noise * float(x[i].max() - x[i].min())]
        one = (x[i : i + 1],)
        expected.append(naive.expected_gradients(model, column(0), one, (rows,), 9, 4, sigma)[0])
    check(found.values, expected)
    gain = model(x)[:, 0] - model(rows)[:, 0].mean()
    torch.testing.assert_close(found.delta, found.values.flatten(1).sum(1) - gain)


@pytest.mark.parametrize(
    "method",
    [
        sf.IntegratedGradients(steps=6),
        sf.SmoothGrad(samples=6, noise_level=0.1, seed=2),
        sf.ExpectedGradients(samples=6, noise_level=0.1, seed=2),
    ],
    ids=lambda method: method.name,
)
def test_tuples_of_inputs(method: object) -> None:
    model = make(models.Multimodal)
    x = (randn(2, 3, 12, 12), randn(2, 7, seed=1))
    start = (randn(2, 3, 12, 12, seed=2), randn(2, 7, seed=3))
    baseline = None if isinstance(method, sf.SmoothGrad) else start
    found = sf.explain(model, x, target=4, method=method, baseline=baseline)
    assert isinstance(found.values, tuple)
    for i in range(2):
        one = tuple(part[i : i + 1] for part in x)
        sigma = [0.1 * float(part.max() - part.min()) for part in one]
        if isinstance(method, sf.IntegratedGradients):
            origin = tuple(part[i : i + 1] for part in start)
            expected = naive.integrated_gradients(model, column(4), one, origin, "midpoint", 6)
        elif isinstance(method, sf.SmoothGrad):
            drawn = naive.noisy_gradients(model, column(4), one, sigma, 6, 2, True)
            expected = tuple(torch.stack(parts).mean(0) for parts in zip(*drawn, strict=True))
        else:
            expected = naive.expected_gradients(model, column(4), one, start, 6, 2, sigma)
        for part, other in zip(found.values, expected, strict=True):
            assert naive.relative_l2(part[i : i + 1], other) < FLOAT64


@pytest.mark.parametrize("kind", SHAPES)
def test_float32(kind: type[nn.Module]) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind]).float()
    exact = naive.integrated_gradients(
        model, column(1), (x.double(),), (torch.zeros_like(x).double(),), "midpoint", 20
    )[0]
    found = sf.explain(model.float(), x, target=1, method=sf.IntegratedGradients(20, "midpoint"))
    assert found.values.dtype == torch.float32
    assert naive.relative_l2(found.values, exact) < FLOAT32
