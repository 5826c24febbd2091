"""Models that write to their inputs have the maps of those that do not, and users keep theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.models import make, randn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first((x - 0.5) * 2)))


class Writing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x *= 2
        return self.last(self.act(self.first(x)))


DELTA = {"return_convergence_delta": True}
CALLS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 4, **DELTA},
    "GuidedBackprop": {},
    "DeepLift": DELTA,
    "LRP": DELTA,
    "GradientShap": {"n_samples": 3, **DELTA},
    "LayerActivation": {},
    "LayerGradCam": {},
    "LayerIntegratedGradients": {"n_steps": 4, **DELTA},
    "LayerConductance": {"n_steps": 4, **DELTA},
    "LayerDeepLift": DELTA,
    "FeatureAblation": {},
    "FeaturePermutation": {},
    "Occlusion": {"sliding_window_shapes": (2,)},
    "ShapleyValueSampling": {"n_samples": 2},
    "ShapleyValues": {},
    "KernelShap": {"n_samples": 20},
    "Lime": {"n_samples": 20},
}
BASED = (*(name for name in CALLS if DELTA.items() <= CALLS[name].items()), "FeatureAblation")


@pytest.mark.parametrize("name", CALLS)
def test_inputs_and_baselines_stay(name: str) -> None:
    expected, found = (answer(name, kind) for kind in (Plain, Writing))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_inputs_stay_with_an_interpretable_model() -> None:
    x = randn(4, 6)
    lime = facade.Lime(make(Writing), SkLearnRidge(alpha=0.1))
    lime.attribute(x, target=1, n_samples=9)
    assert torch.equal(x, randn(4, 6))


def answer(name: str, kind: type[Plain]) -> tuple[Tensor, ...]:
    model, x, baselines = make(Plain), randn(4, 6), randn(4, 6, seed=1)
    model.__class__ = kind
    at = (model.act,) if name.startswith("Layer") else ()
    of: dict[str, Any] = CALLS[name] | ({} if name == "LayerActivation" else {"target": 1})
    if name in BASED and name != "LRP":
        of["baselines"] = baselines
    torch.manual_seed(3)
    np.random.seed(3)
    found = getattr(facade, name)(model, *at).attribute(x, **of)
    assert torch.equal(x, randn(4, 6))
    assert torch.equal(baselines, randn(4, 6, seed=1))
    return found if isinstance(found, tuple) else (found,)
