"""How much is found out before points run: nothing for few of them, a recording where it repays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import calibrate, layers
from saliency_fast.engine.calibrate import Verification
from saliency_fast.engine.config import EngineConfig
from saliency_fast.model import layers as model_layers
from saliency_fast.model.executors import RecordedExecutor
from tests.configured import RECORDED
from tests.traces import Notes

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TIERED = {
    "direct_points": 8,
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
    config = EngineConfig(cpu_launch=1, cpu_most=launch)
    engine = sf.Engine(model(), sf.IntegratedGradients(steps=12), config=config)
    found = engine(X[:1], 1)
    assert found.provenance.strategy == "off"
    assert found.provenance.points_per_launch == rows


@pytest.mark.parametrize(("pair", "rows"), [(2**30, 2), (1, 1)])
def test_recorded_launches_have_two_points_where_memory_allows(pair: int, rows: int) -> None:
    config = EngineConfig(direct_points=0, cpu_launch=1, cpu_rows=1, cpu_pair=pair, lean_from=0)
    engine = sf.Engine(model(), sf.IntegratedGradients(steps=12), config=config)
    found = engine(X[:1], 1)
    assert "recorded" in found.provenance.strategy
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


@pytest.mark.parametrize("moved", [False, True])
def test_a_class_activation_map_costs_a_run_more_the_first_time(
    moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(x: Tensor) -> Tensor:
        return x.transpose(2, 3) if moved else x

    network, x = model(first=first), X[:1, :, :, :12]
    found = sf.explain(network, x, target=1, method="grad_cam", layout="BCHW")
    # The layer is found by a run that also proves it; where elements may have moved, another tells.
    assert network.runs == [1, 1, *([2] if moved else [])]
    network.runs.clear()
    later = sf.explain(network, x, target=1, method="grad_cam", layout="BCHW")
    assert network.runs == [1, *([2] if moved else [])]
    assert torch.equal(found.values, later.values)
    # As it is found where nothing is proved by a gradient, and with followed elements.
    monkeypatch.setattr(layers, "last_spatial_by_gradient", lambda *_: None)
    monkeypatch.setattr(model_layers, "_STAYS", frozenset())
    whole = sf.explain(model(first=first), x, target=1, method="grad_cam", layout="BCHW")
    assert torch.equal(found.values, whole.values)


def test_a_layer_that_was_found_for_one_target_is_looked_for_again() -> None:
    class Heads(Counting):
        """The second score depends on the first convolution alone."""

        def forward(self, x: Tensor) -> Tensor:
            self.runs.append(len(x))
            first = self.features[:4](x)
            scores = self.features[4:](first).mean((2, 3)).sum(1, keepdim=True)
            return torch.cat([scores, first.mean((2, 3)).sum(1, keepdim=True)], 1)

    network = Heads().eval()
    for target in (0, 1, 0, 1):
        # What it notes would make it another model.
        network.runs.clear()
        found = sf.explain(network, X[:1], target=target, method="grad_cam", layout="BCHW")
        fresh = sf.explain(Heads().eval(), X[:1], target=target, method="grad_cam", layout="BCHW")
        assert torch.equal(found.values, fresh.values)
        assert bool(found.values.any())


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


FIRST = EngineConfig(**RECORDED, lean_from=0, traced_from=1)
"""Recorded in the first call, whose launches tell what they take."""
X64 = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Fills with the rows of every run of a recorded program, and whether for gradients."""
    found: list[tuple[int, bool]] = []
    run = RecordedExecutor.__call__

    def spy(self: RecordedExecutor, points: Any, *about: Any) -> Any:
        found.append((len(points[0]), torch.is_grad_enabled()))
        return run(self, points, *about)

    monkeypatch.setattr(RecordedExecutor, "__call__", spy)
    return found


@pytest.mark.parametrize(
    ("method", "proved"),
    [
        (sf.IntegratedGradients(50, "midpoint"), 2),
        # Launches of 1, 2, 3 and 14, then rounds of 12 and 18 points.
        (sf.IntegratedGradients(50), 4),
        (sf.SmoothGrad(samples=40), 2),
    ],
)
def test_a_recorded_first_call_takes_two_points_more(
    method: Any, proved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, runs = model(), rows_run(monkeypatch)
    engine = sf.Engine(network, method, config=FIRST, layout="BCHW")
    first = engine(X64, 1)
    # The recording of one point, and of two rows, and another point that is compared.
    assert network.runs == [1, 2, 1]
    points = engine.method.recipe().count
    assert sum(rows for rows, gradients in runs if gradients) == points
    # One row for each size of a launch, but for the largest; what is not recorded is scored.
    others = [rows for rows, gradients in runs if not gradients]
    scored = 0 if isinstance(method, sf.IntegratedGradients) else 1
    assert sum(others) == proved + scored, others
    network.runs.clear()
    runs.clear()
    later = engine(X64, 1)
    assert not network.runs
    assert [rows for rows, gradients in runs if gradients][:3] == [1, 2, 3]
    assert torch.equal(first.values, later.values)
    assert torch.equal(first.scores, later.scores)
    assert torch.equal(first.delta, later.delta) if first.delta is not None else True
    expected = sf.Engine(model(), method, lean=False)(X64, 1)
    torch.testing.assert_close(first.values, expected.values, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(first.scores, expected.scores)


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.8, 0.7, 0.6])
def test_a_recorded_first_call_has_the_scores_of_later_ones(factor: float) -> None:
    engine = sf.Engine(model(), sf.IntegratedGradients(steps=20), config=FIRST)
    found = [engine(factor * X64, torch.tensor([[0, 1, 2]])) for _ in range(3)]
    for one in found[1:]:
        assert torch.equal(one.scores, found[0].scores)
        assert torch.equal(one.baseline_scores, found[0].baseline_scores)
        assert torch.equal(one.values, found[0].values)


@pytest.mark.parametrize("row", [0, 1])
def test_a_launch_that_differs_from_autograd_does_not_count(
    row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, compared = Verification.compare, list[int]()

    def differs(self: Verification, number: int, mine: Any) -> None:
        compared.append(number)
        faulty = [tuple(1.01 * one for one in several) for several in mine.gradients]
        off = number == sorted(self.rows)[row]
        compare(self, number, replace(mine, gradients=faulty) if off else mine)

    monkeypatch.setattr(Verification, "compare", differs)
    # Not to be excused by float64, in which the program agrees.
    config = replace(FIRST, agreement_in_float64=-1.0)
    engine = sf.Engine(model(), sf.IntegratedGradients(steps=50), config=config)
    found = engine(X64, 1)
    assert len(compared) == row + 1
    # All strategies are compared then before a launch counts.
    later = engine(X64, 1)
    assert len(compared) == row + 1
    assert torch.equal(found.values, later.values)
    expected = sf.Engine(model(), sf.IntegratedGradients(steps=50), lean=False)(X64, 1)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", [None, 1])
def test_rows_that_meet_beside_what_autograd_took(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recording shows nothing, and where each row that would be proved is the least
    of its launch.
    """
    monkeypatch.setattr(calibrate, "suspicion", lambda program: None)
    network = model(first=lambda x: x + x.amin(0, keepdim=True))
    method = sf.IntegratedGradients(steps=50)
    engine = sf.Engine(network, method, config=FIRST, points_per_launch=size)
    found = engine(X64, 1)
    expected = sf.Engine(network, method, lean=False, points_per_launch=1)(X64, 1)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.scores, network(X64)[:, 1].double(), check_dtype=False)
    assert "depend on each other" in str(found.provenance.notes) + str(engine.plan(X64, 1))


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
