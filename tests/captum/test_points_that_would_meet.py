"""Models that look at their whole batch: no point, sample or step of a call sees another one.

The batch itself is explained as it is called, as in Captum; what a method makes of it, points of a
path, noisy samples, perturbed batches, must each be what it is alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.captum.test_facade_gradients import agree
from tests.models import randn


class Centred(nn.Module):
    """Statistics of the whole input."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean()) / (1 + x.std())


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().max())


class Shares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(0)


class Branch(nn.Module):
    """A branch on a statistic."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3 if float(x.sum()) > 0 else x.square()


def unset() -> nn.Module:
    return nn.BatchNorm1d(7, affine=False, track_running_stats=False)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "centred": Centred,
    "largest": Largest,
    "shares": Shares,
    "branch": Branch,
    "norm": unset,
}


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(KINDS[kind](), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return found.double()


# With the arguments by which Captum has one batch in a call.
METHODS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "Saliency": ({}, lambda _: {}),
    "InputXGradient": ({}, lambda _: {}),
    "IntegratedGradients": ({"n_steps": 9}, lambda batch: {"internal_batch_size": batch}),
    "FeatureAblation": ({}, lambda _: {}),
    "Occlusion": ({"sliding_window_shapes": (2,)}, lambda _: {}),
    "ShapleyValueSampling": ({"n_samples": 3}, lambda _: {}),
    "LayerGradCam": ({}, lambda _: {}),
    "LayerIntegratedGradients": ({"n_steps": 9}, lambda batch: {"internal_batch_size": batch}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["module", "function"])
def test_points_are_what_they_are_alone(name: str, kind: str, batch: int, form: str) -> None:
    if kind == "norm" and batch == 1:
        pytest.skip("such a norm takes two rows at least")
    of, apart = METHODS[name]
    answers = []
    for library in (captum.attr, facade):
        model = network(kind)
        layer = (model[1],) if name.startswith("Layer") else ()
        function: Any = model if form == "module" else lambda x, model=model: model(x)
        method = getattr(library, name)(function, *layer)
        more = apart(batch) if library is captum.attr else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            answers.append(method.attribute(randn(batch, 7, seed=4), target=1, **of, **more))
    agree(answers[1], answers[0], 1e-6 if "Shapley" in name or name == "Occlusion" else 1e-9)


def path(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Integrated Gradients by hand: a call for each point, of the whole batch."""
    method = captum.attr.IntegratedGradients(model)
    return method.attribute(x, target=1, n_steps=steps, internal_batch_size=len(x))


@pytest.mark.parametrize("kind", [one for one in KINDS if one != "norm"])
def test_one_example_is_the_same_by_engine_and_facade(kind: str) -> None:
    model, x = network(kind), randn(1, 7)
    found = facade.IntegratedGradients(model).attribute(x, target=1, n_steps=9)
    agree(found, path(model, x, 9), 1e-9)


TUNNELS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 5},
    "DeepLift": {},
}


@pytest.mark.parametrize("name", TUNNELS)
@pytest.mark.parametrize("kind", ["centred", "largest", "norm"])
@pytest.mark.parametrize("of", [{"nt_type": "smoothgrad"}, {"nt_type": "vargrad"}], ids=str)
def test_samples_do_not_meet(name: str, kind: str, of: Any) -> None:
    """However many samples were to be in a call."""
    model, x = network(kind), randn(3, 7)
    found = []
    for size in (None, 1, 4):
        torch.manual_seed(2)
        tunnel = facade.NoiseTunnel(getattr(facade, name)(model))
        more = {"nt_samples": 6, "stdevs": 0.3, "nt_samples_batch_size": size}
        found.append(tunnel.attribute(x, target=1, **of, **more, **TUNNELS[name]))
    agree(found[0], found[1], 1e-9, 1e-3)
    agree(found[2], found[1], 1e-9, 1e-3)


@pytest.mark.parametrize("kind", ["centred", "largest", "norm"])
def test_samples_of_gradient_shap_do_not_meet(kind: str) -> None:
    model, x, rows = network(kind), randn(3, 7), randn(4, 7, seed=1)
    np.random.seed(0)
    found = facade.GradientShap(model).attribute(x, rows, n_samples=5, target=1)
    np.random.seed(0)
    expected = torch.zeros_like(x)
    for _ in range(5):
        # One batch a time, drawn as the tunnel draws for one sample.
        starts = rows[np.random.choice(4, 3).tolist()]
        share = torch.from_numpy(np.random.uniform(0.0, 1.0, 3))[:, None]
        point = torch.lerp(starts, x, share).requires_grad_()
        (gradient,) = torch.autograd.grad(model(point)[:, 1].sum(), point)
        expected += gradient * (x - starts) / 5
    agree(found, expected, 1e-9)


@pytest.mark.parametrize("kind", ["centred", "largest", "norm"])
def test_steps_of_conductance_do_not_meet(kind: str) -> None:
    model, x = network(kind), randn(3, 7)
    if kind == "norm":
        model[0].eps = 1.0
    layer = model[1]
    found = facade.LayerConductance(model, layer).attribute(x, target=1, n_steps=6)
    expected = captum.attr.LayerConductance(model, layer)
    nodes = [0.5 * (1 + one) for one in np.polynomial.legendre.leggauss(7)[0]]
    values, gradients = [], []
    for alpha in nodes:
        point = alpha * x
        value = layer(model[0](point)).detach().requires_grad_()
        score = model[3](model[2](value))[:, 1].sum()
        values.append(value.detach())
        gradients.append(torch.autograd.grad(score, value)[0])
    by_hand = sum(
        (after - before) * gradient
        for before, after, gradient in zip(values, values[1:], gradients, strict=False)
    )
    assert expected is not None
    agree(found, by_hand, 1e-6)
