"""Guided backpropagation, deconvolution and softplus in place of the gradient of ReLU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from saliency_fast.errors import ModelError
from saliency_fast.rules.intercept import RulesExecutor
from saliency_fast.rules.lrp_operators import composite
from saliency_fast.rules.rectifiers import Deconv, Guided, Softplus
from tests.naive import relative_l2
from tests.rules import naive_rules
from tests.rules.ruled import RELUS, SHAPES, Functional, Row, network, points, ruled

EXACT = 1e-12
BOTH = [(Guided(), "guided"), (Deconv(), "deconv")]
IDS = ["guided", "deconv"]


@pytest.mark.parametrize("kind", ["mlp", "1-d", "2-d", "3-d"])
@pytest.mark.parametrize(("rules", "name"), BOTH, ids=IDS)
def test_against_one_layer_after_another(kind: str, rules: Any, name: str) -> None:
    model, x = network(kind), points(kind)
    layers = [one for layer in model for one in _flattened(layer)]
    found = ruled(model, rules, x, 2)
    for number in range(len(x)):
        expected = naive_rules.guided(layers, x[number : number + 1], 2, name)
        assert relative_l2(found[number : number + 1], expected) < EXACT


def _flattened(layer: nn.Module) -> list[nn.Module]:
    return [nn.Flatten(), layer] if isinstance(layer, nn.Linear) else [layer]


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "residual"])
@pytest.mark.parametrize(("rules", "name"), BOTH, ids=IDS)
def test_against_captum(kind: str, rules: Any, name: str) -> None:
    model, x = network(kind), points(kind)
    peer = {"guided": captum.attr.GuidedBackprop, "deconv": captum.attr.Deconvolution}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peer(copy.deepcopy(model)).attribute(x.clone(), target=[0, 3, 1])
    assert relative_l2(ruled(model, rules, x, [0, 3, 1]), expected) < EXACT


@pytest.mark.parametrize("form", RELUS)
@pytest.mark.parametrize("rules", [Guided(), Deconv(), Softplus(3.0)], ids=lambda r: r.name)
def test_every_form_of_relu(form: str, rules: Any) -> None:
    """Captum's hooks see modules alone; the model is not changed for it."""
    x = points("residual")
    expected = ruled(network("residual"), rules, x, 1)
    model = network("residual", RELUS[form])
    assert relative_l2(ruled(model, rules, x, 1), expected) < EXACT
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


@pytest.mark.parametrize(
    "act", [nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, lambda: nn.Threshold(0.1, 0)]
)
@pytest.mark.parametrize(("rules", "name"), BOTH, ids=IDS)
def test_others_keep_their_gradient_and_it_is_said(act: Any, rules: Any, name: str) -> None:
    model, x = network("2-d", act), points("2-d")
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    with pytest.warns(UserWarning, match="no ReLU that .* these are plain gradients"):
        found = ruled(model, rules, x, 2)
    assert relative_l2(found, expected) < EXACT


def test_they_differ_from_the_gradient() -> None:
    """Else nothing above would show anything."""
    model, x = network("2-d"), points("2-d")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    guided, deconv = (ruled(model, rules, x, 2) for rules, _ in BOTH)
    for one, other in ((guided, gradient), (deconv, gradient), (guided, deconv)):
        assert relative_l2(one, other) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    model, x = network("mlp").to(dtype), points("mlp").to(dtype)
    expected = ruled(copy.deepcopy(model).double(), Guided(), x.double(), 1)
    assert relative_l2(ruled(model, Guided(), x, 1), expected) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", SHAPES)
def test_softplus_is_the_smooth_model_twice_differentiable(kind: str) -> None:
    beta = 2.5
    x, direction = points(kind), points(kind, seed=1)
    found = _curved(RulesExecutor(network(kind), Softplus(beta)), x, direction)
    smooth = network(kind, lambda: nn.Softplus(beta, 40))
    expected = _curved(lambda points, *_: smooth(*points), x, direction)
    for one, other in zip(found, expected, strict=True):
        assert relative_l2(one, other) < 1e-10
    with torch.no_grad():
        scores = RulesExecutor(network(kind), Softplus(beta))([x], (), {})
    assert relative_l2(scores, found[0]) < EXACT


def _curved(executor: Any, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradients and Hessian-vector products."""
    leaf = x.clone().requires_grad_()
    raw = executor([leaf.view_as(leaf)], (), {})
    (first,) = torch.autograd.grad(raw[:, 1].sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    return raw.detach(), first, second


class _InnerGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(x.relu().sum(), x, create_graph=True)
        return found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_InnerGradient(), "takes gradients of its own"),
        (torch.jit.script(Row(nn.ReLU())[0]), "cannot see into scripted code"),
        (nn.Sequential(torch.jit.script(nn.ReLU())), "RecursiveScriptModule at '0'"),
    ],
)
def test_what_rules_cannot_see_is_an_error(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ruled(model, Guided(), points("mlp"), 1)


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return torch.relu(x) * 2.0


@pytest.mark.parametrize(
    "rules", [Guided(), Softplus(), composite("epsilon")], ids=lambda rules: rules.name
)
def test_scripted_functions_are_an_error_at_every_run(rules: Any) -> None:
    """PyTorch runs them in another way each of the first times."""
    model = Row(nn.Linear(7, 5), Functional(_scripted), nn.Linear(5, 4)).double()
    for _ in range(4):
        with pytest.raises(ModelError, match="such as a scripted function"):
            ruled(model, rules, points("mlp"), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind(error: type[BaseException]) -> None:
    def fails(x: Tensor) -> Tensor:
        raise error

    model = nn.Sequential(nn.Linear(7, 4), nn.ReLU(), Functional(fails)).double()
    with pytest.raises(error):
        ruled(model, Guided(), points("mlp"), 1)
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    (plain,) = torch.autograd.grad(x.relu(), x, torch.tensor([-1.0, -1.0]))
    assert plain.tolist() == [0.0, -1.0]
    assert not any(one._backward_hooks or one._forward_hooks for one in model.modules())
