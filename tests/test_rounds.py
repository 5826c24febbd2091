"""Methods that ask in rounds: answers, launches, partial maps, requests, what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError
from saliency_fast.model.layers import LayerTaps
from tests.models import Image, Multimodal, make, randn
from tests.naive import relative_l2


@dataclass(frozen=True)
class Zeroed:
    """What the score loses without each element: one round of scores, a map after each element."""

    on_the_way: bool = False
    name = "zeroed"

    def recipe(self) -> Recipe:
        return RoundsRecipe(self.rounds, 20, gradients=False, baseline="one")

    def rounds(self, asked: RoundContext) -> Rounds:
        (x,), lost = asked.inputs, torch.zeros((*asked.scores.shape, asked.inputs[0][0].numel()))
        lost = lost.to(x.dtype)
        example = torch.arange(len(x))

        def write(example: Tensor, place: Tensor) -> tuple[Tensor, ...]:
            points = x[example].flatten(1)
            points[torch.arange(len(example)), place] = 0
            return (points.view(-1, *x.shape[1:]),)

        def maps() -> Maps:
            return Maps((lost.view(*asked.scores.shape, *x.shape[1:]).clone(),))

        for place in range(x[0].numel()):
            found = yield Round(write, example, torch.full_like(example, place))
            lost[:, :, place] = (asked.scores - found.scores).to(x.dtype)
            if self.on_the_way:
                yield maps()
        return maps()


@dataclass(frozen=True)
class Inside:
    """Activations times gradients at a layer."""

    layer: str = "4"
    name = "inside"

    def recipe(self) -> Recipe:
        return RoundsRecipe(self.rounds, 1, at_input=True, layers=self.layer)

    def rounds(self, asked: RoundContext) -> Rounds:
        example = torch.arange(len(asked.inputs[0]))

        def write(example: Tensor, place: Tensor) -> tuple[Tensor, ...]:
            return tuple(x[example] for x in asked.inputs)

        found = yield Round(write, example, example, taps=LayerTaps(asked.layers))
        values = torch.stack([found.taps[0] * grads[0] for grads in found.grads], 1)
        return Maps((values,), extras={"activation": found.taps[0][:, None]})


@dataclass(frozen=True)
class Folded:
    """The gradient at the input, twice, folded in launch by launch."""

    name = "folded"

    def recipe(self) -> Recipe:
        return RoundsRecipe(self.rounds, 2)

    def rounds(self, asked: RoundContext) -> Rounds:
        total = [torch.zeros_like(x) for x in asked.inputs]
        example = torch.arange(len(total[0])).repeat(2)

        def write(example: Tensor, place: Tensor) -> tuple[Tensor, ...]:
            return tuple(x[example] for x in asked.inputs)

        def each(rows: slice, found: RoundResult) -> None:
            for slot, grads in zip(total, found.grads[0], strict=True):
                slot.index_add_(0, example[rows], grads / 2)

        yield Round(write, example, example, gradients=True, each=each)
        return Maps(tuple(one[:, None] for one in total))


def test_scores_of_many_targets_in_launches_of_any_size() -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    engine = sf.Engine(model, Zeroed())
    found = engine(x, [[0, 1], [2, 3], [4, 0]])
    small = sf.Engine(model, Zeroed(), points_per_launch=2)(x, [[0, 1], [2, 3], [4, 0]])
    torch.testing.assert_close(small.values, found.values)
    changed = x.clone()
    changed[:, 1, 2, 3] = 0
    lost = (model(x) - model(changed)).detach()
    torch.testing.assert_close(found.values[1, :, 1, 2, 3], lost[1, [2, 3]])
    assert found.points.tolist() == [3 * 144] * 3
    assert not any(one.requires_grad for one in (found.values, found.scores))


def test_predicted_classes_are_chosen_once() -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    classes = model(x).argmax(1)
    for method in (Zeroed(), Inside()):
        found = sf.explain(model, x, target="predicted", method=method)
        known = sf.explain(model, x, target=classes, method=method)
        torch.testing.assert_close(found.values, known.values)
        assert found.classes.tolist() == classes.tolist()
        torch.testing.assert_close(found.scores, model(x).amax(1).detach())


def test_taps_give_activations_and_gradients() -> None:
    model, x = make(Image), randn(2, 3, 12, 12)
    hidden = nn.Sequential(*list(model)[:5])(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(nn.Sequential(*list(model)[5:])(hidden)[:, 3].sum(), hidden)
    engine = sf.Engine(model, Inside())
    for found in (
        engine(x, 3),
        engine.submit(x, 3).result(),
        sf.explain(model, x, target=3, method=Inside("0"), at=model[4]),
    ):
        torch.testing.assert_close(found.values, grad * hidden.detach())
        torch.testing.assert_close(found.extras["activation"], hidden.detach())
        assert found.provenance.at == ["4"]


@dataclass(frozen=True)
class InterceptedExecutor:
    """Activations at a layer alone."""

    name = "watched"

    def recipe(self) -> Recipe:
        return RoundsRecipe(self.rounds, 1, at_input=True, layers="4", gradients=False)

    def rounds(self, asked: RoundContext) -> Rounds:
        example = torch.arange(len(asked.inputs[0]))
        taps = LayerTaps(asked.layers, asked.layer_input)
        found = yield Round(lambda i, _: (asked.inputs[0][i],), example, example, False, taps)
        assert found.grads == []
        return Maps((found.taps[0][:, None],))


@pytest.mark.parametrize("of_input", [False, True])
def test_taps_without_gradients_need_none(of_input: bool) -> None:
    model, x = make(Image), randn(2, 3, 12, 12)

    def rounded(x: Tensor) -> Tensor:
        return model(x).round()

    expected = nn.Sequential(*list(model)[: 4 if of_input else 5])(x).detach()
    found = sf.Engine(rounded, InterceptedExecutor(), at=model[4], layer_input=of_input)(x, 1)
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.scores, rounded(x)[:, 1].detach())


def test_rounds_of_gradients_are_folded_in() -> None:
    model = make(Multimodal)
    x = (randn(2, 3, 12, 12), randn(2, 7, seed=1))
    expected = sf.explain(model, x, target=1, method="gradient").values
    for size in (1, 3, None):
        found = sf.explain(model, x, target=1, method=Folded(), points_per_launch=size).values
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_maps_on_the_way_are_streamed() -> None:
    model, x = nn.Linear(4, 2).double(), randn(2, 4)
    maps = list(sf.Engine(model, Zeroed(on_the_way=True)).stream(x, 1))
    assert [int((one.values != 0).sum()) for one in maps] == [2, 4, 6, 8, 8]
    torch.testing.assert_close(maps[-1].values, (x * model.weight[1]).detach())
    torch.testing.assert_close(maps[-1].delta, torch.zeros(2, dtype=torch.float64))


def test_models_without_gradients_and_integers() -> None:
    def counts(ids: Tensor) -> Tensor:
        return torch.stack([(ids == 3).sum(1), ids.sum(1)], 1).float()

    ids = torch.tensor([[3, 1, 3], [0, 2, 5]])
    found = sf.explain(counts, ids, target=1, method=Zeroed())
    assert found.values.tolist() == ids.tolist()


def test_records_hold_extras(tmp_path: object) -> None:
    model, x = make(Image), randn(2, 3, 12, 12)
    found = sf.explain(model, x, target=3, method=Inside())
    again = sf.load(found.save(f"{tmp_path}/one.safetensors"))
    torch.testing.assert_close(again.extras["activation"], found.extras["activation"])


def test_a_launch_that_does_not_fit_is_halved() -> None:
    model, tried = make(Image), []

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tried.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return model(x)

    x = randn(4, 3, 12, 12)
    found = sf.explain(Small(), x, target=1, method=Zeroed(), lean=False)
    expected = sf.explain(model, x, target=1, method=Zeroed())
    torch.testing.assert_close(found.values, expected.values)
    assert found.provenance.halvings > 0
    assert max(tried) > 2


def test_refusals() -> None:
    model, x = make(Image).float(), randn(2, 3, 12, 12).float()
    with pytest.raises(InputError, match="whose error can be measured"):
        sf.explain(model, x, target=1, method=Zeroed(), precision="bfloat16")
    assert sf.explain(model, x, target=1, method=Inside(), precision="auto").values.isfinite().all()


class _Attends(nn.Module):
    """A small model whose attention is much larger than all else that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))
        return out


@pytest.mark.parametrize("method", ["conductance", "gradient_attention"])
def test_launches_at_layers_keep_to_the_budget(method: str) -> None:
    torch.manual_seed(0)
    if method == "conductance":
        wide = (nn.Conv2d(1, 64, 3), nn.Tanh(), nn.Conv2d(64, 1, 3), nn.Flatten())
        model, x = nn.Sequential(*wide).eval(), torch.rand(6, 1, 40, 40)
        engine = sf.Engine(model, sf.Conductance(6), at="1", memory_budget=12 << 20)
    else:
        model, x = _Attends().eval(), torch.rand(6, 256, 8)
        engine = sf.Engine(model, method, memory_budget=12 << 20)
    engine.plan(x, 1)
    with MemoryMeter() as meter:
        tight = engine(x, 1)
    assert meter.peak < 12 << 20
    at = "1" if method == "conductance" else None
    roomy = sf.explain(model, x, target=1, method=engine.method, at=at)
    assert relative_l2(tight.values, roomy.values) < 1e-5
