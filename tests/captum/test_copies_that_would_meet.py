"""Copies of one example that share a call of a model whose rows meet: a table of the facade's
classes and of what such models do, against the map of a model that treats rows apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.models import randn

Step = Callable[[Tensor], Tensor]


def _by_rows(step: Step) -> Step:
    return lambda h: torch.cat([step(row) for row in h.split(1)])


MEETING: dict[str, Step] = {
    "min-max": lambda h: (h - h.min()) / (h.max() - h.min() + 1e-6),
    "largest": lambda h: h / (h.amax() + 4),
    "median": lambda h: h - h.median(),
    "quantile": lambda h: h.clamp(max=h.quantile(0.8)),
    "standardised": lambda h: (h - h.mean()) / (h.std() + 0.1),
    "sums over rows": lambda h: h.cumsum(0),
    "softmax over rows": lambda h: h * (1 + h.softmax(0)),
    "number of rows": lambda h: h * len(h),
    "branch on the number of rows": lambda h: h * 3 if len(h) == 2 else h,
    "branch on three rows": lambda h: h * 3 if len(h) == 3 else h,
    "branch": lambda h: h * 2 if bool(h.max() > 3) else h,
}


class Model(nn.Module):
    """A step that looks at all rows, between two layers."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.step = step
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.rectifier, self.last = nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rectifier(self.second(self.step(self.first(x)))))


def _as_function(model: Model) -> Any:
    """A function that the library finds no module in."""
    return _Bare(model)


class _Bare:
    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


TUNNEL = {"nt_type": "smoothgrad", "nt_samples": 5, "stdevs": 0.3}
KEPT: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "FeatureAblation": (lambda m: facade.FeatureAblation(m), {}),
    "Occlusion": (lambda m: facade.Occlusion(m), {"sliding_window_shapes": (1,)}),
    "ShapleyValues": (lambda m: facade.ShapleyValues(m), {}),
    "ShapleyValueSampling": (lambda m: facade.ShapleyValueSampling(m), {"n_samples": 3}),
    "KernelShap": (lambda m: facade.KernelShap(m), {"n_samples": 12}),
    "Lime": (lambda m: facade.Lime(m), {"n_samples": 12}),
}
CALLS: dict[str, Callable[[Model, Tensor], Any]] = {
    "LayerConductance": lambda m, x: facade.LayerConductance(m, m.first).attribute(
        x, target=1, n_steps=6
    ),
    "LayerConductance in parts": lambda m, x: facade.LayerConductance(m, m.first).attribute(
        x, target=1, n_steps=6, internal_batch_size=4
    ),
    "LayerIntegratedGradients": lambda m, x: facade.LayerIntegratedGradients(m, m.first).attribute(
        x, target=1, n_steps=6
    ),
    "IntegratedGradients": lambda m, x: facade.IntegratedGradients(m).attribute(
        x, target=1, n_steps=6
    ),
    "InternalInfluence": lambda m, x: facade.InternalInfluence(m, m.first).attribute(
        x, target=1, n_steps=6
    ),
    "NeuronConductance": lambda m, x: facade.NeuronConductance(m, m.second).attribute(
        x, (1,), target=1, n_steps=6
    ),
    "NeuronIntegratedGradients": lambda m, x: facade.NeuronIntegratedGradients(
        m, m.second
    ).attribute(x, (1,), n_steps=6, internal_batch_size=4),
    "NeuronFeatureAblation": lambda m, x: facade.NeuronFeatureAblation(m, m.second).attribute(
        x, (1,), perturbations_per_eval=4
    ),
    "LayerFeatureAblation": lambda m, x: facade.LayerFeatureAblation(m, m.first).attribute(
        x, target=1, perturbations_per_eval=4
    ),
    "NoiseTunnel": lambda m, x: facade.NoiseTunnel(facade.Saliency(m)).attribute(
        x, target=1, **TUNNEL
    ),
    "NoiseTunnel in parts": lambda m, x: facade.NoiseTunnel(
        facade.IntegratedGradients(m)
    ).attribute(x, target=1, n_steps=4, nt_samples_batch_size=2, **TUNNEL),
    "NoiseTunnel of a layer": lambda m, x: facade.NoiseTunnel(
        facade.LayerGradientXActivation(m, m.first)
    ).attribute(x, target=1, **TUNNEL),
    # One baseline: of several, samples that run alone draw others.
    "GradientShap": lambda m, x: facade.GradientShap(m).attribute(
        x, randn(1, 5, seed=8), target=1, n_samples=4, stdevs=0.2
    ),
}


def quiet(call: Callable[[], Any]) -> Tensor:
    torch.manual_seed(5)
    np.random.seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call()
    return found[0] if isinstance(found, tuple) else found


def near(found: Tensor, expected: Tensor) -> None:
    # Occlusion and the surrogates have maps in float32, as in Captum.
    room = 1e-9 if found.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=room, atol=room)


@pytest.mark.parametrize("form", ["module", "function"])
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", MEETING)
def test_perturbed_copies_are_what_they_are_alone(kind: str, name: str, form: str) -> None:
    made, of = KEPT[name]
    model = Model(MEETING[kind]).double()
    function: Any = model if form == "module" else _as_function(model)
    x = randn(1, 5, seed=1)

    def call(at_once: int) -> Tensor:
        method = made(function)
        return quiet(lambda: method.attribute(x, target=1, perturbations_per_eval=at_once, **of))

    expected = call(1)
    for at_once in (2, 3, 4):
        near(call(at_once), expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", MEETING)
def test_copies_are_what_a_model_by_rows_gives(kind: str, name: str) -> None:
    step = MEETING[kind]
    model, twin = Model(step).double(), Model(_by_rows(step)).double()
    x = randn(1, 5)
    near(quiet(lambda: CALLS[name](model, x)), quiet(lambda: CALLS[name](twin, x)))


@pytest.mark.parametrize("name", ["LayerGradientShap", "NeuronGradientShap"])
def test_samples_of_captums_own_classes_have_calls_of_their_own(name: str) -> None:
    of: dict[str, Any] = {"target": 1} if name.startswith("Layer") else {"neuron_selector": 1}
    x = randn(1, 5)
    found = []
    # Without noise and with one baseline the line alone is drawn, of one number a sample.
    for step in (MEETING["standardised"], _by_rows(MEETING["standardised"])):
        model = Model(step).double()
        method = getattr(facade, name)(model, model.second)
        start = torch.zeros_like(x)
        found.append(
            quiet(lambda m=method, s=start: m.attribute(x, baselines=s, n_samples=4, **of))
        )
    near(*found)


def test_models_by_rows_share_calls() -> None:
    """Of models whose rows do not meet copies share calls."""
    sizes = []

    def function(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)[:, 1]

    model = Model(torch.tanh).double()
    bare = _Bare(function)  # type: ignore[arg-type]
    facade.FeatureAblation(bare).attribute(randn(1, 5), perturbations_per_eval=5)
    # The inputs and some copies alone, all copies, and one or two among extreme ones.
    assert sizes[:2] == [1, 5]
    assert sizes.count(1) in (4, 5)
    assert sizes.count(5) in (2, 3)
