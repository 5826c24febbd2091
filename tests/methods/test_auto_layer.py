"""`layer="auto"` of class activation maps: a layer between the explained input and its score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, ModelError, RepeatedLayerError


def _block(before: int, after: int, classes: int | None = None) -> nn.Sequential:
    last = [] if classes is None else [nn.Conv2d(after, classes, 1)]
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), *last)


class Segments(nn.Module):
    """A segmentation network with an auxiliary head, which runs last."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.answer = _block(3, 8), answer
        self.head, self.auxiliary = _block(8, 9, 5), _block(8, 6, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return self.answer(self.head(y), self.auxiliary(y))


class Detached(Segments):
    """The same under no_grad, for methods that look at scores alone."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


ANSWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "mapping": (lambda head, auxiliary: {"out": head, "aux": auxiliary}, (2,)),
    "tuple": (
        lambda head, auxiliary: (head, auxiliary),
        lambda out: out[0].flatten(2).mean(2)[:, 2],
    ),
    "stacked": (lambda head, auxiliary: torch.stack([head, auxiliary], 1), (0, 2)),
    "concatenated": (lambda head, auxiliary: torch.cat([head, auxiliary], 1).mean((2, 3)), 2),
    "not read": (lambda head, auxiliary: head.mean((2, 3)), 2),
    "function": (
        lambda head, auxiliary: {"aux": auxiliary, "out": head},
        lambda out: out["out"].flatten(2).mean(2)[:, 2],
    ),
}
METHODS = (sf.GradCAM(), sf.EigenCAM(), sf.ScoreCAM(), sf.LayerCAM(), sf.GradCAMPlusPlus())


def _model(kind: type[Segments], answer: str) -> Segments:
    torch.manual_seed(0)
    return kind(ANSWERS[answer][0]).eval().double()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
def test_an_auxiliary_head_is_passed_over(method: Any, answer: str) -> None:
    model, x = _model(Segments, answer), torch.randn(2, 3, 12, 12).double()
    found = sf.explain(model, x, target=ANSWERS[answer][1], method=method)
    (layer,) = found.provenance.at
    # A head that ends in classes of its own size is what the model returns.
    assert layer == ("head.1" if answer in ("mapping", "tuple", "function") else "head")
    named = sf.explain(model, x, target=ANSWERS[answer][1], method=method, at=layer)
    assert torch.equal(found.values, named.values)


@pytest.mark.parametrize("method", [sf.EigenCAM(), sf.ScoreCAM()], ids=lambda one: one.name)
def test_models_without_a_gradient(method: Any) -> None:
    model, x = _model(Detached, "mapping"), torch.randn(2, 3, 12, 12).double()
    assert sf.explain(model, x, target=(2,), method=method).provenance.at == ["head.1"]


def test_the_layer_follows_the_target() -> None:
    """Classes of two heads of one output, by one engine; in one call they share no last layer."""
    model, x = _model(Segments, "concatenated"), torch.randn(2, 3, 12, 12).double()
    engine = sf.Engine(model, sf.EigenCAM())
    assert engine(x, 2).provenance.at == ["head"]
    assert engine(x, 7).provenance.at == ["auxiliary"]
    assert engine(x, 2).provenance.at == ["head"]
    assert engine(x, [2, 7]).provenance.at == ["body"]


class Towers(nn.Module):
    """The similarity of a picture and another one, which runs through a tower of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other = _block(3, 8), _block(3, 8)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        mine, other = self.mine(x).mean((2, 3)), self.other(other).mean((2, 3))
        return (mine * other).sum(1, keepdim=True)


def test_the_tower_of_another_input_is_passed_over() -> None:
    torch.manual_seed(0)
    model, (x, other) = Towers().eval(), torch.rand(2, 2, 3, 12, 12)
    found = sf.explain(model, x, target=0, method=sf.EigenCAM(), forward_args=(other,))
    assert found.provenance.at == ["mine"]


def test_an_error_where_the_scores_depend_on_no_layer() -> None:
    class Deaf(Segments):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return x.mean((2, 3))

    torch.manual_seed(0)
    model = Deaf(ANSWERS["not read"][0]).eval()
    with pytest.raises(InputError, match="explained scores depend on"):
        sf.explain(model, torch.rand(1, 3, 12, 12), target=0, method=sf.EigenCAM())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_named_layer_that_the_score_is_not_made_from(frozen: bool) -> None:
    model = _model(Segments, "mapping").requires_grad_(not frozen)
    x = torch.randn(2, 3, 12, 12).double()
    with pytest.raises(ModelError, match=r"does not depend on the layer Conv2d.*auxiliary head"):
        sf.explain(model, x, target=(2,), method=sf.GradCAM(), at="auxiliary.0")
    with pytest.raises(ModelError, match="auxiliary head"):
        sf.explain(model, x, target=(2,), at="auxiliary.0")


def test_a_layer_of_two_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = _block(3, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cosine_similarity(*(self.tower(x).mean((2, 3)) for x in (a, b)))

    a, b = torch.rand(2, 2, 3, 8, 8)
    with pytest.raises(RepeatedLayerError, match="forward_args"):
        sf.explain(Pair().eval(), (a, b), method=sf.GradCAM(), at="tower.0")
