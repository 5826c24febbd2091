"""Models in half types have Captum's types, and its numbers as far as these hold them."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from torch import nn

import saliency_fast.captum as facade
from tests.models import SHAPES, Image, make, randn

# The rounding of a number, some dozens of times over: layers forward and back, and what cancels.
CLOSE = {torch.float16: 0.05, torch.bfloat16: 0.3}
CALLS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "GuidedBackprop": {},
    "DeepLift": {"return_convergence_delta": True},
    "IntegratedGradients": {"n_steps": 5, "return_convergence_delta": True},
    "LayerIntegratedGradients": {"n_steps": 5, "return_convergence_delta": True},
    "LayerGradCam": {},
    "LayerActivation": {},
    "Occlusion": {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)},
}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_types_as_in_captum(name: str, dtype: torch.dtype) -> None:
    x = randn(2, *SHAPES[Image])
    expected, theirs, found = (
        answer(library, name, kind, x)
        for library, kind in (
            (captum.attr, torch.float64),
            (captum.attr, dtype),
            (facade, dtype),
        )
    )
    assert [one.dtype for one in found] == [one.dtype for one in theirs]
    assert relative(found[0], expected[0]) < CLOSE[dtype]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def answer(library: Any, name: str, dtype: torch.dtype, x: torch.Tensor) -> Any:
    model = make(Image).to(dtype)
    at = (model[0],) if name.startswith("Layer") else ()
    method = getattr(library, name)(model, *at)
    of = CALLS[name] | ({} if name == "LayerActivation" else {"target": 1})
    found = method.attribute(x.to(dtype), **of)
    return found if isinstance(found, tuple) else (found,)


def test_relevance_has_the_type_of_its_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16()
    found = facade.LRP(model).attribute(torch.ones(2, 3).bfloat16(), target=1)
    assert found.dtype == torch.bfloat16


def test_differences_that_half_types_cannot_hold_are_none() -> None:
    """A dead input and its baseline do not differ: 1e-10 is zero in float16."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).half()
    x = torch.tensor([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0]]).half()
    found = facade.DeepLift(model).attribute(x, target=1)
    assert found.isfinite().all()
    assert not found[1].any()
