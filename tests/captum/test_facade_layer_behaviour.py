"""Layer methods and rules keep modes, leave nothing and refuse what Captum refuses."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from saliency_fast.errors import InputError
from tests.captum.facade_models import Normed, Recurrent
from tests.captum.layer_models import IDS, Paired, Plane, Residual, Worded
from tests.captum.test_facade_errors import raised, words
from tests.captum.test_facade_gradients import agree
from tests.models import make, randn

X, ROWS = randn(3, 2, 8, 8), randn(3, 7)
CALLS: dict[str, Callable[[Any, nn.Module, Tensor], Any]] = {
    "activation": lambda one, m, x: one.LayerActivation(m, m[2]).attribute(x),
    "gradient": lambda one, m, x: one.LayerGradientXActivation(m, m[2]).attribute(x, 1),
    "gradient at an input": lambda one, m, x: one.LayerGradientXActivation(m, m[1]).attribute(
        x, 1, attribute_to_layer_input=True
    ),
    "cam": lambda one, m, x: one.LayerGradCam(m, m[0]).attribute(x, 1),
    "path": lambda one, m, x: one.LayerIntegratedGradients(m, m[1]).attribute(
        x, target=1, n_steps=4, return_convergence_delta=True
    ),
    "DeepLift": lambda one, m, x: one.DeepLift(m).attribute(x, target=1),
    "guided": lambda one, m, x: one.GuidedBackprop(m).attribute(x, 1),
}


class Rectified(Normed):
    def __init__(self) -> None:
        super().__init__()
        self[2] = nn.ReLU()


@pytest.mark.parametrize("name", CALLS)
def test_batch_norm_in_training_mode_at_layers(name: str) -> None:
    """Rows depend on each other, as in Captum; statistics come back."""
    answers = []
    for library in (captum.attr, facade):
        model = make(Rectified).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        answers.append(CALLS[name](library, model, ROWS.clone()))
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    both = [one if isinstance(one, tuple) else (one,) for one in answers]
    for found, expected in zip(both[1], both[0], strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CALLS)
def test_layers_and_inputs_are_left_alone(name: str) -> None:
    model = make(Rectified)
    for wants in (False, True):
        x = ROWS.clone().requires_grad_(wants)
        found = CALLS[name](facade, model, x)
        maps = found[0] if isinstance(found, tuple) else found
        assert (x.requires_grad, x.grad, x._backward_hooks) == (wants, None, None)
        assert torch.equal(x, ROWS)
        assert maps.grad_fn is None
        assert not maps.requires_grad
        for module in model.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            assert not any(hooks)
            assert not {"activations", "input", "output", "rule"} & set(vars(module))
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", CALLS)
def test_models_are_not_kept_alive(name: str) -> None:
    model = make(Rectified)
    CALLS[name](facade, model, ROWS)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None


TUNNELLED: dict[str, Callable[[Any, nn.Module], Any]] = {
    "path": lambda one, m: one.LayerIntegratedGradients(m, m.body[3]),
    "cam": lambda one, m: one.LayerGradCam(m, m.body[3]),
    "gradient": lambda one, m: one.LayerGradientXActivation(m, m.body[3]),
    "guided": lambda one, m: one.GuidedBackprop(m),
    "guided cam": lambda one, m: one.GuidedGradCam(m, m.body[3]),
    "DeepLift": lambda one, m: one.DeepLift(m),
}


@pytest.mark.parametrize("name", TUNNELLED)
def test_tunnels_of_either_library(name: str) -> None:
    model, answers = make(Plane), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for outer in (captum.attr, facade):
            for inner in (captum.attr, facade):
                tunnel = outer.NoiseTunnel(TUNNELLED[name](inner, model))
                answers.append(tunnel.attribute(X.clone(), nt_samples=3, stdevs=0.0, target=1))
    for found in answers[1:]:
        torch.testing.assert_close(found.detach(), answers[0].detach(), rtol=1e-9, atol=1e-12)


def test_layers_of_functions_and_bound_methods() -> None:
    model = make(Plane)
    expected = facade.LayerGradCam(model, model.body[3]).attribute(X, 1)
    for forward in (model.forward, lambda x: model(x), nn.DataParallel(model)):
        found = facade.LayerGradCam(forward, model.body[3], device_ids=[0]).attribute(X, 1)
        agree(found, expected, 1e-12)


def test_outputs_of_recurrent_layers_without_their_states() -> None:
    model, x = make(Recurrent), randn(3, 5, 4)
    found = facade.LayerIntegratedGradients(model, model.cells).attribute(x, target=1, n_steps=3)
    assert found.shape == (3, 5, 6)
    hidden = model.cells(x)[0]
    gradient = model.head.weight[1].expand(3, 6)
    start = model.cells(torch.zeros_like(x))[0]
    expected = ((hidden - start)[:, -1] * gradient).detach()
    torch.testing.assert_close(found[:, -1], expected, rtol=1e-6, atol=1e-9)
    assert not found[:, :-1].any()


def test_unseen_layers_need_materialized_gradients() -> None:
    model, layers = make(Plane), ["body.3", "body.4"]
    chosen = [model.get_submodule(name) for name in layers]
    answers = []
    for library in (captum.attr, facade):
        method = library.LayerIntegratedGradients(model, chosen)
        of = {"target": 1, "n_steps": 3, "grad_kwargs": {"materialize_grads": True}}
        answers.append(method.attribute(X, **of))
        with pytest.raises(RuntimeError):
            method.attribute(X, target=1, n_steps=3)
    agree(answers[1], answers[0], 1e-10, 1e-30)


def test_interpolate() -> None:
    maps = randn(2, 1, 3, 4)
    for of in ((5,), ((6, 9),), ((6, 9), "bilinear")):
        both = [one.LayerAttribution.interpolate(maps, *of) for one in (captum.attr, facade)]
        assert torch.equal(*both)


def test_an_input_that_grad_cam_does_not_fit_gets_an_empty_map() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plane = Plane()

        def forward(self, x: Tensor, row: Tensor) -> Tensor:
            return self.plane(x) * row.sum(1, keepdim=True)

    model, pair = make(Both), (X, randn(3, 7))
    for library in (captum.attr, facade):
        with pytest.warns(UserWarning, match="Couldn't appropriately interpolate"):
            maps = library.GuidedGradCam(model, model.plane.body[3]).attribute(pair, 1)
        assert [one.shape for one in maps] == [X.shape, (0,)]


def test_functional_rectifiers_have_rules_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(7, 9), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).relu())

    model = make(Functional)
    modules = nn.Sequential(model.first, nn.ReLU(), model.head)
    for name in ("GuidedBackprop", "Deconvolution", "DeepLift"):
        found = getattr(facade, name)(model).attribute(ROWS, target=1)
        agree(found, getattr(captum.attr, name)(modules).attribute(ROWS.clone(), target=1), 1e-10)


def test_modules_may_be_used_again() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(7, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 3)).double()
    values, delta = facade.DeepLift(model).attribute(ROWS, target=1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-10 * float(values.abs().sum())


class Idle(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def _idle(method: str) -> Callable[[Any], Any]:
    def call(library: Any) -> Any:
        model = Idle(nn.Linear(7, 3), nn.Linear(3, 3)).double()
        return getattr(library, method)(model, model[1]).attribute(ROWS, target=1)

    return call


def _of(kind: type[nn.Module], name: str, layer: str, x: Any, **of: Any) -> Callable[[Any], Any]:
    def call(library: Any) -> Any:
        model = make(kind)
        return getattr(library, name)(model, model.get_submodule(layer)).attribute(x, **of)

    return call


BAD: dict[str, Callable[[Any], Any]] = {
    "a layer that does not run": _idle("LayerGradientXActivation"),
    "a layer that does not run, for a path": _idle("LayerIntegratedGradients"),
    "no target": _of(Plane, "LayerGradCam", "body.0", X),
    "no target for a path": _of(Plane, "LayerIntegratedGradients", "body.3", X),
    "no target at an input": _of(Plane, "LayerGradCam", "flat", X, attribute_to_layer_input=True),
    "targets too many": _of(Plane, "LayerGradCam", "body.0", X, target=[1, 2]),
    "no steps": _of(Plane, "LayerIntegratedGradients", "body.0", X, target=1, n_steps=0),
    "baselines of another shape": _of(
        Plane, "LayerIntegratedGradients", "body.0", X, baselines=X[:2], target=1
    ),
    "several maps": _of(Paired, "GuidedGradCam", "pair", ROWS, target=1),
    "ids have no gradient": _of(
        Worded, "LayerGradientXActivation", "words", IDS, target=1, attribute_to_layer_input=True
    ),
    "guided needs a module": lambda one: one.GuidedBackprop(lambda x: x),
    "baseline of DeepLift": lambda one: one.DeepLift(make(Plane)).attribute(X, X[:2], 1),
    "baselines of DeepLift too few": lambda one: one.DeepLift(make(Plane)).attribute(X, (0, 0), 1),
    "targets of DeepLift": lambda one: one.DeepLift(make(Plane)).attribute(X, target=[1] * 5),
    "targets of LRP": lambda one: one.LRP(make(Residual)).attribute(X.clone(), [1] * 5),
    "target of LRP": lambda one: one.LRP(make(Residual)).attribute(X.clone()),
    "one baseline for a set": lambda one: one.DeepLiftShap(make(Plane)).attribute(X, X[:1], 1),
    "a number for a set": lambda one: one.DeepLiftShap(make(Plane)).attribute(X, 0.0, 1),
    "no function": lambda one: one.DeepLift(make(Plane)).attribute(
        X.clone(), target=1, custom_attribution_func=3
    ),
    "a function of four": lambda one: one.DeepLift(make(Plane)).attribute(
        X.clone(), target=1, custom_attribution_func=lambda a, b, c, d: a
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_same_kind_and_leading_words_at_layers(name: str) -> None:
    theirs, ours = raised(BAD[name], captum.attr), raised(BAD[name], facade)
    assert isinstance(ours, type(theirs)), (theirs, ours)
    if isinstance(theirs, AssertionError):
        assert isinstance(ours, InputError)
        assert words(ours) == words(theirs)


def test_compiled_models_and_inference_mode() -> None:
    model = make(Plane)
    compiled = torch.compile(model, backend="eager")
    methods: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "cam": lambda m, x: facade.LayerGradCam(m, model.body[3]).attribute(x, 1),
        "at an input": lambda m, x: facade.LayerGradCam(m, model.body[3]).attribute(
            x, 1, attribute_to_layer_input=True
        ),
        "path": lambda m, x: facade.LayerIntegratedGradients(m, model.body[3]).attribute(
            x, target=1, n_steps=3
        ),
        "activation": lambda m, x: facade.LayerActivation(m, model.body[3]).attribute(x),
        "guided": lambda m, x: facade.GuidedBackprop(m).attribute(x, 1),
        "DeepLift": lambda m, x: facade.DeepLift(m).attribute(x, target=1),
    }
    compiled(X)
    for call in methods.values():
        expected = call(model, X)
        agree(call(compiled, X), expected, 1e-12)
        with torch.inference_mode():
            agree(call(model, X.clone()), expected, 1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_the_model_leaves_no_hooks(name: str) -> None:
    class BrokenError(Exception):
        pass

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise BrokenError

    model = make(Rectified)
    model[1] = Broken(9, 9).double()
    with pytest.raises(BrokenError):
        CALLS[name](facade, model, ROWS)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
