"""LRP shares relevance as Captum's does, by its rules or ours, and leaves modules as they are."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr._utils import lrp_rules
from captum.attr._utils.custom_modules import Addition_Module
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.captum.layer_models import Line, Plane, Residual, Space
from tests.captum.test_facade_gradients import TOLERANCE, agree, scale_of
from tests.models import make, randn

X = randn(3, 2, 8, 8)
NAMES = ("EpsilonRule", "GammaRule", "Alpha1_Beta0_Rule", "IdentityRule")
Rules = dict[str, tuple[str, dict[str, Any]]]
EPSILON: tuple[str, dict[str, Any]] = ("EpsilonRule", {})
FLAT: Rules = {"flat": EPSILON}
CASES: dict[str, tuple[type[nn.Module], Tensor, Rules]] = {
    "1-D": (Line, randn(3, 2, 8), FLAT | {f"body.{n}": EPSILON for n in (0, 3, 5)}),
    "2-D": (Plane, X, FLAT),
    "3-D": (Space, randn(3, 2, 8, 8, 8), FLAT | {f"body.{n}": EPSILON for n in (0, 3, 5)}),
    "gamma": (
        Plane,
        X,
        FLAT | {"body.0": ("GammaRule", {}), "body.3": ("GammaRule", {"gamma": 1})},
    ),
    "no bias": (Plane, X, FLAT | {"body.3": ("GammaRule", {"set_bias_to_zero": True})}),
    "alpha, beta": (Plane, X, FLAT | {"body.3": ("Alpha1_Beta0_Rule", {})}),
    "alpha, beta, no bias": (
        *(Plane, X),
        FLAT | {"head": ("Alpha1_Beta0_Rule", {"set_bias_to_zero": True})},
    ),
    "large epsilon": (Plane, X, FLAT | {"body.5": ("EpsilonRule", {"epsilon": 0.3})}),
    "skip connection": (Residual, X, {}),
    "identity": (Residual, X, {"norm": ("IdentityRule", {})}),
    "norm by gamma": (Residual, X, {"norm": ("GammaRule", {}), "pool": ("GammaRule", {})}),
}


class Sum(nn.Module):
    """A skip connection that Captum has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.add, self.head = nn.Linear(7, 7), Addition_Module(), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.add(self.first(x).tanh(), x))


def ruled(kind: type[nn.Module], rules: Rules, of: Any, dtype: torch.dtype) -> nn.Module:
    model = make(kind).to(dtype)
    for name, (rule, options) in rules.items():
        model.get_submodule(name).rule = getattr(of, rule)(**options)
    return model


def relevance(library: ModuleType, model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return library.LRP(model).attribute(x.clone(), [0, 2, 1], return_convergence_delta=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["our rules", "Captum's rules"])
@pytest.mark.parametrize("name", CASES)
def test_relevance_as_in_captum(name: str, own: bool, dtype: torch.dtype) -> None:
    kind, x, rules = CASES[name]
    expected = relevance(captum.attr, ruled(kind, rules, lrp_rules, dtype), x.to(dtype))
    model = ruled(kind, rules, facade if own else lrp_rules, dtype)
    # Ours keeps rules, so that a second call is as the first.
    for _ in range(2):
        found = relevance(facade, model, x.to(dtype))
        scale = scale_of(expected)
        agree(found[1], expected[1], TOLERANCE[dtype], scale)
        agree(found[0], expected[0], TOLERANCE[dtype], scale if dtype == torch.float32 else 0.0)


def test_sums_by_a_module() -> None:
    x = randn(3, 7)
    expected, found = (relevance(one, make(Sum), x) for one in (captum.attr, facade))
    agree(found, expected, 1e-10)


def test_a_rule_of_ones_own() -> None:
    """Subclasses of either library's base, with the same body."""
    answers = []
    bases = lrp_rules.PropagationRule, facade.PropagationRule
    for library, base in zip((captum.attr, facade), bases, strict=True):

        class Halved(base):  # type: ignore[misc, valid-type]
            def _manipulate_weights(self, module: Any, inputs: Any, outputs: Any) -> None:
                module.weight.data = module.weight.data.abs() * 0.5
                module.bias.data.mul_(0.25)

        model = ruled(Plane, FLAT, lrp_rules if library is captum.attr else facade, torch.float64)
        model.head.rule = Halved()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        answers.append(relevance(library, model, X))
        if library is facade:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    agree(answers[1], answers[0], 1e-10)


def test_a_tuple_and_further_arguments() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(7, 4), nn.Linear(7, 4)

        def forward(self, a: Tensor, b: Tensor, scale: Tensor, twice: bool) -> Tensor:
            y = (self.first(a) + self.second(b)) * scale[:, None]
            return 2.0 * y if twice else y

    pair, further = (randn(3, 7), randn(3, 7, seed=1)), (randn(3, seed=2).abs(), True)
    # Captum hands further arguments to a function that does not take them.
    model = make(Scaled)
    found = facade.LRP(model).attribute(pair, 1, further)
    assert isinstance(found, tuple)
    score = model(*pair, *further)[:, 1]
    # The sum outside of modules hands what it gets to both: 2 * scale.
    share = score * 2.0 * further[0]
    for one, x, layer in zip(found, pair, (model.first, model.second), strict=True):
        expected = layer.weight[1] * x * (share / layer(x)[:, 1])[:, None]
        torch.testing.assert_close(one, expected.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", ["rule", "layer"])
def test_what_has_no_rule(bad: str) -> None:
    errors = []
    for library in (captum.attr, facade):
        model = make(Plane)
        if bad == "rule":
            model.head.rule = 1
        with pytest.raises(TypeError) as caught:
            library.LRP(model).attribute(X.clone(), 1)
        errors.append(str(caught.value))
    assert errors[0][:24] == errors[1][:24]


def test_nothing_is_left_and_verbose_prints(capsys: pytest.CaptureFixture[str]) -> None:
    model = ruled(Residual, {"norm": ("GammaRule", {})}, facade, torch.float64).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    facade.LRP(model).attribute(X, 1, verbose=True)
    assert capsys.readouterr().out.count("Applied") == 5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for module in model.modules():
        assert module.training
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
        assert hasattr(module, "rule") == (module is model.norm)
        assert not hasattr(module, "activations")
