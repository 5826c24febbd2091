"""The facade gives Captum's numbers, shapes and types wherever Captum is deterministic."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast.captum as facade
from tests.captum import facade_models as own
from tests.captum.facade_calls import CALLS, DELTA, PAIR, Call
from tests.models import Image, Multimodal, Tabular, make, randn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def agree(found: Any, expected: Any, tolerance: float, scale: float = 0.0) -> None:
    """Same structure, shapes and types; relative L2, of `scale` where that is larger."""
    if isinstance(expected, (tuple, list)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            agree(one, other, tolerance, scale)
        return
    assert not found.requires_grad
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    gap = float((found - expected).detach().double().norm())
    assert gap <= tolerance * max(scale, float(expected.detach().double().norm()))


def scale_of(answer: Any) -> float:
    """What a delta is a difference of: the size of the maps. 1 where all is zero."""
    maps = answer[0] if isinstance(answer[0], (tuple, list)) else answer
    return max(1.0, *(float(one.detach().abs().sum()) for one in maps))


def quiet(call: Call, library: Any, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return call.answer(library, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_same_numbers(call: Call, dtype: torch.dtype) -> None:
    expected, found = (quiet(call, one, dtype) for one in (captum.attr, facade))
    variance = (call.tunnel or {}).get("nt_type") == "vargrad"
    if call.of.get("return_convergence_delta"):
        agree(found[1], expected[1], TOLERANCE[dtype], scale_of(expected))
        found, expected = found[0], expected[0]
    # Without noise a variance is what rounding leaves.
    agree(found, expected, TOLERANCE[dtype], scale_of((expected,)) if variance else 1e-30)


def test_whole_numbers_make_floating_paths() -> None:
    model, x = make(Tabular).float(), torch.arange(21).view(3, 7)
    expected, found = (
        one.IntegratedGradients(model).attribute(x, torch.tensor([[3] * 7]), 1, n_steps=6)
        for one in (captum.attr, facade)
    )
    agree(found, expected, 1e-5)


@pytest.mark.parametrize("kind", [Tabular, own.Recurrent])
@pytest.mark.parametrize("form", ["tensor", "function", "function of inputs"])
@pytest.mark.parametrize("multiply", [True, False])
def test_gradient_shap_on_numpys_draws(kind: type[nn.Module], form: str, multiply: bool) -> None:
    shape = (7,) if kind is Tabular else (5, 4)
    model, x, rows = make(kind), randn(3, *shape), randn(6, *shape, seed=4)
    baselines = {"tensor": rows, "function": lambda: rows, "function of inputs": lambda x: rows}
    answers = []
    for library in (captum.attr, facade):
        np.random.seed(3)
        method = library.GradientShap(model, multiply)
        of = {"n_samples": 7, "target": [0, 2, 1], **DELTA}
        answers.append(method.attribute(x, baselines[form], **of))
    agree(answers[1], answers[0], 1e-10, scale_of(answers[0]))
    assert answers[1][1].shape == (21,)


def test_gradient_shap_of_two_inputs() -> None:
    """Rows are drawn for each input on its own, and a number is a baseline of all but the first."""
    model, answers = make(Multimodal), []
    for baselines in ((PAIR[0][:2], PAIR[1]), (PAIR[0][:2], 0.3)):
        for library in (captum.attr, facade):
            np.random.seed(3)
            of = {"target": 1, "additional_forward_args": randn(3, seed=3)}
            answers.append(library.GradientShap(model).attribute(PAIR, baselines, **of))
        agree(answers[-1], answers[-2], 1e-10)


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("method", ["Saliency", "InputXGradient"])
def test_noise_has_the_same_distribution(kind: str, method: str) -> None:
    """Independent means of n samples differ by sqrt(2 / n) deviations; five of them at most."""
    model, x, n = make(Tabular), randn(2, 7), 4000
    answers = []
    for library in (captum.attr, facade):
        torch.manual_seed(1)
        tunnel = library.NoiseTunnel(getattr(library, method)(model))
        of = {"nt_samples": n, "stdevs": 0.3, "target": 1}
        answers.append([tunnel.attribute(x, nt_type=one, **of) for one in (kind, "vargrad")])
    (expected, variance), (found, _) = answers
    spread = variance.sqrt() if kind == "smoothgrad" else found.abs() + variance
    assert bool(((found - expected).abs() < 5 * spread * (2 / n) ** 0.5 * 2).all())
    assert not torch.equal(found, expected)


def test_noise_per_input() -> None:
    model = make(Multimodal)
    tunnel = facade.NoiseTunnel(facade.InputXGradient(model))
    maps = tunnel.attribute(PAIR, stdevs=(0.0, 0.5), target=1, nt_type="vargrad", nt_samples=8)
    assert float(maps[1].min()) > 0
    with pytest.raises(AssertionError, match="number of input tensors"):
        tunnel.attribute(PAIR, stdevs=(0.5,), target=1)


@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "IntegratedGradients"])
def test_each_may_wrap_the_others(name: str) -> None:
    model, x = make(Tabular), randn(3, 7)
    of: dict[str, Any] = {"stdevs": 0.0, "target": [0, 2, 1], "nt_type": "smoothgrad_sq"}
    if name == "IntegratedGradients":
        of |= DELTA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        answers = [
            outer.NoiseTunnel(getattr(inner, name)(model)).attribute(x, **of)
            for outer in (captum.attr, facade)
            for inner in (captum.attr, facade)
        ]
    for found in answers[1:]:
        detached = found if isinstance(found, tuple) else (found,)
        first = answers[0] if isinstance(answers[0], tuple) else (answers[0],)
        agree(detached, first, 1e-10, scale_of(first))


class Doubled(facade.GradientAttribution):
    """A user's own method, without a decorator."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        return 2.0 * self.gradient_func(self.forward_func, inputs, target)[0]


