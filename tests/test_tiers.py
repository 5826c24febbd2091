"""How much is found out before points run: nothing for few of them, a recording where it repays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.config import EngineConfig
from tests.configured import RECORDED
from tests.traces import Notes

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TIERED = {
    "direct_points_of_small": 8,
    "lean_from": 0,
    "direct_calls": 2,
}
METHODS = ("gradient", "input_x_gradient", "guided_backprop", "deeplift", "lrp", "grad_cam")


class Counting(nn.Module):
    """A small network that notes how many rows each of its runs has."""

    def __init__(self, first: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)
        self.first = first
        # A list of the module's would be put back after each call.
        self.notes = Notes(seen=[])

    @property
    def runs(self) -> list[int]:
        return self.notes.seen

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        return self.head(self.features(self.first(x)).mean((2, 3)))


def model(**about: Any) -> Any:
    return Counting(**about).eval()


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "guided_backprop"])
def test_a_single_point_costs_a_single_run(method: str) -> None:
    network = model()
    sf.explain(network, X[:1], target=1, method=method, layout="BCHW")
    assert network.runs == [1]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_many_points_cost_little_more(batch: int) -> None:
    network = model()
    sf.explain(network, X[:1].repeat(batch, 1, 1, 1), target=1, method="gradient", layout="BCHW")
    # Whether two examples depend on each other; of sixteen, one row is proved, and among extremes.
    assert sum(network.runs) <= batch + (0 if batch == 1 else 4 if batch == 3 else 6)


def test_a_plan_before_any_call_costs_a_single_run() -> None:
    network = model()
    plan = sf.Engine(network, "gradient", layout="BCHW").plan(X[:1], 1)
    assert network.runs == [1]
    assert plan.launch_bytes > X[:1].nbytes
    assert "do not repay a recording" in str(plan)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_tier_has_the_same_map(method: str, batch: int) -> None:
    network, x = model(), X[:batch]
    config = EngineConfig(**{**RECORDED, "lean_from": 0})
    expected = sf.Engine(network, method, config=config)(x, 1).values
    engine = sf.Engine(network, method, config=EngineConfig(**TIERED))
    kinds = set()
    for _ in range(60):
        found = engine(x, 1)
        kinds.add(found.provenance.strategy)
        torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-7)
    assert found.provenance.points_per_launch == batch
    rules = method in ("guided_backprop", "deeplift", "lrp")
    # Of a small model a single point never repays one.
    assert (
        rules
        or (batch == 1 and method != "integrated_gradients")
        or any("recorded" in one for one in kinds)
    )


def test_a_recording_waits_until_it_repays() -> None:
    network, config = model(), EngineConfig(**TIERED)
    engine = sf.Engine(network, sf.IntegratedGradients(steps=6), config=config)
    ways = [engine(X[:1], 1).provenance.strategy for _ in range(6)]
    assert ways[0] == "off"
    assert "recorded" in ways[-1]


@pytest.mark.parametrize(("launch", "rows"), [(2**30, 2), (1, 1)])
def test_eager_launches_have_two_points_where_memory_allows(launch: int, rows: int) -> None:
    config = EngineConfig(cpu_eager=1, cpu_launch=launch)
    engine = sf.Engine(model(), sf.IntegratedGradients(steps=20), config=config)
    found = engine(X[:1], 1)
    assert found.provenance.strategy == "off"
    assert found.provenance.points_per_launch == rows


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_model_that_draws_has_one_map_whatever_the_number_of_calls(steps: int) -> None:
    network = model(first=lambda x: x + 0.1 * torch.randn_like(x))
    engine = sf.Engine(network, sf.IntegratedGradients(steps=steps))
    found = []
    for _ in range(12):
        torch.manual_seed(3)
        found.append(engine(X[:1], 1))
    assert all("draws random numbers" in str(one.provenance.notes) for one in found)
    assert all(torch.equal(one.values, found[0].values) for one in found)


def test_examples_that_meet_are_explained_alone() -> None:
    network = model(first=lambda x: x - x.mean(0, keepdim=True) + x.flip(0) ** 2)
    with pytest.warns(UserWarning, match="depend on each other"):
        together = sf.explain(network, X, target=1, method="gradient").values
    alone = [sf.explain(network, x[None], target=1, method="gradient").values[0] for x in X]
    torch.testing.assert_close(together, torch.stack(alone))


def test_what_does_not_fit_is_planned() -> None:
    class Full(Counting):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(self.runs) == 0:
                self.runs.append(len(x))
                raise torch.OutOfMemoryError("no room")
            return super().forward(x)

    network = Full().eval()
    found = sf.explain(network, X[:1], target=1, method="gradient")
    expected = sf.explain(model(), X[:1], target=1, method="gradient")
    torch.testing.assert_close(found.values, expected.values)


def test_a_budget_or_shared_launches_are_planned() -> None:
    for options in ({"memory_budget": "1GiB"}, {"precision": "bfloat16"}):
        plan = sf.Engine(model(), "gradient", **options).plan(X[:1], 1)
        assert "do not repay" not in str(plan.strategies) or "points and fewer" in str(plan)
        assert plan.saved_before > 0
    with sf.Engine(model(), "gradient") as engine:
        found = engine.submit(X[:1], 1).result()
    torch.testing.assert_close(
        found.values, sf.explain(model(), X[:1], target=1, method="gradient").values
    )


def test_what_launches_take_is_told_by_launches_that_count() -> None:
    network = model()
    config = EngineConfig(**RECORDED, lean_from=2**40, traced_from=1)
    engine = sf.Engine(network, sf.IntegratedGradients(steps=40), config=config, layout="BCHW")
    x = torch.randn(1, 3, 64, 64)
    first = engine(x, 1)
    rows = sum(network.runs)
    network.runs.clear()
    later = engine(x, 1)
    # One point is measured and two rows recorded; rows of launches of other sizes are proved.
    assert rows - sum(network.runs) <= 1 + 2 + 2 + 8, (rows, network.runs)
    assert first.provenance.points_per_launch == later.provenance.points_per_launch > 3
    torch.testing.assert_close(first.values, later.values)


def test_a_budget_holds_where_launches_take_more_than_their_tensors_told() -> None:
    network, x = model(), torch.randn(1, 3, 64, 64)
    config = EngineConfig(**RECORDED, lean_from=0, traced_from=1)
    plan = sf.Engine(network, sf.IntegratedGradients(steps=40), config=config).plan(x, 1)
    for share in (0.5, 0.2):
        budget = plan.fixed_bytes + plan.finish_bytes + int(share * plan.launch_bytes)
        engine = sf.Engine(
            model(), sf.IntegratedGradients(steps=40), memory_budget=budget, config=config
        )
        found = engine(x, 1)
        assert found.provenance.points_per_launch < plan.points_per_launch
        torch.testing.assert_close(
            found.values, sf.explain(model(), x, target=1, method=engine.method).values
        )


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smoothgrad", "grad_cam"])
def test_calls_alike_have_the_same_bits(method: str, batch: int) -> None:
    x = torch.randn(batch, 3, 64, 64)
    for config in (EngineConfig(), EngineConfig(**RECORDED, lean_from=0, traced_from=1)):
        engine = sf.Engine(model(), method, config=config)
        first, later, last = (engine(x, 1) for _ in range(3))
        assert torch.equal(first.values, later.values)
        assert torch.equal(first.scores, later.scores)
        assert torch.equal(first.values, last.values)
        engine = sf.Engine(model(), method, config=config)
        engine.plan(x, 1)
        assert torch.equal(first.values, engine(x, 1).values)


class Cut(nn.Module):
    """A network whose features have no gradient, by one of two means."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.cut = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), cut
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        block = torch.no_grad if self.cut == "no_grad" else nullcontext
        with block():
            features = self.features(x)
        return self.head(features.detach() if self.cut == "detach" else features)


@pytest.mark.parametrize("cut", ["no_grad", "detach"])
@pytest.mark.parametrize("method", ["grad_cam", "layer_cam", "gradient"])
def test_a_gradient_that_the_model_cuts_is_an_error_in_every_tier(method: str, cut: str) -> None:
    for config in (EngineConfig(), EngineConfig(**RECORDED)):
        engine = sf.Engine(Cut(cut).eval(), method, config=config)
        with pytest.raises(sf.errors.ModelError, match="no_grad"):
            engine(X, target=1)
