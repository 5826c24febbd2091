"""Maps of zeros say why, and inputs that no score depends on have zeros; once per call."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
import saliency_fast.evaluate as ev
from saliency_fast.errors import ModelError

A, B = torch.rand(2, 3).double() + 0.1, torch.rand(2, 4).double() + 0.1


def warned(call: Any, *, here: bool = True) -> tuple[Any, list[str]]:
    """The answer, and what was warned of; here: all of it at this file."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = call()
    own = [one for one in seen if str(one.message).startswith("saliency_fast")]
    assert not here or all(one.filename == __file__ for one in own)
    return found, [str(one.message) for one in own]


class Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(-x.flatten(1).abs() - 1.0).sum(1) + 0.25


STEP = torch.tensor([10.0, 0.1, 0.1]).double()
WHY = {
    "softmax": (
        lambda x: torch.softmax(torch.stack([x.sum(1) * 1e5, x[:, 0]], 1), 1)[:, 0],
        "logit",
    ),
    "sigmoid": (lambda x: torch.sigmoid(-1e5 * x.sum(1)), "logit"),
    "rectifiers": (Dead(), "rectifiers that are all off"),
    "constant": (lambda x: 0 * x.sum(1) + 0.5, "score 0.5"),
}
HOW = {
    "explain": lambda model, method: sf.explain(model, A, method=method),
    "engine": lambda model, method: sf.Engine(model, method)(A),
    "stream": lambda model, method: [*sf.Engine(model, method).stream(A)][-1],
    "submit": lambda model, method: sf.Engine(model, method).submit(A).result(),
}
GRADIENTS = ["gradient", "input_x_gradient", "smoothgrad", "deeplift"]


@pytest.mark.parametrize("name", WHY)
@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("how", HOW)
def test_a_map_of_zeros_says_what_was_seen(name: str, method: str, how: str) -> None:
    model, words = WHY[name]
    if method == "deeplift" and name != "rectifiers":
        pytest.skip("its rules are about calls that these functions do not make")
    found, said = warned(lambda: HOW[how](model, method), here=how != "submit")
    assert not bool(found.values.any())
    assert len(said) == 1
    assert "zero everywhere for examples [0, 1]" in said[0]
    assert "every gradient exactly 0" in said[0]
    assert words in said[0]


def test_only_the_examples_concerned_are_named() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0]])
    found, said = warned(lambda: sf.explain(lambda x: torch.relu(x).sum(1), x, method="gradient"))
    assert len(said) == 1
    assert "examples [1] (score 0," in said[0]
    assert found.values[0].tolist() == [1.0, 1.0]
    _, said = warned(lambda: sf.explain(lambda x: x.sum(1), x, method="gradient"))
    assert said == []


def test_an_input_that_equals_its_baseline() -> None:
    x = torch.zeros(1, 3)
    for method in ("integrated_gradients", "input_x_gradient", "feature_ablation"):
        _, said = warned(lambda method=method: sf.explain(lambda x: x.sum(1), x, method=method))
        assert len(said) == 1
        assert "equals its baseline" in said[0]


def test_scores_that_never_change() -> None:
    _, said = warned(lambda: sf.explain(Dead(), A, method="feature_ablation"))
    assert len(said) == 1
    assert "the score is the same at all points" in said[0]


@pytest.mark.parametrize("method", ["grad_cam", "layer_cam", "hires_cam", "xgrad_cam"])
def test_class_activation_maps_of_zeros(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[4].weight[1] = -model[4].weight[1].abs()
    x = torch.rand(2, 3, 8, 8)
    found, said = warned(lambda: sf.explain(model, x, target=1, method=method, at="1"))
    assert not bool(found.values.any())
    assert len(said) == 1
    assert "evidence is against the target" in said[0]
    with torch.no_grad():
        model[4].weight.zero_()
    _, said = warned(lambda: sf.explain(model, x, target=1, method=method, at="1"))
    assert len(said) == 1
    assert "do not depend on any position" in said[0]


def test_metrics_tell_of_zeros_in_their_own_words() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(2, 3, 2, 2)
    with torch.no_grad():
        model[1].weight.zero_()
    own = {"target": 1, "method": "gradient"}
    _, said = warned(lambda: ev.MaxSensitivity(samples=2)(model, x, torch.rand(2, 3, 2, 2), **own))
    assert not any("zero" in one for one in said)


SUMS = ["gradient", "integrated_gradients", "smoothgrad", "expected_gradients", "deeplift"]


@pytest.mark.parametrize("method", SUMS)
def test_zeros_for_inputs_that_no_score_depends_on(method: str) -> None:
    class First(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return torch.relu(a).pow(2).sum(1)

    model = First()
    right = sf.explain(lambda a: torch.relu(a).pow(2).sum(1), A, method=method).values
    for _ in range(2):
        found, said = warned(lambda: sf.explain(model, (A, B, B + 1), method=method))
        torch.testing.assert_close(found.values[0], right)
        assert not bool(found.values[1].any() | found.values[2].any())
        assert len(said) == 1
        assert "input 1 and input 2" in said[0]
        assert "forward_args" in said[0]


def test_an_input_that_is_used_without_a_gradient_is_an_error() -> None:
    for model in (
        lambda a, b: a.sum(1) + b.detach().sum(1),
        lambda a, b: a.sum(1) * b.argmax(1),
        lambda a, b: a.sum(1) + b.round().long().sum(1),
    ):
        with pytest.raises(ModelError, match=r"input 1.*forward_args"):
            sf.explain(model, (A, B), method="gradient")


def test_what_was_unused_may_be_used_later() -> None:
    class Sometimes(nn.Module):
        on = False

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.sum(1) + (b.sum(1) if self.on else 0.0)

    model = Sometimes()
    found, said = warned(lambda: sf.explain(model, (A, B), method="gradient"))
    assert not bool(found.values[1].any())
    assert len(said) == 1
    model.on = True
    found, said = warned(lambda: sf.explain(model, (A, B), method="gradient"))
    assert bool((found.values[1] == 1).all())
    assert said == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_input_that_one_example_uses(order: tuple[int, int]) -> None:
    """Which of them is the first does not matter."""

    def model(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([(a * b if float(a) > 0 else a) for a, b in zip(x, y, strict=True)])

    x, y = torch.tensor([[-1.0], [2.0]])[list(order)], torch.tensor([[3.0], [4.0]])[list(order)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        of_x, of_y = sf.explain(model, (x, y), method="gradient").values
    assert of_x.flatten()[list(order)].tolist() == [1.0, 4.0]
    assert of_y.flatten()[list(order)].tolist() == [0.0, 2.0]
