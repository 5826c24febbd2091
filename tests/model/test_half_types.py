"""Half types: maps close to float32's, at a cost that is measured and told."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.engine import evaluation
from saliency_fast.engine.precision import PrecisionError, everywhere, finite, first_scale
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.intercept import Calls
from saliency_fast.graph.passes import half as precisions
from saliency_fast.graph.passes.half import in_half_type
from saliency_fast.graph.recorder import unified
from saliency_fast.model.executors import RecordingExecutor
from tests.configured import configure
from tests.models import Audio, Image, Segmenter, Tabular, Tokens, Video

SMOOTH: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "tabular": (Tabular, (7,)),
    "audio": (Audio, (2, 31)),
    "image": (Image, (3, 9, 9)),
    "video": (Video, (2, 5, 6, 6)),
    "tokens": (Tokens, (6, 8)),
}
METHODS = (
    sf.Gradient(),
    sf.InputXGradient(),
    sf.IntegratedGradients(6),
    sf.IntegratedGradients(4, tolerance=0.3, max_steps=9),
    sf.SmoothGrad(4),
    sf.SmoothGradSquared(4),
    sf.VarGrad(4),
    sf.ExpectedGradients(4),
)
# Rounding to 8 bits is off by 2**-9 at most, and .5 * 2**-9 on average; a dozen products, forward
# and back, and what cancels in small networks make that some fifty times as much at most.
CLOSE = {"bfloat16": 0.1, "float16": 0.0125}


@pytest.fixture(params=("recorded", "as it is"))
def way(request, monkeypatch) -> str:
    """Small models as programs of their own, and by autocast."""
    configure(monkeypatch, lean_from=0 if request.param == "recorded" else 2**40)
    return request.param


@pytest.fixture
def offered(monkeypatch) -> None:
    """What GPUs offer, on the CPU."""
    monkeypatch.setitem(precisions.OF_DEVICE, "cpu", precisions.OF_DEVICE["cuda"])


def seeded(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int = 3
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(batch, *shape)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one.name}-{one.recipe().count}")
@pytest.mark.parametrize("model", SMOOTH)
@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.usefixtures("offered")
def test_close_to_float32(model: str, method: Any, name: str, way: str):
    net, x = seeded(*SMOOTH[model])
    target = [1, 0, 4]
    expected = sf.explain(net, x, target=target, method=method)
    found = sf.explain(net, x, target=target, method=method, precision=name)
    assert found.provenance.precision == name
    assert ("recorded" in found.provenance.strategy) == (way == "recorded"), (
        found.provenance.strategy
    )
    # A variance is a difference of squares: what is lost counts more.
    several = 4 if method.name == "vargrad" else 1
    assert 0 < distance(found.values, expected.values) < several * CLOSE[name]
    assert found.values.dtype == torch.float32
    assert torch.all(found.precision_error > 0)
    assert torch.all(found.error >= found.precision_error)


class BesideItsNorm(nn.Module):
    """What is normalised is added as it was: the convolution must not take the norm along."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)
        nn.init.uniform_(self.norm.weight, -1, 2)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh())
        return self.head((self.norm(y) + y).relu().mean((2, 3)))


@pytest.mark.usefixtures("offered")
def test_what_is_taken_twice_is_not_folded(way: str):
    net, x = seeded(BesideItsNorm, (3, 24, 24))
    method = sf.IntegratedGradients(8)
    expected = sf.explain(net, x, target=1, method=method)
    found = sf.explain(net, x, target=1, method=method, precision="bfloat16")
    assert ("recorded" in found.provenance.strategy) == (way == "recorded"), (
        found.provenance.strategy
    )
    # Rectifiers flip where they are near their kink: not smooth, and far below a wrong model's.
    assert distance(found.values, expected.values) < 0.1


@pytest.mark.usefixtures("offered")
def test_many_maps_tuples_and_arguments(way: str):
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Conv1d(1, 8, 3)

        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return (self.a(x).tanh() * self.b(y).mean(2) * scale)[:, :4]

    net, x, y = Two().eval(), torch.randn(2, 5), torch.randn(2, 1, 9)
    more: Any = {"target": torch.tensor([[0, 1], [2, 3]]), "forward_args": torch.rand(2, 1) + 0.5}
    expected = sf.explain(net, (x, y), **more)
    for name, close in CLOSE.items():
        found = sf.explain(net, (x, y), precision=name, **more)
        for mine, theirs in zip(found.values, expected.values, strict=True):
            assert distance(mine, theirs) < close
        assert found.precision_error.shape == (2, 2)


def test_dense_outputs(way: str):
    net, x = seeded(Segmenter, (3, 8, 8))
    target = (1, slice(2, 5))
    expected = sf.explain(net, x, target=target)
    found = sf.explain(net, x, target=target, precision="bfloat16")
    assert distance(found.values, expected.values) < CLOSE["bfloat16"]


