"""Bad input to evaluation: what is wrong is told with what was expected, never a raw error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import BudgetError, InputError, InputTypeError, ModelError
from saliency_fast.evaluate.inputs import read_evaluation_input
from saliency_fast.evaluate.metrics.completeness import Completeness
from saliency_fast.evaluate.metrics.faithfulness import Deletion, Insertion
from saliency_fast.evaluate.metrics.localisation import EnergyInBox, PointingGame, TopKIoU
from saliency_fast.evaluate.scores import SUMS, probabilities
from tests.models import Image, Tabular, make, randn

NAN, INF = float("nan"), float("inf")
METRICS = [Deletion(steps=2), Insertion(steps=2), PointingGame(), EnergyInBox(), TopKIoU()]


def _x() -> Tensor:
    return randn(2, 3, 12, 12)


def _with(value: float) -> Tensor:
    values = _x()
    values[1, 0, 0, 0] = value
    return values


def _evaluate(metric: Any = METRICS[0], **given: Any) -> Any:
    given = {"model": make(Image), "inputs": _x(), "maps": _x(), "target": 1} | given
    given.setdefault("boxes", [[0, 0, 3, 3]] * 2)
    return metric(given.pop("model"), given.pop("inputs"), given.pop("maps"), **given)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("given", "raised", "words"),
    [
        ({"inputs": _x()[:0]}, InputError, r"the input is empty: got \[0, 3, 12, 12\]"),
        ({"inputs": _x()[:0], "maps": _x()[:0]}, InputError, "the input is empty"),
        ({"inputs": (_x(), _x())}, InputTypeError, "must be one tensor: got tuple; pass what"),
        ({"inputs": _x().numpy()}, InputTypeError, "must be one tensor: got ndarray"),
        ({"inputs": _x().long()}, InputTypeError, "the input must be float32"),
        (
            {"inputs": _with(NAN)},
            (InputError, ModelError),
            "the input holds NaN or infinity|the model gives NaN",
        ),
        ({"inputs": torch.ones(3)}, InputError, "must have a batch axis"),
        ({"maps": None}, InputTypeError, "maps must be a floating tensor or an Attribution"),
        ({"maps": _x().numpy()}, InputTypeError, "got ndarray; use torch.as_tensor"),
        ({"maps": _x().long()}, InputTypeError, "got torch.int64"),
        ({"maps": _x()[:0]}, InputError, "maps must match the inputs"),
        ({"maps": _x()[:1]}, InputError, "maps must match the inputs"),
        ({"maps": _x()[..., :6]}, InputError, r"got \[2, 3, 12, 6\], expected \[2, 3, 12, 12\]"),
        ({"maps": _x()[:, :2]}, InputError, r"or that without channels \[2, 12, 12\]"),
        ({"maps": _x()[0, 0]}, InputError, "maps must match the inputs"),
        ({"maps": _with(NAN)}, InputError, r"maps must be finite: examples \[1\] hold NaN"),
        ({"maps": _with(INF)}, InputError, r"maps must be finite: examples \[1\]"),
        ({"inputs": _x().float(), "maps": _with(1e300)}, InputError, "infinity in torch.float32"),
        ({"target": [0, 1, 2]}, InputError, "target has the wrong length: got 3"),
        ({"target": -1}, InputError, "target out of range: got -1"),
        ({"target": 1.5}, InputTypeError, "target must be None, an int"),
        ({"target": "best"}, InputError, "the only name is 'predicted'"),
        ({"target": [[0, 1], [1, 2]]}, InputError, "target must be one per example.*got 2 of each"),
        ({"boxes": [[0, 0, 13, 5]] * 2}, InputError, "inside of the image.*stop <= 12 on axis 0"),
        ({"boxes": [[0, -1, 3, 5]] * 2}, InputError, "expected 0 <= start.* on axis 1"),
        ({"boxes": [[0, 0, 3, 3], [3, 3, 3, 5]]}, InputError, r"box 1 is \[3, 3, 3, 5\]"),
        ({"boxes": [[0, 0, 3, 3]]}, InputError, r"got \[1, 4\] for 2 inputs"),
        ({"boxes": [[0, 0, 3]] * 2}, InputError, r"boxes must be \[B, 4\].*got \[2, 3\]"),
        ({"boxes": [[0, 0, 3, 5], [1]]}, InputTypeError, "boxes must be a tensor of corners"),
        ({"boxes": [[0.0, 0, 3, 5]] * 2}, InputTypeError, "whole numbers or bool masks.*.long()"),
        (
            {"boxes": torch.ones(2, 12, 12).long()},
            InputTypeError,
            "masks must be bool: got.*bool()",
        ),
        ({"boxes": "box"}, InputTypeError, "boxes must be a tensor of corners or masks: got str"),
        ({"boxes": []}, InputError, r"boxes must be \[B, 4\].*got \[0\] for 2 inputs"),
        ({"boxes": torch.zeros(2, 12, 12).bool()}, InputError, "masks must hold something"),
        ({"boxes": torch.ones(2, 9, 12).bool()}, InputError, r"expected \[2, 12, 12\]"),
        ({"method": "grad"}, InputError, "method must be one of gradient"),
    ],
)
def test_evaluation_inputs_are_checked_for_every_metric(
    metric: Any, given: dict[str, Any], raised: type[Exception], words: str
) -> None:
    with pytest.raises(raised, match=words):
        _evaluate(metric, **given)


NOT_FINITE = "substrate must be finite|infinite scores for points.*another substrate"
"""Curves read scores alone, and ask the model, which does not take it."""


@pytest.mark.parametrize("metric", [Deletion, Insertion, Completeness])
@pytest.mark.parametrize(
    ("substrate", "raised", "words"),
    [
        (torch.zeros(5).double(), InputError, "must match x or broadcast to it: got .5.*'zero'"),
        (randn(3, 3, 12, 12), InputError, "substrate must match x"),
        (_x() * NAN, (InputError, ModelError), NOT_FINITE),
        (NAN, (InputError, ModelError), NOT_FINITE),
        (INF, (InputError, ModelError), NOT_FINITE),
        (True, InputTypeError, "got bool"),
        ([0.0], InputTypeError, "got list"),
        ("white", InputError, "substrate must be one of zero, blur, mean, uniform"),
    ],
)
def test_substrates_that_do_not_fit(
    metric: Any, substrate: Any, raised: type[Exception], words: str
) -> None:
    with pytest.raises(raised, match=words):
        _evaluate(metric(substrate))


def test_features_have_no_blur() -> None:
    with pytest.raises(InputError, match="substrate='blur' needs axes of time or space"):
        Deletion("blur")(make(Tabular), randn(2, 7), randn(2, 7), target=1)


class _One(nn.Module):
    """One number per example, as [B, 1] or [B]."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        found = x.flatten(1).sum(1, keepdim=True)
        return found[:, 0] if self.flat else found


