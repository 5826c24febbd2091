"""Deletion and insertion against a loop over steps, and against Quantus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.metrics.faithfulness import Deletion, Insertion
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate import naive_curves as naive
from tests.models import SHAPES, Audio, Image, Tabular, Video, make, randn

TARGET = torch.tensor([1, 4])


class Softmaxed(nn.Sequential):
    """A model that ends in softmax: its "logits" are shares."""

    def __init__(self) -> None:
        super().__init__(Image(), nn.Softmax(1))


def _case(kind: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    shape = (2, *SHAPES[Image if kind is Softmaxed else kind])
    # Maps with ties.
    return make(kind), randn(*shape), (randn(*shape, seed=1) * 4).round() / 4


def _agree(found: Outcome, model: nn.Module, x: Tensor, values: Tensor, fill: Tensor) -> None:
    assert found.curve is not None
    told = found.parameters
    elements = x[0].numel() if told["per"] == "element" or x.dim() == 2 else x[0, 0].numel()
    counts = [round(float(share) * elements) for share in found.curve.x]
    shares = [count / elements for count in counts]
    assert found.curve.x.tolist() == pytest.approx(shares, abs=1e-15)
    assert (counts[0], counts[-1]) == (0, elements)
    assert len(counts) == told["steps"] + 1
    for number in range(len(x)):
        expected = naive.walk(
            *(model, x[number], values[number], int(TARGET[number]), fill[number], counts),
            insert=found.metric == "insertion",
            **{name: told[name] for name in ("output", "per", "order")},
        )
        assert found.curve.y[number].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        area = naive.area(shares, expected)
        assert float(found.values[number]) == pytest.approx(area, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kind", [Tabular, Audio, Image, Video, Softmaxed])
@pytest.mark.parametrize("metric", [Deletion, Insertion])
@pytest.mark.parametrize("per", ["place", "element"])
def test_any_shape_is_the_loop(kind: type[nn.Module], metric: Any, per: str) -> None:
    model, x, values = _case(kind)
    found = metric(steps=5, per=per)(model, x, values, target=TARGET)
    _agree(found, model, x, values, torch.zeros_like(x))


@pytest.mark.parametrize("substrate", ["zero", "mean", "blur", "uniform", -0.7, "row", "batch"])
@pytest.mark.parametrize("metric", [Deletion, Insertion])
@pytest.mark.parametrize("output", ["softmax", "logit"])
def test_any_substrate_is_the_loop(substrate: Any, metric: Any, output: str) -> None:
    model, x, values = _case(Image)
    own = {"row": randn(3, 1, 1, seed=5), "batch": randn(2, 3, 12, 12, seed=5)}
    substrate = own.get(substrate, substrate)
    found = metric(substrate, output, steps=6, seed=3)(model, x, values, target=TARGET)
    given = isinstance(substrate, Tensor)
    _agree(
        found,
        model,
        x,
        values,
        naive.fill_of(substrate, x, 3) if not given else substrate.expand_as(x),
    )
    stated = f"tensor {list(substrate.shape)}" if given else substrate
    assert found.parameters["substrate"] == stated


@pytest.mark.parametrize(
    "options",
    [
        {"order": "least_first", "steps": 7},
        {"step_size": 10},
        {"step_size": 144},
        {"step_size": 1000},
        {"steps": 1},
        {"steps": 1000},
        {"step_size": 100, "per": "element", "order": "least_first"},
    ],
)
@pytest.mark.parametrize("metric", [Deletion, Insertion])
def test_any_step_is_the_loop(options: dict[str, Any], metric: Any) -> None:
    model, x, values = _case(Image)
    found = metric(**options)(model, x, values, target=TARGET)
    _agree(found, model, x, values, torch.zeros_like(x))


def test_maps_without_channels_are_the_same_for_all_of_them() -> None:
    model, x, values = _case(Image)
    flat = values.sum(1)
    for metric in (Deletion(steps=9), Insertion(steps=9)):
        expected = metric(model, x, values, target=TARGET).values
        for maps in (flat, flat[:, None]):
            assert torch.equal(metric(model, x, maps, target=TARGET).values, expected)
    element = Deletion(per="element", steps=9)
    found = element(model, x, flat, target=TARGET)
    _agree(found, model, x, flat[:, None], torch.zeros_like(x))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("softmax", [True, False])
def test_numbers_are_those_of_quantus(channels: int, batch: int, softmax: bool) -> None:
    quantus = pytest.importorskip("quantus")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 5))
    x, values = (randn(batch, channels, 12, 12, seed=seed).float() for seed in (0, 1))
    # What Quantus calls black is each example's least value.
    x = x.relu()
    y = torch.arange(batch) % 5
    output = "softmax" if softmax else "logit"
    found = Deletion(output=output, per="element", step_size=12)(model.eval(), x, values, target=y)
    theirs = quantus.PixelFlipping(
        features_in_step=12,
        perturb_baseline="black",
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    expected = theirs(
        model=model,
        x_batch=x.numpy(),
        y_batch=y.numpy(),
        a_batch=values.numpy().copy(),
        softmax=softmax,
    )
    assert found.curve is not None
    np.testing.assert_allclose(found.curve.y[:, 1:].numpy(), np.array(expected), atol=1e-6, rtol=0)


def test_perfect_maps_come_before_random_ones() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:30], samples.labels[:30]
    inside = torch.zeros(30, 64, 64)
    for number, (top, left, bottom, right) in enumerate(samples.boxes[:30].tolist()):
        inside[number, top:bottom, left:right] = 1.0
    drawn = random_map(model, x)
    # Of what is deleted into black any scattered few places already take the decision away.
    for metric, sign in ((Deletion("blur", "logit", steps=20), -1.0), (Insertion(steps=20), 1.0)):
        perfect = metric(model, x, inside, target=target)
        random = metric(model, x, drawn, target=target)
        gap = perfect.over(random, 0.99)
        assert min(sign * gap.low, sign * gap.high) > 0
        assert perfect.better == ("higher" if sign > 0 else "lower")
