"""The facade keeps modes and leaves no trace; seeds reproduce; the engine's lean way serves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from saliency_fast.captum import attribution
from tests.captum import facade_models as own
from tests.configured import RECORDED, configure
from tests.models import Image, Tabular, make, randn

X = randn(3, 7)


def dropping(model: nn.Module) -> nn.Module:
    found = nn.Sequential(nn.Dropout(), model).eval()
    found[0].train()
    return found


STOCHASTIC: dict[str, Callable[[nn.Module], Any]] = {
    "fused": lambda m: facade.NoiseTunnel(facade.Saliency(m)).attribute(X, target=1),
    "tunnel": lambda m: facade.NoiseTunnel(facade.InputXGradient(m)).attribute(X, target=1),
    "shap": lambda m: facade.GradientShap(m).attribute(X, randn(5, 7), target=1),
    "noisy shap": lambda m: facade.GradientShap(m).attribute(X, randn(5, 7), stdevs=0.3, target=1),
    "dropout": lambda m: facade.Saliency(nn.Sequential(nn.Dropout(), m)).attribute(X, target=1),
    "a layer in training mode": lambda m: facade.Saliency(dropping(m)).attribute(X, target=1),
    "dropout in a function": lambda m: facade.Saliency(
        lambda x: m(torch.dropout(x, 0.5, True))
    ).attribute(X, target=1),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_reproduce_and_calls_differ(name: str) -> None:
    model, found = make(Tabular), []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(5)
        found.append([STOCHASTIC[name](model) for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])


def test_numpys_seed_alone_reproduces_shap_without_noise() -> None:
    found = []
    for _ in range(2):
        np.random.seed(5)
        found.append(STOCHASTIC["shap"](make(Tabular)))
    assert torch.equal(found[0], found[1])


def test_examples_have_noise_of_their_own() -> None:
    torch.manual_seed(0)
    same = X[:1].expand(3, 7)
    for method in (facade.Saliency, facade.InputXGradient):
        maps = facade.NoiseTunnel(method(make(Tabular))).attribute(same, target=1)
        assert not torch.equal(maps[0], maps[1])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_noise_does_not_depend_on_how_samples_are_split(size: int) -> None:
    model, found = make(Tabular), []
    for at_once in (None, size):
        for method in (facade.Saliency, facade.InputXGradient):
            torch.manual_seed(5)
            tunnel = facade.NoiseTunnel(method(model))
            of = {"nt_samples": 7, "nt_samples_batch_size": at_once, "target": 1}
            found.append(tunnel.attribute(X, **of))
    for one, other in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


CALLS: dict[str, Callable[[Any, nn.Module, Tensor], Any]] = {
    "Saliency": lambda one, m, x: one.Saliency(m).attribute(x, 1),
    "InputXGradient": lambda one, m, x: one.InputXGradient(m).attribute(x, 1),
    "IntegratedGradients": lambda one, m, x: one.IntegratedGradients(m).attribute(
        x, target=1, n_steps=5, return_convergence_delta=True
    ),
}


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "method": lambda model: model.forward,
    "function": lambda model: lambda x: model(x),
    "partial": lambda model: partial(lambda scale, x: model(x) * scale, 1.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_batch_norm_in_training_mode(name: str, form: str) -> None:
    """As in Captum rows depend on each other; statistics come back, which Captum does not do."""
    answers = []
    for library in (captum.attr, facade):
        model = make(own.Normed).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        answers.append(CALLS[name](library, FORMS[form](model), X.clone()))
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for found, expected in zip(answers[1], answers[0], strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left(name: str) -> None:
    model = make(Image)
    for wants in (False, True):
        x = randn(3, 3, 12, 12).requires_grad_(wants)
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
        found = CALLS[name](facade, model, x)
        maps = found[0] if isinstance(found, tuple) else found
        assert (x.requires_grad, x.grad, x._backward_hooks) == (wants, None, None)
        assert not maps.requires_grad
        assert maps.grad_fn is None
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]


def test_an_error_leaves_statistics_and_modes() -> None:
    model = make(own.Normed).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AssertionError, match="Target not provided"):
        facade.IntegratedGradients(model).attribute(X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_function_is_read_at_call_time() -> None:
    method = facade.Saliency(lambda x: x.sum(1))
    method.forward_func = lambda x: (2.0 * x).sum(1)
    assert torch.equal(method.attribute(X), torch.full_like(X, 2.0))


def test_any_callable() -> None:
    model = make(Tabular)
    expected = facade.Saliency(model).attribute(X, 1)
    for one in (model.forward, lambda x: model(x), lambda *of: model(*of), Called(model)):
        torch.testing.assert_close(facade.Saliency(one).attribute(X, 1), expected)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(facade.Saliency(model).attribute(X.clone(), 1), expected)


class Called:
    """A callable that can be no key."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_later_objects_profit_from_what_earlier_ones_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What points took is found out once for a model, for whatever object and target."""
    configure(monkeypatch, **RECORDED)
    plain = make(Image).float()
    x, y = randn(2, 3, 96, 96).float(), randn(2, 3, 96, 96, seed=1).float()
    facade.IntegratedGradients(plain).attribute(x, target=1, n_steps=8)
    known = attribution.calibrations_of(plain)
    ways = [str(probe.strategy) for probe in known.values()]
    assert ways
    assert all("recorded" in way for way in ways)
    assert any(probe.strategy.prefix is not None for probe in known.values())
    before = [id(probe) for probe in known.values()]
    for target in (2, [0, 3], (1,)):
        found = facade.IntegratedGradients(plain).attribute(y, target=target, n_steps=8)
        expected = captum.attr.IntegratedGradients(plain).attribute(y, target=target, n_steps=8)
        assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert [id(probe) for probe in attribution.calibrations_of(plain).values()] == before


