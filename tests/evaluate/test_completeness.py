"""Completeness against scores asked by hand and against the engine's own delta."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.baselines import read_baselines
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metrics.completeness import Completeness
from tests.models import Image, Tabular, make, randn

TARGET = torch.tensor([0, 3, 1])


def _linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 4).double().eval()


@pytest.mark.parametrize("substrate", ["zero", "mean", "uniform", 0.5, "tensor"])
@pytest.mark.parametrize("output", ["logit", "softmax"])
def test_gaps_are_those_of_scores_asked_by_hand(substrate: Any, output: str) -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    values = randn(3, 3, 12, 12, seed=1)
    fill: Any = randn(3, 1, 1, seed=2) if substrate == "tensor" else substrate
    metric = Completeness(fill, output)
    found = metric(model, x, values, target=TARGET)

    def score(at: Tensor) -> Tensor:
        with torch.no_grad():
            raw = model(at)
        return (raw if output == "logit" else raw.softmax(1)).gather(1, TARGET[:, None])[:, 0]

    base = read_baselines(0.0 if substrate == "zero" else fill, (x,))[0].expand_as(x)
    gain = score(x) - score(base)
    gap = values.flatten(1).sum(1) - gain
    torch.testing.assert_close(found.details["gain"], gain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.details["gap"], gap, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.values, gap.abs() / gain.abs(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("method", "baseline"),
    [
        ("integrated_gradients", None),
        ("integrated_gradients", "blur"),
        ("integrated_gradients", [0.0, "mean", "uniform"]),
        ("expected_gradients", "set"),
        ("blur_ig", None),
        ("input_x_gradient", None),
        ("shapley_sampling", 0.5),
    ],
)
def test_the_gap_is_the_delta_of_the_attribution(method: str, baseline: Any) -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    baseline = randn(5, 3, 12, 12, seed=3) if baseline == "set" else baseline
    maps = sf.explain(model, x, target=TARGET, method=method, baseline=baseline)
    found = Completeness()(model, x, maps)
    if maps.delta is None:
        base = read_baselines(baseline, (x,))[0].expand_as(x)
        with torch.no_grad():
            gain = (model(x) - model(base)).gather(1, TARGET[:, None])[:, 0]
        delta = maps.values.flatten(1).sum(1) - gain
    else:
        delta = maps.delta
    torch.testing.assert_close(found.details["gap"], delta, rtol=1e-9, atol=1e-11)


def test_linear_models_are_complete_and_zero_maps_miss_everything() -> None:
    model, x = _linear(), randn(3, 6)
    exact = model.weight.detach()[TARGET] * x
    found = Completeness(tolerance=1e-9)(model, x, exact, target=TARGET)
    assert found.passed is True
    assert found.threshold == 1e-9
    missed = Completeness(tolerance=0.99)(model, x, torch.zeros_like(x), target=TARGET)
    torch.testing.assert_close(missed.values, torch.ones(3, dtype=torch.float64))
    assert missed.passed is False
    assert Completeness()(model, x, exact, target=TARGET).passed is None


def test_no_gain_says_nothing() -> None:
    model = _linear()
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[1] = 1.0
    found = Completeness(tolerance=10.0)(model, x, x, target=1)
    assert math.isnan(found.values[0])
    assert math.isfinite(found.values[1])
    assert found.details["gap"][0].item() == 0.0
    assert "1 of 2 examples score as their baseline does" in found.caveats[0]
    nothing = Completeness(tolerance=10.0)(model, x[:1], x[:1], target=1)
    assert nothing.passed is None


def test_what_counts_is_stated() -> None:
    model, x = make(Tabular), randn(3, 7)
    maps = sf.explain(model, x, target=0, baseline=["mean", 1.0])
    stated = Completeness()(model, x, maps).parameters
    assert stated["substrate"] == ["mean", 1.0]
    assert stated["output"] == "logit"
    assert Completeness()(model, x, x, target=0).parameters["substrate"] == "zero"
    own = Completeness(torch.ones(7).double())(model, x, x, target=0).parameters["substrate"]
    assert own == "tensor [7]"


@pytest.mark.parametrize(
    ("options", "raised", "words"),
    [
        ({"substrate": "black"}, InputError, "substrate must be one of zero"),
        ({"output": "probability"}, InputError, "output must be one of"),
        ({"tolerance": -0.1}, InputError, "tolerance must be 0 or more"),
        ({"tolerance": "low"}, InputTypeError, "tolerance must be a number"),
    ],
)
def test_options_are_checked(options: dict[str, Any], raised: type[Exception], words: str) -> None:
    with pytest.raises(raised, match=words):
        Completeness(**options)


def test_a_model_is_needed() -> None:
    x = randn(2, 7)
    with pytest.raises(InputError, match="completeness needs model"):
        Completeness()(None, x, x)