def test_a_users_own_method() -> None:
    model, x = make(Tabular), randn(3, 7)
    expected = 2.0 * captum.attr.Saliency(model).attribute(x, 1, abs=False)
    found = facade.NoiseTunnel(Doubled(model)).attribute(x, target=1, stdevs=0.0)
    agree(found, expected, 1e-10)
    assert Doubled.get_name() == "Doubled"


@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "IntegratedGradients"])
def test_a_gradient_function_of_ones_own(name: str) -> None:
    model, x, answers = make(Tabular), randn(3, 7), []
    for library in (captum.attr, facade):
        method = getattr(library, name)(model)
        method.gradient_func = own.squared_gradients
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            answers.append(method.attribute(x, target=[0, 2, 1]).detach())
    agree(answers[1], answers[0], 1e-10)


SHARED = [name for name in facade.__all__ if hasattr(captum.attr, name)]
NAMES = [name for name in SHARED if inspect.isclass(getattr(facade, name))]


@pytest.mark.parametrize("name", NAMES)
def test_same_signatures_and_facts(name: str) -> None:
    theirs, ours = getattr(captum.attr, name), getattr(facade, name)
    for member in ("__init__", "attribute", "compute_convergence_delta"):
        if not hasattr(theirs, member):
            continue
        pairs = zip(
            inspect.signature(getattr(theirs, member)).parameters.values(),
            inspect.signature(getattr(ours, member)).parameters.values(),
            strict=True,
        )
        for a, b in pairs:
            assert (a.name, a.kind) == (b.name, b.kind)
            both = callable(a.default) and callable(b.default)
            assert a.default == b.default or (both and a.default.__name__ == b.default.__name__)
    assert theirs.get_name() == ours.get_name()
    # What LimeBase is made of has a test of its own.
    if "attribute" in vars(ours) and name != "LimeBase":
        assert callable(ours.attribute.__wrapped__)
        model = nn.Sequential(nn.Linear(2, 2))
        made = []
        for library, one in ((captum.attr, theirs), (facade, ours)):
            layer = (model[0],) if "layer" in inspect.signature(one.__init__).parameters else ()
            first = library.Saliency(model) if name == "NoiseTunnel" else model
            made.append(one(first, *layer))
        assert made[0].multiplies_by_inputs == made[1].multiplies_by_inputs
        assert made[0].has_convergence_delta() == made[1].has_convergence_delta()
        promise = getattr(theirs, "attribute_future", None)
        if promise is None or len(inspect.signature(promise).parameters) == 1:
            with pytest.raises(NotImplementedError):
                made[1].attribute_future()


def test_delta_is_what_compute_convergence_delta_returns() -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    method = facade.IntegratedGradients(model)
    values, delta = method.attribute(x, 0.2, [0, 2, 1], n_steps=9, return_convergence_delta=True)
    assert torch.equal(delta, method.compute_convergence_delta(values, 0.2, x, [0, 2, 1]))
    gain = model(x) - model(torch.full_like(x, 0.2))
    expected = values.flatten(1).sum(1) - gain[torch.arange(3), [0, 2, 1]]
    assert torch.allclose(delta, expected, atol=1e-12)
