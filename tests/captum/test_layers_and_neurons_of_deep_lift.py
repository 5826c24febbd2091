"""DeepLIFT at layers and of neurons, from one baseline and from sets, gives Captum's numbers."""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.captum.test_facade_gradients import agree
from tests.models import randn


class Model(nn.Module):
    """Two inputs, a layer that the output does not use, one of several tensors, and softmax."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(2, 4)
        self.act, self.head, self.last = nn.ReLU(), nn.Linear(8, 5), last
        self.bend, self.side, self.pair = nn.Sigmoid(), nn.Linear(3, 4), Pair()

    def forward(self, a: Tensor, b: Tensor, scale: Any = 1.0) -> Tensor:
        self.side(a)
        left, right = self.pair(self.one(a), self.two(b))
        y = self.head(self.act(torch.cat((left, right), 1)))
        scale = scale.view(-1, 1) if isinstance(scale, Tensor) else scale
        return self.last(self.bend(y) * scale)


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * 2, b - 1


INPUTS = (randn(3, 3), randn(3, 2, seed=1))
ONE = {"none": None, "numbers": (0.5, -1.0), "rows": (randn(3, 3, seed=2), randn(3, 2, seed=3))}
SETS: dict[str, Any] = {
    "a set": (randn(4, 3, seed=2), randn(4, 2, seed=3)),
    "a function": lambda: (randn(2, 3, seed=2), randn(2, 2, seed=3)),
    "a function of inputs": lambda x: (x[0] * 0.5, x[1] - 1),
}
LAYERS = ("one", "act", "head", "bend", "pair")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "int": {"target": 1},
    "list": {"target": [0, 2, 1]},
    "arguments": {"target": 1, "additional_forward_args": (torch.arange(3.0).double(),)},
}


def model(last: type[nn.Module] = nn.Identity) -> Model:
    torch.manual_seed(0)
    return Model(nn.Softmax(1) if last is nn.Softmax else last()).double().eval()


def answers(
    name: str, layer: str, inputs: Any, made: Any, last: Any = nn.Identity, **of: Any
) -> Any:
    found = []
    for library in (captum.attr, facade):
        own = model(last)
        method = getattr(library, name)(own, own.get_submodule(layer), **made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copies = tuple(x.clone() for x in inputs)
            found.append(method.attribute(copies, **of))
        assert not any(len(one._forward_hooks) + len(one._backward_hooks) for one in own.modules())
        assert (
            not any(x.requires_grad or x.grad is not None for x in copies) or library is not facade
        )
    return found


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("last", [nn.Identity, nn.Softmax])
def test_layer_deep_lift(layer: str, multiply: bool, kind: str, last: Any) -> None:
    made = {"multiply_by_inputs": multiply}
    of = ARGUMENTS[kind] | {"return_convergence_delta": True}
    for baselines in ONE.values():
        expected, found = answers(
            "LayerDeepLift", layer, INPUTS, made, last, baselines=baselines, **of
        )
        agree(found, expected, 1e-9, 1e-3)
    for baselines in SETS.values():
        expected, found = answers(
            "LayerDeepLiftShap", layer, INPUTS, made, last, baselines=baselines, **of
        )
        agree(found, expected, 1e-9, 1e-3)


@pytest.mark.parametrize("name", ["LayerDeepLift", "LayerDeepLiftShap"])
@pytest.mark.parametrize("given", [False, True])
def test_at_what_a_layer_takes(name: str, given: bool) -> None:
    baselines = SETS["a set"] if "Shap" in name else ONE["rows"]
    of: dict[str, Any] = {"baselines": baselines, "target": 1, "attribute_to_layer_input": True}
    if given:
        of["custom_attribution_func"] = lambda m, x, b: tuple(
            2 * one * (a - c) for one, a, c in zip(m, x, b, strict=True)
        )
    for layer in ("one", "head", "last"):
        expected, found = answers(name, layer, INPUTS, {}, **of)
        agree(found, expected, 1e-9, 1e-3)


@pytest.mark.parametrize("name", ["LayerDeepLift", "LayerDeepLiftShap"])
def test_a_layer_that_the_output_does_not_use(name: str) -> None:
    own = model()
    method = getattr(facade, name)(own, own.side)
    baselines = SETS["a set"] if "Shap" in name else None
    with pytest.raises(RuntimeError, match="not differentiable"):
        method.attribute(INPUTS, baselines, target=1)
    if name == "LayerDeepLift":
        of = {"target": 1, "grad_kwargs": {"materialize_grads": True}}
        expected, found = answers(name, "side", INPUTS, {}, **of)
        agree(found, expected, 1e-9)
        assert not bool(found.any())
        for layer in LAYERS:
            expected, found = answers(name, layer, INPUTS, {}, **of)
            agree(found, expected, 1e-9)


SELECTORS: dict[str, Any] = {
    "int": 1,
    "negative": -1,
    "tuple": (2,),
    "slice": (slice(0, 3),),
    "function": lambda y: y[:, 0] * y[:, 1],
}


@pytest.mark.parametrize("layer", ["one", "act", "head", "bend", "last"])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("of_input", [True, False])
def test_neurons(layer: str, selector: str, multiply: bool, of_input: bool) -> None:
    of = {"neuron_selector": SELECTORS[selector], "attribute_to_neuron_input": of_input}
    inputs = INPUTS
    if layer == "one":
        # Captum has no zeros for inputs that a neuron does not see.
        of["additional_forward_args"] = (INPUTS[1],)
        inputs = INPUTS[:1]
    made = {"multiply_by_inputs": multiply}
    for name, several in (("NeuronDeepLift", ONE), ("NeuronDeepLiftShap", SETS)):
        for kind, baselines in several.items():
            if isinstance(baselines, tuple):
                baselines = baselines[: len(inputs)]
            elif callable(baselines) and layer == "one":
                continue
            expected, found = answers(name, layer, inputs, made, baselines=baselines, **of)
            agree(found, expected, 1e-9, 1e-3), kind


def test_neurons_of_several_tensors() -> None:
    for library in (captum.attr, facade):
        own = model()
        copies = tuple(x.clone() for x in INPUTS)
        with pytest.raises(AssertionError, match="multiple tensors"):
            library.NeuronDeepLift(own, own.pair).attribute(copies, 1)
    of = {"neuron_selector": lambda pair: pair[0][:, 1] * pair[1][:, 2]}
    expected, found = answers("NeuronDeepLift", "pair", INPUTS, {}, **of)
    agree(found, expected, 1e-9)


def test_one_baseline_is_no_set() -> None:
    for name in ("LayerDeepLiftShap", "NeuronDeepLiftShap", "DeepLiftShap"):
        for library in (captum.attr, facade):
            own = model()
            layer = () if name == "DeepLiftShap" else (own.act,)
            of = {"neuron_selector": 1} if "Neuron" in name else {"target": 1}
            method = getattr(library, name)(own, *layer)
            copies = tuple(x.clone() for x in INPUTS)
            with pytest.raises(AssertionError, match="Baselines distribution"):
                method.attribute(copies, baselines=tuple(x[:1] for x in INPUTS), **of)


def test_statistics_of_norms_stay() -> None:
    own = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    before = {name: one.clone() for name, one in own.state_dict().items()}
    facade.NeuronDeepLift(own, own[2]).attribute(randn(3, 3).float(), 1)
    assert all(torch.equal(one, before[name]) for name, one in own.state_dict().items())
