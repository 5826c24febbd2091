"""Every class on the same calls as Captum's: values, containers, shapes, types, raised classes, and
what is left on the inputs.
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
from tests.models import randn


class Table(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


class Picture(nn.Sequential):
    """With pools and rectifiers in place."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
        )


class Beside(nn.Module):
    """Two inputs and whatever comes along."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor, scale: Any = None, shift: Any = 0.0) -> Tensor:
        y = self.two(self.act(self.one(a) + b))
        if isinstance(scale, Tensor):
            y = y * (scale.view(-1, 1) if scale.dim() and len(scale) > 1 else scale)
        return y + shift


class Whole(nn.Sequential):
    """One number for a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin().sum()


def picture(rows: int) -> Tensor:
    return randn(rows, 1, 8, 8)


FLAT = torch.zeros(2, 1, 8, 8).double()
STROKE = torch.zeros(2, 1, 8, 8).double()
STROKE[:, :, 2:5, 3:6] = 1.0
PAIR = (randn(3, 6), randn(3, 5, seed=1))
INPUTS: dict[str, tuple[type[nn.Module], Any]] = {
    "table": (Table, randn(3, 6)),
    "one example": (Table, randn(1, 6)),
    "zeros": (Table, torch.zeros(2, 6).double()),
    "a tuple of one": (Table, (randn(2, 6),)),
    "whole numbers": (Table, torch.arange(12).view(2, 6)),
    "picture": (Picture, picture(2)),
    "flat": (Picture, FLAT),
    "stroke with ties": (Picture, STROKE),
    "pair": (Beside, PAIR),
    "one number": (Whole, randn(3, 6)),
}
TARGETS: dict[str, Callable[[int], Any]] = {
    "int": lambda _: 1,
    "negative": lambda _: -1,
    "tuple": lambda _: (2,),
    "tensor of one": lambda _: torch.tensor(3),
    "list": lambda rows: [one % 4 for one in range(rows)],
    "tensor": lambda rows: torch.arange(rows) % 4,
    "list of tuples": lambda rows: [(one % 4,) for one in range(rows)],
    "none": lambda _: None,
    "too large": lambda _: 9,
    "too many": lambda rows: [1] * (rows + 1),
    "text": lambda _: "cat",
}
METHODS: dict[str, dict[str, Any]] = {
    "Saliency": {},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 7},
    "GradientShap": {"n_samples": 3},
    "DeepLift": {},
    "GuidedBackprop": {},
    "Deconvolution": {},
    "FeatureAblation": {},
    "FeaturePermutation": {},
    "Occlusion": {},
    "ShapleyValueSampling": {"n_samples": 2},
    "LayerActivation": {},
    "LayerGradientXActivation": {},
    "LayerGradCam": {},
    "LayerIntegratedGradients": {"n_steps": 7},
    "LayerConductance": {"n_steps": 5},
    "LayerDeepLift": {},
    "NeuronDeepLift": {"neuron_selector": 1},
}
FLOATS = ("FeatureAblation", "FeaturePermutation", "Occlusion", "ShapleyValueSampling")
LAYERS = {Table: "0", Picture: "0", Beside: "one", Whole: "0"}


