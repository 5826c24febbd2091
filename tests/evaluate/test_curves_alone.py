"""Curves depend on nothing but their example, ask no point twice, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_fast.errors import InputError, ModelError
from saliency_fast.evaluate.metrics.faithfulness import Deletion, Insertion
from tests.models import Image, Tabular, Video, make, randn
from tests.traces import Notes

TARGET = torch.tensor([0, 1, 2, 3, 4])
METRICS = [Deletion(steps=30), Insertion("mean", steps=30), Deletion("uniform", steps=30)]


class Counting(nn.Module):
    """Says how many rows it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes(rows=[])

    def forward(self, x: Tensor) -> Tensor:
        self.notes.rows.append(x.detach().clone())
        return torch.stack([x.flatten(1).sum(1), x.flatten(1).square().sum(1)], 1)


class Failing(nn.Module):
    """Breaks at the first point that is not an input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.notes = Image(), Notes(seen=0)

    def forward(self, x: Tensor) -> Tensor:
        self.notes.seen += 1
        if self.notes.seen > 2:
            raise KeyError("broken")
        return self.inner(x)


@pytest.mark.parametrize("metric", METRICS)
def test_an_example_does_not_depend_on_its_batch(metric: Any) -> None:
    model, x, values = make(Image), randn(5, 3, 12, 12), randn(5, 3, 12, 12, seed=1)
    together = metric(model, x, values, target=TARGET)
    for one in range(5):
        own = slice(one, one + 1)
        alone = metric(model, x[own], values[own], target=TARGET[own])
        torch.testing.assert_close(alone.curve.y[0], together.curve.y[one], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("limit", [{"points_per_launch": 1}, {"points_per_launch": 7}])
def test_launches_change_nothing(metric: Any, limit: dict[str, int]) -> None:
    model, x, values = make(Video), randn(2, 2, 5, 7, 6), randn(2, 2, 5, 7, 6, seed=1)
    expected = metric(model, x, values, target=1)
    found = metric(model, x, values, target=1, **limit)
    torch.testing.assert_close(found.curve.y, expected.curve.y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_strides_change_nothing(metric: Any) -> None:
    model, x, values = make(Image), randn(2, 3, 12, 12), randn(2, 3, 12, 12, seed=1)
    last = [one.contiguous(memory_format=torch.channels_last) for one in (x, values)]
    expected = metric(model, x, values, target=1)
    assert torch.equal(metric(model, *last, target=1).curve.y, expected.curve.y)
    assert torch.equal(
        metric(model, x, values.mT.contiguous().mT, target=1).values, expected.values
    )


def test_black_taken_from_black_is_not_asked_again() -> None:
    x = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    x[0, 0, 0, :3] = torch.tensor([1.0, 2.0, 3.0]).double()
    x[1, 0, 5, 5] = 4.0
    values = torch.arange(36.0).flip(0).view(1, 1, 6, 6).expand(2, 1, 6, 6).double()
    model = Counting()
    found = Deletion(output="logit", steps=36)(model, x, values, target=0, layout="BCHW")
    assert found.curve is not None
    assert found.curve.y[0].tolist() == [6.0, 5.0, 3.0] + [0.0] * 34
    assert found.curve.y[1].tolist() == [4.0] * 36 + [0.0]
    # Four distinct points of one example and two of the other, out of 2 * 37.
    # Rows that a launch is proved beside are dense, and far from all others.
    alone = [row for rows in model.notes.rows for row in rows if int((row != 0).sum()) <= 3]
    assert len({tuple(row.flatten().tolist()) for row in alone}) == 5
    assert len(alone) < 37


def test_the_first_and_the_last_point_are_the_input_and_its_substrate() -> None:
    model, x, values = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    y = TARGET[:3]
    deleted = Deletion("mean", "logit", steps=3)(model, x, values, target=y).curve
    inserted = Insertion("mean", "logit", steps=3)(model, x, values, target=y).curve
    assert deleted is not None
    assert inserted is not None
    with torch.no_grad():
        means = x.mean((2, 3), keepdim=True).expand_as(x)
        ends = [model(one).gather(1, y[:, None])[:, 0] for one in (x, means)]
    for own, expected in (
        (deleted.y[:, 0], ends[0]),
        (deleted.y[:, -1], ends[1]),
        (inserted.y[:, 0], ends[1]),
        (inserted.y[:, -1], ends[0]),
    ):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_predicted_is_looked_up_once_at_the_inputs() -> None:
    model, x, values = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    found = Deletion(steps=10)(model, x, values, target="predicted").values
    classes = model(x).argmax(1)
    assert torch.equal(found, Deletion(steps=10)(model, x, values, target=classes).values)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make(Image).train(training)
    model[9].eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    modes = [one.training for one in model.modules()]
    x, values = randn(2, 3, 12, 12), randn(2, 3, 12, 12, seed=1)
    found = Deletion(steps=5)(model, x, values, target=1)
    assert [one.training for one in model.modules()] == modes
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    expected = Deletion(steps=5)(model.eval(), x, values, target=1)
    assert torch.equal(found.values, expected.values)
    assert found.caveats == ()


def test_also_after_an_error() -> None:
    model = Failing().double().train()
    x = randn(2, 3, 12, 12)
    with pytest.raises(ModelError, match="KeyError: 'broken'"):
        Deletion(steps=5)(model, x, x, target=1, points_per_launch=1)
    assert all(one.training for one in model.modules())
    assert not any(one._forward_hooks for one in model.modules())


@pytest.mark.parametrize("metric", [Deletion, Insertion])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": None}, "steps must be a whole number"),
        ({"step_size": 0}, "step_size must be a whole number"),
        ({"step_size": True}, "step_size must be a whole number"),
        ({"per": "pixel"}, "per must be one of place, element"),
        ({"order": "random"}, "order must be one of most_first, least_first"),
        ({"output": "probability"}, "output must be one of softmax, logit"),
        ({"substrate": "black"}, "substrate must be one of zero"),
    ],
)
def test_options_are_checked(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        metric(**options)


def test_float32_stays_close_to_float64() -> None:
    model, x, values = make(Tabular), randn(3, 7), randn(3, 7, seed=1)
    expected = Deletion()(model, x, values, target=1)
    found = Deletion()(model.float(), x.float(), values.float(), target=1)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)
