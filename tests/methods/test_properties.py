"""Random small networks, shapes, rules and launches, against the naive loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import saliency_fast as sf
from saliency_fast.methods.parts.quadrature import RULES
from tests import naive
from tests.models import randn

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, torch.Tensor, int]:
    """(model, inputs, baselines, target) with none to three axes behind the channels."""
    axes, batch = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    channels, hidden, classes = draw(st.tuples(*[st.integers(1, 4)] * 3))
    seed = draw(st.integers(0, 2**20))
    activation = ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]
    shape = (batch, channels, *draw(st.tuples(*[st.integers(3, 6)] * axes)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if axes:
            first: list[nn.Module] = [
                CONVOLUTIONS[axes](channels, hidden, 3, padding=draw(st.integers(0, 1))),
                activation(),
                POOLS[axes](2),
                nn.Flatten(),
            ]
        else:
            first = [nn.Linear(channels, hidden), activation()]
        model = nn.Sequential(*first, nn.Linear(hidden * 2**axes, classes)).double()
    x, baseline = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    return model, x, baseline, draw(st.integers(0, classes - 1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Against the scale of the input too: a dead network's map is zero, and so is its rounding.
    gap = float((found - expected).norm())
    assert gap <= 1e-11 * (float(expected.norm()) + 1e-3)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(sorted(RULES)), st.integers(2, 9), st.integers(1, 30))
def test_integrated_gradients(case: tuple, rule: str, steps: int, size: int) -> None:
    model, x, baseline, target = case
    method = sf.IntegratedGradients(steps, rule)
    found = sf.explain(
        model, x, target=target, method=method, baseline=baseline, points_per_launch=size
    )
    expected = naive.integrated_gradients(
        model, lambda y: y[:, target], (x,), (baseline,), rule, steps
    )
    close(found.values, expected[0])


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 9), st.booleans(), st.integers(1, 30), st.integers(0, 2**62))
def test_smoothgrad(case: tuple, samples: int, antithetic: bool, size: int, seed: int) -> None:
    model, x, _, target = case
    method = sf.SmoothGrad(samples, sigma=0.3, seed=seed, antithetic=antithetic)
    found = sf.explain(model, x, target=target, method=method, points_per_launch=size)
    for i in range(len(x)):
        drawn = naive.noisy_gradients(
            model, lambda y: y[:, target], (x[i : i + 1],), [0.3], samples, seed, antithetic
        )
        close(found.values[i : i + 1], torch.stack([one[0] for one in drawn]).mean(0))