def around(model: nn.Module, factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).softmax(1) * factor


def test_functions_made_anew_are_known_by_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by what they close over: other numbers, layers and weights are no other's recording."""
    configure(monkeypatch, **RECORDED)
    plain, x = make(Image).float(), randn(2, 3, 96, 96).float()

    known = []
    for factor in (1.0, 1.0, 3.0, 1.0):
        found, expected = (
            library.IntegratedGradients(around(plain, factor)).attribute(x, target=1, n_steps=8)
            for library in (facade, captum.attr)
        )
        assert float((found - expected).norm() / expected.norm()) < 1e-4
        known.append(
            [probe for one in attribution._CALIBRATIONS[plain].values() for probe in one.values()]
        )
    assert known[0][0] is known[1][0]
    assert known[1][0] is not known[2][0]
    gone = weakref.ref(plain)
    del plain, known
    gc.collect()
    assert gone() is None


def test_whole_batches_are_found_out_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax as a module, and one number for a batch: the batch is one example."""
    configure(monkeypatch, **RECORDED)
    model, x = nn.Sequential(make(Tabular), nn.Softmax(1)).double(), randn(3, 7)
    known = []
    for _ in range(2):
        facade.DeepLift(model).attribute(x, target=1)
        facade.LayerDeepLift(model, model[0]).attribute(x, target=1)
        facade.FeatureAblation(model).attribute(x)
        several = attribution._CALIBRATIONS[model].values()
        known.append([id(probe.cost) for one in several for probe in one.values()])
    assert known[0] == known[1]
    assert known[0]


def test_what_is_known_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "MOST_CALIBRATIONS", 3)
    model, x = make(Tabular), randn(3, 7)
    method = facade.IntegratedGradients(lambda x, w: model(x).sum() + w.sum())
    for count in range(1, 7):
        method.attribute(x, additional_forward_args=torch.ones(count), n_steps=2)
    assert len(attribution._CALIBRATIONS[model]) <= 3


def test_models_are_let_go() -> None:
    model = make(Image)
    facade.IntegratedGradients(model).attribute(randn(2, 3, 12, 12), target=1, n_steps=4)
    facade.Saliency(model.forward).attribute(randn(2, 3, 12, 12), target=1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "target", [1, (1,), torch.tensor(1), torch.tensor([0, 1])], ids=["int", "tuple", "one", "many"]
)
def test_targets_that_recorded_launches_serve(target: Any) -> None:
    """The engine gets numbers, and a function only for what it has no form for."""
    first = next(attribution.engine_targets(target, 2))
    assert not callable(first)
    assert all(map(callable, attribution.engine_targets((-1,), 2)))


def test_facts_of_instances() -> None:
    method = facade.IntegratedGradients(len, multiply_by_inputs=False)
    assert not method.multiplies_by_inputs
    assert method.has_convergence_delta()
    assert isinstance(method, facade.GradientAttribution)
    assert isinstance(method, facade.Attribution)
    assert not isinstance(method, facade.PerturbationAttribution)
    tunnel = facade.NoiseTunnel(method)
    assert not tunnel.multiplies_by_inputs
    assert tunnel.has_convergence_delta()
    x = X.clone().requires_grad_()
    grads = method.gradient_func(make(Tabular), (x,), 1, None)
    assert torch.allclose(grads[0], facade.Saliency(make(Tabular)).attribute(X, 1, abs=False))
