"""The same numbers as Captum, on the same points and the same draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from torch import nn

import saliency_fast as sf
from saliency_fast.ops import philox
from tests.models import SHAPES, Image, Tokens, make, randn
from tests.naive import relative_l2

RULES = {
    "gauss_legendre": "gausslegendre",
    "midpoint": "riemann_middle",
    "left": "riemann_left",
    "right": "riemann_right",
}
# Captum rounds its weights and steps to float32 (about 1e-7 relative).
WEIGHTS_IN_FLOAT32 = 1e-6


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients(kind: type[nn.Module], rule: str) -> None:
    model, x = make(kind), randn(3, *SHAPES[kind])
    baseline = randn(3, *SHAPES[kind], seed=1)
    expected, delta = IntegratedGradients(model).attribute(
        x,
        baseline,
        target=[0, 3, 2],
        n_steps=13,
        method=RULES[rule],
        return_convergence_delta=True,
    )
    method = sf.IntegratedGradients(13, rule)
    found = sf.explain(model, x, target=[0, 3, 2], method=method, baseline=baseline)
    assert relative_l2(found.values, expected) < WEIGHTS_IN_FLOAT32
    torch.testing.assert_close(found.delta, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients(kind: type[nn.Module]) -> None:
    model, x = make(kind), randn(3, *SHAPES[kind])
    signed = Saliency(model).attribute(x, target=1, abs=False)
    found = sf.explain(model, x, target=1, method="gradient")
    assert relative_l2(found.values, signed) < 1e-12
    absolute = Saliency(model).attribute(x, target=1)
    found = sf.explain(model, x, target=1, method=sf.Gradient(absolute=True))
    assert relative_l2(found.values, absolute) < 1e-12
    times_x = InputXGradient(model).attribute(x, target=1).detach()
    found = sf.explain(model, x, target=1, method="input_x_gradient")
    assert relative_l2(found.values, times_x) < 1e-12


@pytest.mark.parametrize("kind", [Image, Tokens])
@pytest.mark.parametrize("variant", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise(kind: type[nn.Module], variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, samples, seed = make(kind), randn(2, *SHAPES[kind]), 6, 5

    def ours(mean: float, deviation: torch.Tensor) -> torch.Tensor:
        """Our draws in Captum's order: all samples of an example together."""
        number = torch.arange(samples).repeat(2)
        noise = philox.normals(torch.full_like(number, seed), number, x[0].numel(), 0)
        return mean + deviation * noise.view(-1, *x.shape[1:])

    monkeypatch.setattr(torch, "normal", ours)
    expected = NoiseTunnel(Saliency(model)).attribute(
        x, nt_type=variant, nt_samples=samples, stdevs=0.25, target=1, abs=False
    )
    # Captum holds the deviation in float32, where a quarter is exact.
    fields = {"samples": samples, "sigma": 0.25, "seed": seed}
    method = {
        "smoothgrad": lambda: sf.SmoothGrad(**fields, antithetic=False),
        "smoothgrad_sq": lambda: sf.SmoothGradSquared(**fields, antithetic=False),
        "vargrad": lambda: sf.VarGrad(**fields),
    }[variant]()
    found = sf.explain(model, x, target=1, method=method)
    # The variance is a difference of squares in Captum, which costs it digits.
    assert relative_l2(found.values, expected) < 1e-10


@pytest.mark.parametrize("kind", [Image, Tokens])
def test_expected_gradients(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, rows = make(kind), randn(1, *SHAPES[kind]), randn(4, *SHAPES[kind], seed=2)
    samples, seed = 8, 5
    number = torch.arange(samples)
    row, alpha = philox.line_draw(torch.full_like(number, seed), number, len(rows))
    monkeypatch.setattr(np.random, "choice", lambda *_: row.numpy())
    monkeypatch.setattr(np.random, "uniform", lambda *_: alpha.numpy())
    expected = GradientShap(model).attribute(x, rows, n_samples=samples, stdevs=0.0, target=1)
    method = sf.ExpectedGradients(samples=samples, seed=seed)
    found = sf.explain(model, x, target=1, method=method, baseline=rows)
    assert relative_l2(found.values, expected) < WEIGHTS_IN_FLOAT32