@pytest.mark.parametrize("flat", [True, False])
def test_one_number_has_a_logit_and_no_softmax(flat: bool) -> None:
    x = _x()
    for target in (None, lambda raw: raw.reshape(-1)):
        with pytest.raises(InputError, match="output='softmax' needs several classes"):
            _evaluate(model=_One(flat), target=target)
        found = Deletion(output="logit", steps=1)(_One(flat), x, x, target=target)
        assert found.curve is not None
        torch.testing.assert_close(found.curve.y[:, 0], x.flatten(1).sum(1))
        assert found.curve.y[:, 1].tolist() == [0.0, 0.0]
    words = "needs a model that returns" if flat else "target='predicted' needs several classes"
    with pytest.raises(InputError, match=words):
        _evaluate(model=_One(flat), target="predicted")


@pytest.mark.parametrize("target", [(1,), lambda raw: raw[:, 1]])
def test_other_targets_have_logits(target: Any) -> None:
    x, model = _x(), make(Image)
    metric = Insertion(output="logit", steps=4)
    expected = metric(model, x, x, target=1).values
    torch.testing.assert_close(metric(model, x, x, target=target).values, expected)


@pytest.mark.parametrize(
    ("given", "raised", "words"),
    [
        ({"target": 5}, InputError, "target must lie in the model's 5 classes: got 5"),
        ({"target": [0, 9]}, InputError, "got 9, expected 0 to 4"),
        ({"target": None}, InputError, "target is missing"),
        ({"model": None}, InputError, "deletion needs model.*pass the model"),
        ({"model": 3}, InputTypeError, "model must be callable: got int"),
        ({"model": lambda x: "text"}, ModelError, "must return a tensor"),
        ({"model": lambda x: x}, InputError, r"returns \[B, classes\]: got \[\d, 3, 12, 12\]"),
        ({"model": lambda x: x.flatten(1)[:1]}, InputError, r"got \[1, 432\] for 2 inputs"),
        ({"model": lambda x: x.flatten(1) * NAN}, ModelError, "NaN or infinite scores"),
        (
            {"model": lambda x: x.flatten(1) / x.flatten(1).abs().amax(1, keepdim=True)},
            ModelError,
            r"infinite scores for points made of examples \[0, 1\].*another substrate",
        ),
        ({"memory_budget": 10}, BudgetError, "memory_budget is smaller than one point"),
    ],
)
def test_what_the_model_says_is_checked(
    given: dict[str, Any], raised: type[Exception], words: str
) -> None:
    with pytest.raises(raised, match=words):
        _evaluate(**given)