@pytest.mark.parametrize("build", zoo.MODELS.values(), ids=zoo.MODELS)
def test_scores_and_completeness_are_float32s(build):
    net, x = build(), zoo.held_out().images[:3]
    expected = sf.explain(net, x, target="predicted")
    found = sf.explain(net, x, target="predicted", precision="bfloat16")
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.baseline_scores, expected.baseline_scores, rtol=1e-5, atol=1e-5
    )
    gain = found.scores - found.baseline_scores
    total = found.values.flatten(1).sum(1)
    torch.testing.assert_close(found.delta, total - gain, rtol=1e-3, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("build", zoo.MODELS.values(), ids=zoo.MODELS)
@pytest.mark.parametrize("method", [sf.IntegratedGradients(50), sf.SmoothGrad(32)])
def test_what_it_costs_is_estimated(build, method):
    net, x = build(), zoo.held_out().images[:8]
    classes = net(x).argmax(1)
    exact, half = sf.Engine(net, method), sf.Engine(net, method, precision="bfloat16")
    ratios = []
    for one, label in zip(x.split(1), classes.tolist(), strict=True):
        found = half(one, label)
        true = distance(found.values, exact(one, label).values)
        ratios.append(float(found.precision_error) / true)
    # An estimate from three points: within a factor of three below, and of six above.
    assert min(ratios) > 1 / 3
    assert sorted(ratios)[4] < 6


def test_products_alone_are_in_a_half_type():
    net, x = seeded(Image, (3, 9, 9))
    recording, second = RecordingExecutor(net), RecordingExecutor(net)
    with torch.enable_grad():
        recording([x[:1].requires_grad_() * 1], (), {})
        second([x[:2].requires_grad_() * 1], (), {})
    program = in_half_type(unified(recording.program, second.program), torch.bfloat16).program
    seen: dict[str, set[torch.dtype]] = {}

    class Spy(Calls):
        def call(self, func: Any, args: Any, kwargs: Any) -> Any:
            found = super().call(func, args, kwargs)
            if isinstance(found, Tensor):
                seen.setdefault(func.__name__, set()).add(found.dtype)
            return found

    with Spy():
        program([x], [])
    for name in ("conv2d", "linear"):
        assert seen[name] == {torch.bfloat16}, seen


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("name", CLOSE)
def test_numbers_that_half_types_cannot_hold_stay_float32(way: str, name: str):
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (20 * self.linear(x).sigmoid()).exp().log().sum(1, keepdim=True)

    net, x = seeded(Exponential, (6,))
    expected = sf.explain(net, x, target=0)
    if (name, way) == ("float16", "as it is"):
        # PyTorch's own autocast leaves it in half types on CPUs.
        with pytest.raises(ModelError, match=r"or precision='float32' instead of 'float16'"):
            sf.explain(net, x, target=0, precision=name)
        return
    found = sf.explain(net, x, target=0, precision=name)
    assert distance(found.values, expected.values) < CLOSE[name]


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("factor", [1e6, 1.0, 1e-7])
def test_float16_at_any_scale(factor: float, way: str):
    net, x = seeded(*SMOOTH["image"])

    def scaled(z: Tensor) -> Tensor:
        return net(z) * factor

    expected = sf.explain(scaled, x, target=2)
    found = sf.explain(scaled, x, target=2, precision="float16")
    assert distance(found.values, expected.values) < CLOSE["float16"]
    assert found.provenance.notes["underflow"] < 0.1


@pytest.mark.usefixtures("offered")
def test_what_float16_cannot_hold_is_told():
    net, x = seeded(*SMOOTH["image"])
    found = sf.explain(lambda z: net(z) * 1e-12, x, target=2, precision="float16")
    assert found.provenance.notes["underflow"] > 0.9
    assert torch.all(found.error > 0.9)


@pytest.mark.usefixtures("offered")
def test_a_launch_that_overflows_is_tried_again(monkeypatch, way: str):
    net, x = seeded(*SMOOTH["image"])
    expected = sf.explain(net, x, target=2, method=sf.IntegratedGradients(12))
    scales = []
    lower = evaluation.SumEvaluation.lower_scale

    def counted(run: Any) -> bool:
        scales.append(run.function.scale)
        return lower(run)

    def unlooked(run: Any, exact: Any) -> Any:
        """A first scale that nobody has tried."""
        run.function = replace(run.function, scale=2.0**20)
        run.precision_error = everywhere(0.0, 1, run.call.device)
        yield from ()

    monkeypatch.setattr(evaluation.SumEvaluation, "measure_precision", unlooked)
    monkeypatch.setattr(evaluation.SumEvaluation, "lower_scale", counted)
    method = sf.IntegratedGradients(12)
    found = sf.explain(net, x, target=2, method=method, precision="float16", points_per_launch=5)
    assert scales, "nothing overflowed"
    assert torch.isfinite(found.values).all()
    assert distance(found.values, expected.values) < CLOSE["float16"]
    assert torch.equal(found.points, torch.full((3,), 12))


@pytest.mark.usefixtures("offered")
def test_infinity_of_the_models_own_is_told():
    net, x = seeded(*SMOOTH["tabular"])
    for name in CLOSE:
        with pytest.raises(ModelError, match="NaN or infinite"):
            sf.explain(lambda z: net(z) / 0, x, target=1, precision=name)


def test_the_first_scale():
    assert first_scale([(torch.tensor([0.25, -1.0]),)]) == 2.0**10
    assert first_scale([(torch.tensor([2.0**-20]),), (torch.tensor([2.0**-3]),)]) == 2.0**13
    assert first_scale([(torch.zeros(3),)]) == 1.0
    assert first_scale([(torch.tensor([float("inf")]),)]) == 1.0
    assert finite([(torch.ones(3),)])
    assert not finite([(torch.ones(3), torch.tensor([1.0, float("nan")]))])


def test_error_of_examples_that_were_not_looked_at():
    among, one = torch.tensor([2, 0]), torch.ones(2, 1).double()
    loss = PrecisionError(among, torch.tensor([[0.2], [0.1]]).double(), one)
    whole = torch.tensor([[0.5], [1.0], [4.0]]).double()
    assert loss.of(whole).flatten().tolist() == pytest.approx([0.1, 0.1, 0.05])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one.name}-{one.recipe().count}")
