"""What waits, what is cancelled, what is bounded, and what a service leaves behind: nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.engine import service as services
from saliency_fast.errors import BusyError, ClosedError, InputError, InputTypeError
from tests.models import Image, Tabular
from tests.service.asking import LATENCY, Gate, same, seeded


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


class TestCancelled:
    def test_before_it_begins_and_while_it_runs(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        method = sf.IntegratedGradients(6)
        with sf.Engine(net, method, points_per_launch=2) as engine:
            first = gate.shut(engine, x[:1])
            others = [engine.submit(one, 1) for one in x[1:5].split(1)]
            assert others[0].cancel()
            assert first.cancel()
            gate.open.set()
            for mine, one in zip(others[1:], x[2:5].split(1), strict=True):
                theirs = sf.explain(net, one, target=1, method=method)
                same(mine.result(timeout=30), theirs)
        with pytest.raises(CancelledError):
            first.result()
        assert engine.statistics.cancelled == 2
        assert engine.statistics.finished == 3

    def test_an_error_cancels_what_has_not_begun(self):
        net, x = seeded(Tabular, 7)
        requests: Any = [{"inputs": one, "target": 1} for one in x.split(1)]
        requests[2]["target"] = 99
        with (
            sf.Engine(net, latency=LATENCY) as engine,
            pytest.raises(InputError, match="out of range: got 99"),
        ):
            engine.explain_many(requests)

    def test_what_is_wrong_at_once_is_raised_at_once(self):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net) as engine:
            with pytest.raises(InputTypeError, match="must be a tensor"):
                engine.submit([1.0, 2.0], 1)
            found = engine.explain_many([x[:1] * float("nan"), {"x": 3}], return_exceptions=True)
            assert [type(one) for one in found] == [InputError, TypeError]


class TestQueue:
    def test_is_bounded(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, waiting=3) as engine:
            first = gate.shut(engine, x[:1])
            others = [engine.submit(x[:1], 1) for _ in range(3)]
            with pytest.raises(BusyError, match=r"too many requests wait: got 3, at most 3"):
                engine.submit(x[:1], 1, block=False)
            started = time.perf_counter()
            with pytest.raises(BusyError, match=r"no place became free within 0.1 s"):
                engine.submit(x[:1], 1, timeout=0.1)
            assert time.perf_counter() - started < 5
            assert engine.statistics.waiting == 3
            threading.Timer(0.1, gate.open.set).start()
            others.append(engine.submit(x[:1], 1))
            assert all(one.result(timeout=30) is not None for one in (first, *others))

    def test_those_that_wait_share_the_next_launch(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, "gradient", latency=0.0) as engine:
            first = gate.shut(engine, x[:1])
            others = [engine.submit(one, 1) for one in x.split(1)]
            gate.open.set()
            for one in (first, *others):
                one.result(timeout=30)
            assert engine.statistics.launches == 2
            assert engine.statistics.longest_queue > 0
            assert 0 < engine.statistics.fill <= 1
            text = str(engine.statistics)
        assert "17 finished, 0 failed" in text

    def test_latency_bounds_the_wait_for_others(self):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, "gradient", latency=0.5) as engine:
            engine(x[:1], 1)
            started = time.perf_counter()
            engine.submit(x[:1], 1).result(timeout=30)
            taken = time.perf_counter() - started
        assert 0.4 < taken < 5
        assert engine.statistics.longest_queue >= 0.5

    def test_a_closed_engine(self):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, latency=0.05)
        futures = [engine.submit(one, 1) for one in x.split(1)]
        engine.close()
        assert all(one.done() and one.exception() is None for one in futures)
        with pytest.raises(ClosedError, match="takes no more requests"):
            engine.submit(x[:1], 1)
        engine.close()
        assert engine(x[:1], 1).values.shape == (1, 7)

    def test_an_error_in_its_block_cancels_what_waits(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        with suppress(ZeroDivisionError), sf.Engine(net, waiting=8) as engine:
            futures = [gate.shut(engine, x[:1])]
            futures += [engine.submit(x[:1], 1) for _ in range(4)]
            threading.Timer(0.1, gate.open.set).start()
            raise ZeroDivisionError
        assert all(one.cancelled() for one in futures)
        assert engine.statistics.cancelled == 5

    def test_small_requests_pass_large_ones_and_none_waits_for_ever(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        large, small = sf.IntegratedGradients(60), sf.IntegratedGradients(2)
        done: list[str] = []
        with sf.Engine(net, points_per_launch=4) as engine:
            futures = [gate.shut(engine, x[:1])]
            for name, method in [("large", large), *[("small", small)] * 6, ("large", large)]:
                futures.append(engine.submit(x[1:2], 1, method=method))
                futures[-1].add_done_callback(lambda _, name=name: done.append(name))
            gate.open.set()
            for one, method in zip(futures[1:], [large, *[small] * 6, large], strict=True):
                same(one.result(timeout=60), sf.explain(net, x[1:2], target=1, method=method))
        assert done[:6] == ["small"] * 6

    def test_kinds_that_cannot_share_take_turns(self, gate: Gate):
        """A long request of one shape does not hold up a short one of another."""
        net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        done: list[int] = []
        with sf.Engine(net.double(), points_per_launch=2) as engine:
            futures = [gate.shut(engine, torch.randn(1, 2, 9).double())]
            for length, steps in ((9, 80), (11, 2)):
                x, method = torch.randn(1, 2, length).double(), sf.IntegratedGradients(steps)
                futures.append(engine.submit(x, 1, method=method))
                futures[-1].add_done_callback(lambda _, steps=steps: done.append(steps))
            gate.open.set()
            for one in futures:
                one.result(timeout=60)
        assert done == [2, 80]

    def test_its_thread_ends_and_begins_again(self, monkeypatch):
        monkeypatch.setattr(services, "IDLE", 0.05)
        net, x = seeded(Tabular, 7)
        with sf.Engine(net) as engine:
            for _ in range(3):
                engine.submit(x[:1], 1).result(timeout=30)
                deadline = time.perf_counter() + 10
                while engine._service._thread is not None:
                    assert time.perf_counter() < deadline
                    time.sleep(0.01)

    def test_nobody_waits_for_a_thread_that_died(self, monkeypatch):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, latency=0.05) as engine:

            def broken(*_: object) -> Any:
                raise SystemError("the service itself is broken")

            with monkeypatch.context() as patch:
                patch.setattr(engine._service, "_launch", broken)
                futures = [engine.submit(one, 1) for one in x[:3].split(1)]
                for one in futures:
                    with pytest.raises(SystemError):
                        one.result(timeout=30)
            assert engine.submit(x[:1], 1).result(timeout=30) is not None


class TestNothingIsLeftBehind:
    def test_modes_and_random_numbers(self):
        net, x = seeded(Image, 3, 9, 9)
        net.train()
        net[8].eval()
        modes = [one.training for one in net.modules()]
        torch.manual_seed(5)
        expected = torch.cat([torch.randn(1) for _ in range(200)])
        torch.manual_seed(5)
        with sf.Engine(net, latency=LATENCY) as engine:
            futures = [engine.submit(one, 1) for one in x.split(1)]
            # Another thread draws while requests run: its numbers are its own.
            drawn = []
            for _ in range(200):
                drawn.append(torch.randn(1))
                time.sleep(0.002)
            found = [one.result(timeout=30) for one in futures]
        assert torch.equal(torch.cat(drawn), expected)
        assert [one.training for one in net.modules()] == modes
        assert all(one.provenance.trained_mode for one in found)

    def test_memory(self):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, latency=0.01) as engine:
            inputs = [one.clone() for one in x.split(1)]
            seen = [weakref.ref(one) for one in inputs]
            futures = [engine.submit(one, 1) for one in inputs]
            results = [weakref.ref(one.result(timeout=30)) for one in futures]
            del inputs, futures
            deadline = time.perf_counter() + 10
            while any(ref() is not None for ref in (*seen, *results)):
                gc.collect()
                assert time.perf_counter() < deadline, "requests are kept"
                time.sleep(0.01)

    def test_a_budget_holds_for_all_of_them(self):
        net, x = seeded(Image, 3, 9, 9)
        budget = 2**20
        with sf.Engine(net, memory_budget=budget, latency=LATENCY) as engine:
            held = []
            launch = engine._service._launch

            def watched() -> None:
                held.append(engine._service._held)
                launch()

            engine._service._launch = watched
            engine.explain_many([{"inputs": one, "target": 1} for one in x.split(1) * 4])
        assert 0 < max(held) <= budget

    def test_ctrl_c_while_it_waits(self, gate: Gate):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net) as engine:
            first = gate.shut(engine, x[:1])

            def requests() -> Any:
                yield {"inputs": x[:1], "target": 1}
                yield {"inputs": x[1:2], "target": 2}
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                engine.explain_many(requests())
            gate.open.set()
            assert first.result(timeout=30) is not None
        assert engine.statistics.cancelled == 2


class TestBadInput:
    @pytest.mark.parametrize("waiting", [0, -1, 2.5, True])
    def test_waiting(self, waiting: Any):
        with pytest.raises(InputError, match="waiting must be a whole number"):
            sf.Engine(Tabular(), waiting=waiting)

    @pytest.mark.parametrize("latency", [-1.0, float("nan"), float("inf")])
    def test_latency(self, latency: float):
        with pytest.raises(InputError, match="latency must be seconds"):
            sf.Engine(Tabular(), latency=latency)