@pytest.mark.parametrize("metric", [Deletion(steps=4), Insertion(steps=4)])
def test_budgets_bind_points_and_not_maps_that_are_never_made(metric: Any) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 5)).double(), randn(16, 3, 48, 48)
    expected = metric(model, x, x, target=1)
    # One map of every example would be 0.9 MB, and one point is a tenth of that.
    found = metric(model, x, x, target=1, memory_budget="1MiB")
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-12)


def test_maps_of_layers_and_of_several_targets_are_refused() -> None:
    model, x = make(Image), _x()
    layer = sf.explain(model, x, target=1, at="4", method="gradient")
    with pytest.raises(InputError, match="got those of the layer 4; resize them"):
        _evaluate(model=model, inputs=x, maps=layer, target=None)
    many = sf.explain(model, x, target=[[0, 1], [1, 2]], method="gradient")
    with pytest.raises(InputError, match="got several targets; take one of them"):
        _evaluate(model=model, inputs=x, maps=many, target=None)


def test_attributions_bring_their_target_method_and_baseline() -> None:
    model, x = make(Image), _x()
    maps = sf.explain(model, x, target=[3, 0], method=sf.IntegratedGradients(), baseline="mean")
    data = read_evaluation_input(model, x, maps)
    assert isinstance(data.target, Tensor)
    assert data.target.tolist() == [3, 0]
    assert data.baseline == "mean"
    torch.testing.assert_close(data.explain(x), maps.values)
    own = read_evaluation_input(model, x, maps, target=1, method="gradient", baseline=None)
    assert own.target == 1


def test_methods_are_needed_by_who_explains_again() -> None:
    data = read_evaluation_input(make(Image), _x(), _x(), target=1)
    with pytest.raises(InputError, match="method is missing: this metric explains again"):
        data.explain(_x())
    by_hand = read_evaluation_input(
        make(Image), _x(), _x(), target=1, method=lambda model, inputs, target: inputs[:, :, :3]
    )
    with pytest.raises(InputError, match="maps must match the inputs"):
        by_hand.explain(_x())


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Image()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x), 0.5, training=True)


@pytest.mark.parametrize("metric", [Deletion(steps=3), Insertion(steps=3), Completeness()])
def test_models_that_answer_twice_differently_are_told(metric: Any) -> None:
    torch.manual_seed(0)
    found = _evaluate(metric, model=_Noisy().double())
    assert any("the model is not deterministic: two runs" in one for one in found.caveats)
    assert not any("deterministic" in one for one in _evaluate(metric).caveats)
    # Dropout of a model in training mode is off where it is evaluated.
    trained = make(Image).train()
    assert not any("deterministic" in one for one in _evaluate(metric, model=trained).caveats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_reach_the_model_as_they_are(dtype: torch.dtype) -> None:
    model, x, values = make(Image).to(dtype), _x().to(dtype), randn(2, 3, 12, 12, seed=1)
    found = Deletion("mean", steps=6)(model, x, values.to(dtype), target=1)
    exact = make(Image).to(dtype).double()
    expected = Deletion("mean", steps=6)(exact, x.double(), values.to(dtype).double(), target=1)
    # A model of five layers in a type of so many digits.
    close = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.values, expected.values, rtol=close, atol=close)
    again = read_evaluation_input(model, x, values, target=1, method="gradient").explain(x.float())
    assert again.shape == x.shape


def test_boxes_and_masks_are_the_same_thing() -> None:
    x = _x()
    boxes = np.array([[1, 2, 5, 6], [0, 0, 12, 12]])
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    for number, (top, left, bottom, right) in enumerate(boxes):
        masks[number, top:bottom, left:right] = True
    for given in (boxes, boxes.tolist(), torch.as_tensor(boxes), masks, masks[:, None]):
        data = read_evaluation_input(None, x, x, boxes=given)
        assert data.masks is not None
        assert torch.equal(data.masks, masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_half_types_stay_as_they_are(dtype: torch.dtype) -> None:
    output = randn(64, 50).float().softmax(1).to(dtype)
    # Rounded one by one, they do not add up to one to four digits.
    assert ((output.float().sum(1) - 1.0).abs() > SUMS).any()
    assert torch.equal(probabilities(output, output.float()), output.float())