def test_models_in_half_types(kind: torch.dtype, method: Any, way: str):
    net, x = seeded(*SMOOTH["image"])
    expected = sf.explain(net, x, target=2, method=method)
    half = copy.deepcopy(net).to(kind)
    found = sf.explain(half, x.to(kind), target=2, method=method)
    name = str(kind).removeprefix("torch.")
    assert found.provenance.dtype == name
    assert found.values.dtype == torch.float32
    several = 4 if method.name == "vargrad" else 1
    assert distance(found.values, expected.values) < several * CLOSE[name]
    # The points may be any numbers; the input itself is what the caller rounded it to.
    with pytest.raises(InputError, match=rf"is for float32 inputs: got {name}"):
        sf.explain(half, x.to(kind), target=2, precision="bfloat16")


class TestNothingIsLeftBehind:
    def test_weights_are_copied_for_a_call_alone(self, monkeypatch):
        configure(monkeypatch, lean_from=0)
        net, x = seeded(*SMOOTH["image"])
        made: list[weakref.ref[Tensor]] = []
        original = precisions._cast

        def watched(step: Any, half: Any, weights: Any) -> Any:
            found = original(step, half, weights)
            made.extend(weakref.ref(one) for one in found.args if isinstance(one, Tensor))
            return found

        monkeypatch.setattr(precisions, "_cast", watched)
        engine = sf.Engine(net, precision="bfloat16")
        engine(x, 1)
        gc.collect()
        own = {id(one) for one in net.parameters()}
        assert made
        assert not [one for ref in made if (one := ref()) is not None and id(one) not in own]

    def test_new_weights_are_seen(self, way: str):
        net, x = seeded(*SMOOTH["image"])
        engine = sf.Engine(net, precision="bfloat16")
        engine(x, 1)
        # Through `data`, which leaves no trace in the tensor's version.
        net[4].weight.data.mul_(-1.5)
        expected = sf.explain(copy.deepcopy(net), x, target=1)
        assert distance(engine(x, 1).values, expected.values) < CLOSE["bfloat16"]

    def test_the_model_is_as_it_was(self, way: str):
        net, x = seeded(*SMOOTH["image"])
        before = {name: (one, one.clone()) for name, one in net.state_dict(keep_vars=True).items()}
        sf.explain(net, x, target=1, precision="bfloat16")
        for name, one in net.state_dict(keep_vars=True).items():
            assert one is before[name][0]
            assert torch.equal(one, before[name][1])


def test_records(tmp_path):
    net, x = seeded(*SMOOTH["image"])
    found = sf.explain(net, x, target=1, precision="bfloat16")
    again = sf.load(found.save(tmp_path / "one.safetensors"))
    assert torch.equal(again.precision_error, found.precision_error)
    assert again.provenance.precision == "bfloat16"
    replayed = sf.replay(again, net, x)
    assert replayed.agrees
    assert replayed.again.provenance.precision == "bfloat16"


def test_plans_tell_it():
    net, x = zoo.digits_cnn(), zoo.held_out().images[:2]
    plan = sf.Engine(net, precision="bfloat16").plan(x, target=1)
    assert plan.precision == "bfloat16"
    assert plan.looked_at > 0
    assert "float32 by bfloat16" in str(plan)
    assert "bfloat16" in plan.lean


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_launches_smaller_than_what_is_looked_at(limit: int, way: str):
    net, x = seeded(*SMOOTH["image"])
    x = x.repeat(3, 1, 1, 1)
    method = sf.IntegratedGradients(50)
    engine = sf.Engine(net, method, precision="bfloat16", points_per_launch=limit)
    assert engine.plan(x, 1).looked_at <= limit
    found, expected = engine(x, 1), sf.explain(net, x, target=1, method=method)
    assert distance(found.values, expected.values) < CLOSE["bfloat16"]
    assert torch.all(found.precision_error > 0)
