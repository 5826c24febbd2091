"""Requests of many callers in launches that they share: each answer is the one it has alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import planner
from saliency_fast.errors import InputError, ModelError
from tests.models import Image, Segmenter, Tabular, Tokens
from tests.service.asking import LATENCY, alone, asked, gathering, same, seeded


@pytest.mark.parametrize("kind", [(Tabular, 7), (Image, 3, 9, 9), (Tokens, 6, 8)])
def test_every_answer_is_its_own(kind: Any):
    net, x = seeded(*kind)
    requests = asked(x)
    expected = alone(net, requests)
    with gathering(net, len(requests)) as engine:
        found = engine.explain_many(requests)
        statistics = engine.statistics
    for mine, theirs in zip(found, expected, strict=True):
        same(mine, theirs)
    assert statistics.finished == len(requests)
    assert statistics.points == sum(int(one.points.sum()) for one in expected)
    # They do share: far fewer launches than requests.
    assert statistics.launches < len(requests) / 2


def test_sixteen_threads(way: str):
    net, x = seeded(Image, 3, 9, 9)
    requests = asked(x)
    expected = alone(net, requests)
    with sf.Engine(net) as engine, ThreadPoolExecutor(16) as pool:

        def work(number: int) -> sf.Attribution:
            return engine.submit(**requests[number % len(requests)]).result(timeout=60)

        found = list(pool.map(work, range(8 * len(requests))))
        assert engine.statistics.finished == len(found)
        assert (engine.statistics.waiting, engine.statistics.running) == (0, 0)
    for number, mine in enumerate(found):
        same(mine, expected[number % len(requests)])


def test_float32_and_bfloat16_share_nothing():
    net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
    expected = sf.explain(net, x[:4], target=1)
    with sf.Engine(net, precision="bfloat16", latency=LATENCY) as engine:
        requests = [{"inputs": one, "target": 1} for one in x[:4].split(1)]
        found = engine.explain_many(requests)
    values = torch.cat([one.values for one in found])
    assert float((values - expected.values).norm() / expected.values.norm()) < 0.1
    assert all(one.precision_error is not None and one.precision_error > 0 for one in found)


def test_shapes_and_arguments_that_differ_do_not_mix():
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv1d(2, 4, 3)

        def forward(self, x: Tensor, weight: Tensor, table: Tensor, power: int = 1) -> Tensor:
            return (self.head(x).tanh().mean(2) * weight + table).sin() ** power

    net, requests = Scaled().double().eval(), []
    tables = (torch.randn(4).double(), torch.randn(4).double())
    for number in range(24):
        x, weight = torch.randn(2, 2, 7 + number % 2).double(), torch.randn(2, 4).double()
        more = {"forward_args": (weight, tables[number // 2 % 2])}
        more["forward_kwargs"] = {"power": 1 + number // 4 % 2}
        requests.append({"inputs": x, "target": number % 4, **more})
    expected = alone(net, requests)
    with gathering(net, len(requests)) as engine:
        for mine, theirs in zip(engine.explain_many(requests), expected, strict=True):
            same(mine, theirs)
        # Points come in three rounds.
        assert engine.statistics.launches < 3 * 24


def test_several_maps_dense_outputs_and_tuples():
    net, x = seeded(Segmenter, 3, 8, 8)
    targets: Any = [(k % 2, slice(k % 4, 6)) for k in range(8)]
    requests = [{"inputs": x[k : k + 2], "target": t} for k, t in enumerate(targets)]
    many, y = seeded(Tabular, 7)
    columns = [{"inputs": y[k : k + 1], "target": torch.tensor([[k % 5, 2]])} for k in range(8)]

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return many(a * b.tanh())

    pairs = [{"inputs": (y[k : k + 1], y[k + 1 : k + 2]), "target": k % 5} for k in range(8)]
    for model, several in ((net, requests), (many, columns), (pair, pairs)):
        expected = alone(model, several)
        with sf.Engine(model, latency=LATENCY) as engine:
            for mine, theirs in zip(engine.explain_many(several), expected, strict=True):
                same(mine, theirs)


def test_averaged_baselines_and_regions():
    net, x = seeded(Image, 3, 9, 9)
    requests: list[dict[str, Any]] = [
        {"inputs": one, "target": 1, "baseline": [0.0, 0.5, "mean"]} for one in x[:4].split(1)
    ]
    requests += [
        {"inputs": one, "target": 1, "region": (slice(0, 4), slice(2, 9))} for one in x[:4].split(2)
    ]
    expected = alone(net, requests)
    with sf.Engine(net, latency=LATENCY) as engine:
        for mine, theirs in zip(engine.explain_many(requests), expected, strict=True):
            same(mine, theirs)


class TestNeighbours:
    def test_a_wrong_target(self):
        net, x = seeded(Tabular, 7)
        requests: Any = [{"inputs": one, "target": k} for k, one in enumerate(x[:8].split(1))]

        def failing(output: Tensor) -> Tensor:
            raise KeyError("a target's own mistake")

        requests[6]["target"] = failing
        requests[7]["target"] = lambda output: output[:, 0].detach()
        expected = alone(net, requests[:5])
        with sf.Engine(net, latency=LATENCY) as engine:
            found = engine.explain_many(requests, return_exceptions=True)
            assert engine.statistics.failed == 3
        for mine, theirs in zip(found[:5], expected, strict=True):
            same(mine, theirs)
        assert isinstance(found[5], InputError)
        assert "target out of range: got 5" in str(found[5])
        assert isinstance(found[6], ModelError)
        assert isinstance(found[6].__cause__, KeyError)
        assert isinstance(found[7], ModelError)
        assert "not differentiable in its input" in str(found[7])

    def test_an_input_that_breaks_the_model(self):
        net, x = seeded(Tabular, 7)

        class Picky(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if bool((x > 100).any()):
                    raise ValueError("no such input")
                return net(x)

        x[3] = 200.0
        requests = [{"inputs": one, "target": 1} for one in x[:6].split(1)]
        expected = alone(Picky(), [*requests[:3], *requests[4:]])
        with sf.Engine(Picky(), latency=LATENCY) as engine:
            found = engine.explain_many(requests, return_exceptions=True)
        failed = found.pop(3)
        assert isinstance(failed, ModelError)
        assert isinstance(failed.__cause__, ValueError)
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)

    def test_numbers_that_are_not_finite(self):
        net, x = seeded(Tabular, 7)
        x[2] = 1e200

        def overflowing(y: Tensor) -> Tensor:
            return net(y) * (y**2).sum(1, keepdim=True) ** 2

        requests = [{"inputs": one, "target": 1} for one in x[:5].split(1)]
        with sf.Engine(overflowing, latency=LATENCY) as engine:
            found = engine.explain_many(requests, return_exceptions=True)
        assert isinstance(found.pop(2), ModelError)
        expected = alone(overflowing, [*requests[:2], *requests[3:]])
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)

    @pytest.mark.parametrize("most", [1, 3])
    def test_memory_that_runs_out(self, most: int):
        net, x = seeded(Tabular, 7)

        class Small(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if len(x) > most:
                    raise torch.OutOfMemoryError("too many rows")
                return net(x)

        requests = [{"inputs": one, "target": 1} for one in x[:6].split(1)]
        with sf.Engine(Small(), latency=LATENCY, method=sf.IntegratedGradients(5)) as engine:
            found = engine.explain_many(requests)
        expected = alone(net, [{**one, "method": sf.IntegratedGradients(5)} for one in requests])
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)

    def test_a_model_whose_rows_are_not_alike(self):
        """Its batch must be four: nothing can share a launch, and nothing tries for ever."""
        net, x = seeded(Tabular, 7)

        def fours(y: Tensor) -> Tensor:
            if len(y) > 4:
                raise ValueError("at most four")
            return net(y)

        method = sf.IntegratedGradients(4)
        requests = [{"inputs": one, "target": 1} for one in x[:8].split(1)]
        with sf.Engine(fours, method, latency=LATENCY, points_per_launch=4) as engine:
            for _ in range(3):
                found = engine.explain_many(requests)
        expected = alone(net, [{**one, "method": method} for one in requests])
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)


def test_a_model_that_counts_its_calls_is_probed_once(monkeypatch, way: str):
    """What it notes while it is probed is no change of the model."""
    net, x = seeded(Tabular, 7)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x)

    probed = []
    original = planner.calibrated
    monkeypatch.setattr(
        planner, "calibrated", lambda *a, **b: (probed.append(a), original(*a, **b))[1]
    )
    model = Counting()
    with gathering(model, len(x)) as engine:
        for _ in range(2):
            engine.explain_many([{"inputs": one, "target": 1} for one in x.split(1)])
            # Between bursts it is another one.
            model.net = nn.Sequential(model.net, nn.Tanh())
    if way == "recorded":
        assert len(probed) == 2
