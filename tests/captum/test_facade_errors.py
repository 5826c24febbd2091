"""Bad arguments raise what Captum raises, with its leading words, and say what cures them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor

import saliency_fast.captum as facade
from saliency_fast.errors import InputError
from tests.models import Multimodal, Scalar, Segmenter, Tabular, make, randn

X = randn(3, 7)
PAIR = (randn(3, 3, 12, 12), X)


def saliency(kind: Any, inputs: Any, **of: Any) -> Callable[[Any], Any]:
    return lambda library: library.Saliency(make(kind)).attribute(inputs, **of)


def path(kind: Any, inputs: Any, **of: Any) -> Callable[[Any], Any]:
    return lambda library: library.IntegratedGradients(make(kind)).attribute(inputs, **of)


def tunnel(inputs: Any = X, **of: Any) -> Callable[[Any], Any]:
    def call(library: Any) -> Any:
        method = library.IntegratedGradients(make(Tabular))
        return library.NoiseTunnel(method).attribute(inputs, target=1, n_steps=3, **of)

    return call


def shap(baselines: Any, inputs: Any = X, **of: Any) -> Callable[[Any], Any]:
    return lambda library: library.GradientShap(make(Tabular)).attribute(
        inputs, baselines, target=1, **of
    )


def delta(attributions: Any, **of: Any) -> Callable[[Any], Any]:
    return lambda library: library.IntegratedGradients(make(Tabular)).compute_convergence_delta(
        attributions, 0, X, **of
    )


BAD: dict[str, Callable[[Any], Any]] = {
    "no target": saliency(Tabular, X),
    "no target for a path": path(Tabular, X),
    "a target that leaves a map": saliency(Segmenter, PAIR[0], target=1),
    "target out of range": saliency(Tabular, X, target=9),
    "target in a tuple out of range": saliency(Tabular, X, target=(-8,)),
    "targets out of range": saliency(Tabular, X, target=[0, 1, 9]),
    "targets as a tensor out of range": path(Tabular, X, target=torch.tensor([0, 1, 9])),
    "negative targets in a list": saliency(Tabular, X, target=[0, 1, -1]),
    "places out of range": saliency(Tabular, X, target=[(0,), (1,), (9,)]),
    "targets too many": saliency(Tabular, X, target=[0, 1, 2, 3]),
    "targets too many for a path": path(Tabular, X, target=[0, 1, 2, 3]),
    "target tensor of another length": saliency(Tabular, X, target=torch.tensor([0, 1])),
    "targets of an output that is no matrix": saliency(Segmenter, PAIR[0], target=[0, 1, 2]),
    "target of an output [B]": saliency(Scalar, X, target=1),
    "a tuple too long": saliency(Tabular, X, target=(1, 2)),
    "target of the wrong type": saliency(Tabular, X, target="cat"),
    "targets of the wrong type": saliency(Tabular, X, target=[0.5, 1.5, 2.5]),
    "inputs in a list": saliency(Tabular, [X], target=1),
    "inputs of the wrong type": path(Tabular, 3.0, target=1),
    "an input of the wrong type": saliency(Multimodal, (PAIR[0], 3.0), target=1),
    "baseline of another shape": path(Tabular, X, baselines=randn(2, 7), target=1),
    "baseline of the wrong type": path(Tabular, X, baselines="zeros", target=1),
    "baselines too few": path(Multimodal, PAIR, baselines=0.0, target=1),
    "steps below zero": path(Tabular, X, n_steps=-1, target=1),
    "no steps": path(Tabular, X, n_steps=0, target=1),
    "one Riemann step": path(Tabular, X, n_steps=1, method="riemann_left", target=1),
    "unknown rule": path(Tabular, X, method="simpson", target=1),
    "unknown smoothing": tunnel(nt_type="median"),
    "whole deviation": tunnel(stdevs=1),
    "deviations too many": tunnel(stdevs=(1.0, 1.0)),
    "baselines of a tunnel": tunnel(baselines=randn(2, 7)),
    "a set of another shape": tunnel(baselines=randn(2, 6), draw_baseline_from_distrib=True),
    "no set": shap(0.0),
    "set of another shape": shap(randn(4, 6)),
    "sets too few": shap(randn(4, 7), (X, X)),
    "attributions of another length": delta(randn(2, 7), target=1),
    "targets of a delta": delta(X, target=[1, 2]),
    "an argument that it does not know": saliency(Tabular, X, target=1, abs_=True),
}


def raised(call: Callable[[Any], Any], library: Any) -> BaseException:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            call(library)
        except Exception as error:
            return error
    pytest.fail(f"{library.__name__} raises nothing")


def words(error: BaseException) -> list[str]:
    return re.findall(r"[A-Za-z_`]+", str(error))[:4]


@pytest.mark.parametrize("name", BAD)
def test_same_kind_and_leading_words(name: str) -> None:
    theirs, ours = raised(BAD[name], captum.attr), raised(BAD[name], facade)
    assert isinstance(ours, type(theirs)), ours
    assert words(ours) == words(theirs)
    if isinstance(theirs, AssertionError):
        assert isinstance(ours, InputError)
        assert isinstance(ours, ValueError)


def test_a_models_own_error_comes_through() -> None:
    class BrokenError(Exception):
        pass

    def model(x: Tensor) -> Tensor:
        raise BrokenError("by itself")

    with pytest.raises(BrokenError, match="by itself"):
        facade.Saliency(model).attribute(X)


def test_samples() -> None:
    with pytest.raises(AssertionError, match="1 or more: got 0"):
        tunnel(nt_samples=0)(facade)
    with pytest.raises(ValueError, match="1 or more: got -2"):
        tunnel(nt_samples_batch_size=-2)(facade)


def test_a_model_that_gives_nothing_to_differentiate() -> None:
    for call in (
        lambda one: one.Saliency(lambda x: x.detach().sum(1)).attribute(X),
        lambda one: one.Saliency(lambda x, y: x.sum(1)).attribute((X, X.clone())),
    ):
        assert isinstance(raised(call, captum.attr), RuntimeError)
        assert isinstance(raised(call, facade), RuntimeError)