def moved(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(moved(one, dtype) for one in value)
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    return value


def called(
    library: Any, name: str, kind: type[nn.Module], inputs: Any, of: Any, dtype: torch.dtype
) -> tuple[Any, Any]:
    """What a call returns or raises, and the inputs that it was given."""
    torch.manual_seed(0)
    model = kind().to(dtype).eval()
    made = ()
    if "Layer" in name or "Neuron" in name:
        made = (model.get_submodule(LAYERS[kind]) if len(list(model.children())) else model,)
    inputs = moved(inputs, dtype)
    of = METHODS[name] | {key: moved(one, dtype) for key, one in of.items()}
    if name == "Occlusion":
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        windows = tuple(tuple(min(2, n) for n in x.shape[1:]) for x in parts)
        of["sliding_window_shapes"] = windows if isinstance(inputs, tuple) else windows[0]
    if name == "GradientShap":
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        sets = tuple(torch.zeros_like(x[:1]).expand(2, *x.shape[1:]) for x in parts)
        of.setdefault("baselines", sets if isinstance(inputs, tuple) else sets[0])
    if name in ("LayerActivation", "NeuronDeepLift"):
        of.pop("target", None)
    torch.manual_seed(1)
    np.random.seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(library, name)(model, *made).attribute(inputs, **of), inputs
        except Exception as error:
            return error, inputs


def compared(name: str, kind: Any, inputs: Any, of: Any, dtype: torch.dtype) -> None:
    expected, _ = called(captum.attr, name, kind, inputs, of, dtype)
    found, given = called(facade, name, kind, inputs, of, dtype)
    parts = given if isinstance(given, tuple) else (given,)
    for one, was in zip(parts, inputs if isinstance(inputs, tuple) else (inputs,), strict=True):
        assert not one.requires_grad
        assert one.grad is None
        assert torch.equal(one, was.to(one.dtype))
    if isinstance(expected, Exception):
        if isinstance(expected, AssertionError):
            assert isinstance(found, (AssertionError, RuntimeError)), found
        # What Captum's own code stumbles over may be computed here.
        return
    assert not isinstance(found, Exception), found
    same(found, expected, 1e-10 if dtype == torch.float64 else 1e-5, name)


def same(found: Any, expected: Any, tolerance: float, name: str) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            same(*pair, tolerance, name)
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert not found.requires_grad
    # Shapley values and occlusion are added up in float32 by Captum; losses are differences.
    if found.dtype == torch.float32:
        tolerance = 1e-5
    floor = 1.0 if name in FLOATS else 1e-3
    gap = float((found.double() - expected.detach().double()).norm())
    assert gap <= tolerance * max(floor, float(expected.detach().double().norm())), (gap, name)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inputs(name: str, form: str, dtype: torch.dtype) -> None:
    kind, inputs = INPUTS[form]
    of = {} if kind is Whole else {"target": 1}
    if kind is Whole and ("Layer" in name or "Neuron" in name):
        pytest.skip("no layer")
    if form == "whole numbers" and name not in (*FLOATS, "IntegratedGradients"):
        pytest.skip("no gradient of whole numbers")
    if form == "whole numbers":
        kind = Numbers
    compared(name, kind, inputs, of, dtype)


class Numbers(Table):
    """A table of whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.to(self[0].weight.dtype))
        return found


LAYERS[Numbers] = "0"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("rows", [1, 3])
def test_targets(name: str, form: str, rows: int) -> None:
    if name in ("LayerActivation", "NeuronDeepLift"):
        pytest.skip("no target")
    compared(name, Table, randn(rows, 6), {"target": TARGETS[form](rows)}, torch.float64)


FURTHER: dict[str, Any] = {
    "none": None,
    "none in a tuple": (None,),
    "a number": 2.0,
    "a number and none": (None, 0.5),
    "a row each": torch.arange(1.0, 4.0),
    "a scalar": torch.tensor(2.0),
    "a row each and a number": (torch.arange(1.0, 4.0), 1.5),
    "text": ("x",),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("form", FURTHER)
def test_further_arguments(name: str, form: str) -> None:
    of = {"target": 1, "additional_forward_args": FURTHER[form]}
    compared(name, Beside, PAIR, of, torch.float64)


BASELINES: dict[str, Any] = {
    "none": None,
    "numbers": (0.5, 1),
    "rows": (randn(3, 6, seed=5), randn(3, 5, seed=6)),
    "a row": (randn(1, 6, seed=5), 0.0),
    "another shape": (randn(2, 6), 0),
    "too few": (0.0,),
    "text": ("a", "b"),
}
WITH = (
    "IntegratedGradients",
    "DeepLift",
    "FeatureAblation",
    "Occlusion",
    "ShapleyValueSampling",
    "LayerIntegratedGradients",
    "LayerConductance",
    "LayerDeepLift",
    "NeuronDeepLift",
)


@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("form", BASELINES)
def test_baselines(name: str, form: str) -> None:
    compared(name, Beside, PAIR, {"target": 1, "baselines": BASELINES[form]}, torch.float64)
