"""Recorded launches, by a recorder for the CPU: every call's answer is the one without them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import captured, evaluation
from saliency_fast.engine import cudagraph as graphs
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.planner import Planner
from saliency_fast.engine.precision import everywhere
from saliency_fast.engine.recipe import with_fixed_nodes
from saliency_fast.engine.strategies import Strategy
from saliency_fast.errors import InputError
from saliency_fast.graph.passes import half as precisions
from tests.configured import configure
from tests.graphs.tape import Tape
from tests.models import Image, Tabular, Tokens, Video
from tests.service.asking import METHODS, same, seeded


@pytest.fixture(autouse=True)
def _tapes(monkeypatch):
    """The CPU records launches, and keeps none from test to test."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Tape)
    monkeypatch.setattr(graphs, "_CACHES", {})
    monkeypatch.setattr(Tape, "made", 0)
    monkeypatch.setattr(Tape, "replayed", 0)


def both(net: Any, x: Any, *args: Any, method: Any, limit: int | None = None, **more: Any) -> Any:
    """(by recorded launches, without)."""
    made = []
    for wanted in (True, False):
        engine = sf.Engine(net, method, graphs=wanted, points_per_launch=limit)
        made.append(engine(x, *args, **more))
        if wanted:
            recorded(engine)
    return made


def recorded(engine: sf.Engine) -> None:
    """All that was tried could be recorded."""
    found = [one for probe in engine._location.cache.values() for one in probe.captures.values()]
    assert found
    assert all(isinstance(one, captured.CapturedEvaluation) for one in found), found


ADAPTIVE = [one for one in METHODS if with_fixed_nodes(one) is not one]
"""Methods whose points follow from earlier gradients."""


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one.name}-{one.recipe().count}")
@pytest.mark.parametrize("kind", [(Tabular, 7), (Image, 3, 9, 9), (Tokens, 6, 8)])
def test_same_answers(kind: Any, method: Any, limit: int | None):
    net, x = seeded(*kind)
    found, expected = both(net, x[:3], [1, 0, 4], method=method, limit=limit)
    assert Tape.replayed
    same(found, expected)


@pytest.mark.parametrize(
    "method",
    [sf.BlurIG(7, max_sigma=2.0), sf.GradientShap(6, 0.2), sf.SmoothGrad(6, shared_axis=2)],
    ids=lambda one: one.name,
)
def test_points_of_several_families(method: Any):
    net, x = seeded(Image, 3, 9, 9)
    engine = sf.Engine(net, method, points_per_launch=5)
    plain = sf.Engine(net, method, points_per_launch=5, graphs=False)
    rows = x[3:] if method.recipe().baseline == "set" else None
    for k in range(2):
        same(engine(x[k : k + 2], k, rows), plain(x[k : k + 2], k, rows))
    recorded(engine)
    assert Tape.replayed


def test_another_call_of_its_kind_records_nothing():
    net, x = seeded(Image, 3, 9, 9)
    # Other inputs, targets, baselines, seeds, steps and weights of points: the same launches of 6.
    calls: Any = [
        (sf.SmoothGrad(6, seed=seed, sigma=0.2), x[k : k + 1], [k % 5], None)
        for k, seed in enumerate((1, 2, 3))
    ]
    calls += [
        (sf.IntegratedGradients(steps, rule), x[k : k + 1], [k % 5], float(k))
        for k, (steps, rule) in enumerate(((6, "midpoint"), (12, "midpoint"), (6, "trapezoid")))
    ]
    counts = []
    for method, one, target, baseline in calls:
        engine = sf.Engine(net, method, points_per_launch=6)
        expected = sf.Engine(net, method, points_per_launch=6, graphs=False)
        same(engine(one, target, baseline), expected(one, target, baseline))
        counts.append(Tape.made)
    assert counts == [counts[0]] * 3 + [counts[3]] * 3
    assert counts[0] == 3
    assert Tape.replayed > 18


@pytest.mark.parametrize(
    "method", [*ADAPTIVE, sf.IntegratedGradients(tolerance=0.02)], ids=lambda one: repr(one)
)
@pytest.mark.parametrize("limit", [None, 7])
def test_rounds_of_adaptive_nodes_are_replayed(method: Any, limit: int | None):
    net, x = seeded(Image, 3, 9, 9)
    engine = sf.Engine(net, method, points_per_launch=limit)
    plain = sf.Engine(net, method, points_per_launch=limit, graphs=False)
    for k in range(3):
        before = Tape.replayed
        found, expected = engine(x[k : k + 2], k), plain(x[k : k + 2], k)
        same(found, expected)
        assert torch.equal(found.points, expected.points)
        assert Tape.replayed > before
    made = Tape.made
    # The first launches of a kind, which tell what others take, have sizes of their own.
    parts = [list(one.stream(x[:2], 1)) for one in (engine, plain)]
    for found, expected in zip(*parts, strict=True) if limit else [(parts[0][-1], parts[1][-1])]:
        same(found, expected)
    # A tolerance leaves fewer examples in later rounds, whose launches have other sizes.
    assert Tape.made == made or method.tolerance is not None
    recorded(engine)
    # Where all sizes that are captured are there, others run eagerly: a call again makes none.
    made = Tape.made
    engine(x[:2], 0)
    assert Tape.made == made


class TestWorthACapture:
    def test_a_kind_that_comes_again(self, monkeypatch):
        configure(monkeypatch, graph_calls=2)
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        plain = sf.Engine(net, sf.IntegratedGradients(4), graphs=False)
        counts = []
        for k in range(4):
            same(engine(x[k : k + 2], k), plain(x[k : k + 2], k))
            counts.append(Tape.made)
        assert counts[0] == 0 < counts[1] == counts[3]

    def test_launches_that_take_long(self, monkeypatch):
        configure(monkeypatch, graph_calls=2, graph_seconds=1e-9)
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        for _ in range(3):
            engine(x[:2], 1)
        assert Tape.made == 0
        assert "take so long" in engine.plan(x[:2], 1).graphs

    @pytest.mark.parametrize(("gib", "worth"), [(2.7, True), (7.9, True), (8.1, False)])
    def test_up_to_eight_gib(self, gib: float, worth: bool):
        """Fifty points of a ViT-B in bfloat16 take 2.7 GiB, and the host longer than a GPU."""
        nbytes = int(gib * 1024**3)
        plan = SimpleNamespace(
            launch_bytes=nbytes, fixed_bytes=0, finish_bytes=0, points_per_launch=50
        )
        about = {"calibration": SimpleNamespace(seconds={}), "key": (), "config": EngineConfig()}
        call = SimpleNamespace(device=torch.device("cpu"))
        graphs.cache_of(call.device).limit = 16 * 1024**3
        job: Any = SimpleNamespace(plan=plan, call=call, **about)
        assert (captured._too_large(job) is None) == worth

    def test_kinds_that_take_turns_do_not_drive_one_another_out(self):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        cache = graphs.cache_of(torch.device("cpu"))
        engine(x[:3], 1)
        cache.limit = 2 * cache.nbytes
        for _ in range(3):
            for batch in (3, 4, 5, 6):
                engine(x[:batch], 1)
        made = Tape.made
        for batch in (3, 4, 5, 6):
            engine(x[:batch], 1)
        assert Tape.made == made
        # Until one of them alone is asked for.
        for _ in range(6):
            engine(x[:6], 1)
        assert Tape.made > made


def test_seeds_of_each_example_are_made_before():
    """Numbers of the host are copied in no launch."""
    net, x = seeded(Image, 3, 9, 9)
    for kind in (sf.SmoothGrad, sf.VarGrad):
        engine = sf.Engine(net, kind(4, seed=(3, 4)))
        for seed in ((3, 4), (8, 1)):
            method = kind(4, seed=seed)
            engine = sf.Engine(net, method)
            same(engine(x[:2], 1), sf.Engine(net, method, graphs=False)(x[:2], 1))
            recorded(engine)
    with pytest.raises(InputError, match="seed has the wrong length"):
        sf.Engine(net, sf.SmoothGrad(4, seed=(1, 2, 3)))(x[:2], 1)


def test_what_is_put_back_is_over(monkeypatch):
    """The next call's stream waits, however the last one ended."""
    net, x = seeded(Tabular, 7)
    engine = sf.Engine(net, sf.IntegratedGradients(4, "midpoint"))
    engine(x[:2], 1)
    (one,) = [one for probe in engine._location.cache.values() for one in probe.captures.values()]
    for target, finished in ((2, 2), (9, 3)):
        with suppress(InputError):
            engine(x[:2], target)
        assert one._recorder.finished == finished
    monkeypatch.setattr(captured.CapturedEvaluation, "steps", _overflows)
    engine(x[:2], 1)
    assert one._recorder.finished == 4
    # Not before a target that is none.
    assert one._recorder.waited == 3


def _overflows(run: Any, report: Any) -> Any:
    raise captured.OverflowedError
    yield


def test_what_a_dry_run_finds_is_never_captured(monkeypatch):
    net, x = seeded(Tabular, 7)
    evaluated = captured.CapturedEvaluation._evaluated

    def reading(self: Any, size: int) -> Any:
        rows, result = evaluated(self, size)
        float(result.scores.sum())
        return rows, result

    monkeypatch.setattr(captured.CapturedEvaluation, "_evaluated", reading)
    tried = []
    monkeypatch.setattr(Tape, "record", _noting(Tape.record, tried))
    engine = sf.Engine(net, sf.IntegratedGradients(4))
    for _ in range(3):
        same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(4), graphs=False)(x[:2], 1))
    # What comes before the first point.
    assert len(tried) == 1
    assert engine.plan(x[:2], 1).graphs == "off: the host waits for _local_scalar_dense"


def _noting(record: Any, tried: list[Any]) -> Any:
    def noting(self: Any, body: Any) -> Any:
        tried.append(body)
        return record(self, body)

    return noting


def test_every_kind_of_target():
    net, x = seeded(Image, 3, 9, 9)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).double()
    mask = torch.rand(7, 7).double()
    targets: Any = (
        (net, ["predicted", "predicted"]),
        (net, [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 1], [0, 0]])]),
        (dense, [(1, slice(2, 5)), (1, slice(2, 5))]),
        (dense, [(2, mask), (2, mask.flip(0))]),
        (dense, [[(0, 1, 2), (3, 4, 5)], [(1, 1, 2), (2, 0, 0)]]),
    )
    for model, several in targets:
        engine = sf.Engine(model, sf.IntegratedGradients(6))
        before = Tape.replayed
        for number, target in enumerate(several):
            one = x[2 * number : 2 * number + 2] * (1 + 9 * number)
            expected = sf.Engine(model, sf.IntegratedGradients(6), graphs=False)(one, target)
            same(engine(one, target), expected)
        assert Tape.replayed > before
        recorded(engine)


def test_tuples_and_arguments():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor, weight: Tensor, table: Tensor) -> Tensor:
            return (self.a(x).tanh() * self.b(y).sigmoid() * weight + table).sin()

    net = Two().double()
    engine = sf.Engine(net, sf.SmoothGrad(4))
    counts = []
    for seed in range(3):
        torch.manual_seed(seed)
        pair = (torch.randn(2, 5).double(), torch.randn(2, 3).double())
        more: Any = {
            "forward_args": (torch.rand(2, 1).double(),),
            "forward_kwargs": {"table": torch.randn(4).double()},
        }
        expected = sf.Engine(net, sf.SmoothGrad(4), graphs=False)(pair, seed, **more)
        same(engine(pair, seed, **more), expected)
        counts.append(Tape.made)
    assert counts[0] == counts[-1] > 0
    recorded(engine)


def test_several_baselines_and_streams():
    net, x = seeded(Image, 3, 9, 9)
    engine = sf.Engine(net, sf.IntegratedGradients(8), points_per_launch=5)
    plain = sf.Engine(net, sf.IntegratedGradients(8), points_per_launch=5, graphs=False)
    baselines = [0.0, 0.5, "mean"]
    same(engine(x[:2], 1, baselines), plain(x[:2], 1, baselines))
    parts = zip(engine.stream(x[:2], 1), plain.stream(x[:2], 1), strict=True)
    for found, expected in parts:
        same(found, expected)


def test_results_stay_what_they_are():
    """What a call gave is not the recorded launches' memory."""
    net, x = seeded(Image, 3, 9, 9)
    engine = sf.Engine(net, sf.SmoothGrad(4))
    first = engine(x[:2], 1)
    kept = copy.deepcopy((first.values, first.scores, first.error, first.points))
    engine(x[2:4] * 3, 2)
    now = (first.values, first.scores, first.error, first.points)
    assert all(torch.equal(mine, before) for mine, before in zip(now, kept, strict=True))


class TestWeights:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_that_change_in_place(self, precision: str):
        net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
        engine = sf.Engine(net, sf.IntegratedGradients(6), precision=precision)
        engine(x[:2], 1)
        count = Tape.made
        net[4].weight.data.mul_(-1.5)
        net[1].running_var.mul_(3.0)
        plain = sf.Engine(net, sf.IntegratedGradients(6), precision=precision, graphs=False)
        found, expected = engine(x[:2], 1), plain(x[:2], 1)
        assert Tape.made == count
        gap = float((found.values - expected.values).norm() / expected.values.norm())
        assert gap < 1e-4

    def test_that_are_replaced(self):
        net, x = seeded(Image, 3, 9, 9)
        engine = sf.Engine(net, sf.IntegratedGradients(6))
        engine(x[:2], 1)
        count = Tape.made
        # The same parameter in other memory, and another parameter.
        net[4].weight.data = net[4].weight.data * -1.5
        plain = sf.Engine(net, sf.IntegratedGradients(6), graphs=False)
        same(engine(x[:2], 1), plain(x[:2], 1))
        assert Tape.made > count
        net[9].weight = nn.Parameter(net[9].weight.detach() * 2)
        same(engine(x[:2], 1), plain(x[:2], 1))

    def test_modules_that_are_replaced(self):
        net, x = seeded(Image, 3, 9, 9)
        engine = sf.Engine(net, sf.IntegratedGradients(6))
        engine(x[:2], 1)
        net[5] = nn.Tanh()
        same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(6), graphs=False)(x[:2], 1))


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _offered(self, monkeypatch):
        monkeypatch.setitem(precisions.OF_DEVICE, "cpu", precisions.OF_DEVICE["cuda"])

    @pytest.mark.parametrize("name", ["bfloat16", "float16"])
    @pytest.mark.parametrize("method", [sf.IntegratedGradients(7), sf.SmoothGradSquared(6)])
    def test_half_types(self, name: str, method: Any):
        net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
        engine = sf.Engine(net, method, precision=name, points_per_launch=7)
        plain = sf.Engine(net, method, precision=name, points_per_launch=7, graphs=False)
        for k in range(3):
            found, expected = engine(x[k : k + 2], k), plain(x[k : k + 2], k)
            gap = float((found.values - expected.values).norm() / expected.values.norm())
            assert gap < 1e-2
            torch.testing.assert_close(
                found.precision_error, expected.precision_error, rtol=0.2, atol=1e-4
            )
        recorded(engine)

    def test_what_overflows_is_done_without(self, monkeypatch):
        net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
        monkeypatch.setattr(evaluation, "first_scale", lambda _: 2.0**20)
        monkeypatch.setattr(evaluation.SumEvaluation, "measure_precision", _unmeasured)
        method = sf.IntegratedGradients(12, "midpoint")
        engine = sf.Engine(net, method, precision="float16", points_per_launch=6)
        found, expected = engine(x[:2], 1), sf.Engine(net, method, graphs=False)(x[:2], 1)
        gap = float((found.values - expected.values).norm() / expected.values.norm())
        assert gap < 1e-2


def _unmeasured(run: Any, exact: Any) -> Any:
    """A first scale that nobody has tried."""
    run.function = replace(run.function, scale=2.0**20)
    run.precision_error = everywhere(0.0, 1, run.call.device)
    yield from ()


class TestErrors:
    def test_of_the_user_are_his_own_and_change_nothing(self):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        with pytest.raises(InputError, match="out of range: got 9"):
            engine(x[:2], 9)
        same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(4), graphs=False)(x[:2], 1))
        count = Tape.made
        with pytest.raises(InputError, match="out of range: got 9"):
            engine(x[:2], 9)
        same(engine(x[1:3], 2), sf.Engine(net, sf.IntegratedGradients(4), graphs=False)(x[1:3], 2))
        assert Tape.made == count > 0

    def test_a_kind_that_cannot_be_recorded_runs_as_it_is(self, monkeypatch):
        net, x = seeded(Tabular, 7)
        tried = []

        def refused(self: Any, body: Any) -> Any:
            tried.append(body)
            raise RuntimeError("operation not permitted when stream is capturing\nat some line")

        monkeypatch.setattr(Tape, "record", refused)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        expected = sf.Engine(net, sf.IntegratedGradients(4), graphs=False)(x[:2], 1)
        for _ in range(3):
            same(engine(x[:2], 1), expected)
        assert len(tried) == 1
        plan = engine.plan(x[:2], 1)
        assert plan.graphs == "off: operation not permitted when stream is capturing"

    @pytest.mark.parametrize("when", [1, 2, 3])
    def test_failures_in_the_middle(self, monkeypatch, when: int):
        net, x = seeded(Image, 3, 9, 9)
        record, count = Tape.record, []

        def failing(self: Any, body: Any) -> Any:
            count.append(body)
            if len(count) == when:
                body()
                raise torch.OutOfMemoryError("no more memory")
            return record(self, body)

        monkeypatch.setattr(Tape, "record", failing)
        engine = sf.Engine(net, sf.IntegratedGradients(8), points_per_launch=3)
        same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(8), graphs=False)(x[:2], 1))

    def test_reasons_stand_in_the_plan(self, monkeypatch):
        net, x = seeded(Tabular, 7)
        ig = sf.IntegratedGradients(4)
        assert sf.Engine(net, ig).plan(x[:2], 1).graphs == "one for launches of 8"
        assert "graphs     one for launches of 8" in str(sf.Engine(net, ig).plan(x[:2], 1))
        assert "function" in sf.Engine(net, ig).plan(x[:2], lambda y: y[:, 0]).graphs
        assert sf.Engine(net, ig, graphs=False).plan(x[:2], 1).graphs == "off: not wanted"

        def numbers(y: Tensor) -> Tensor:
            return net(y) * (2.0 if float(y.detach().sum()) > 0 else 1.0)

        assert "not recorded" in sf.Engine(numbers, ig).plan(x[:1], 1).graphs
        configure(monkeypatch, graph_launch=1)
        assert "large" in sf.Engine(net, ig).plan(x[:2], 1).graphs
        assert sf.Engine(net, ig)(x[:2], 1) is not None
        assert Tape.made == 0


class TestCache:
    def test_one_call_at_a_time(self):
        net, x = seeded(Video, 2, 5, 6, 6)
        engine, plain = (sf.Engine(net, sf.SmoothGrad(5), graphs=one) for one in (True, False))
        expected = [plain(x[k : k + 1], k % 5) for k in range(16)]
        barrier = threading.Barrier(8)

        def work(worker: int) -> list[tuple[int, sf.Attribution]]:
            barrier.wait()
            return [
                (k, engine(x[k : k + 1], k % 5)) for k in [(worker * 3 + n) % 16 for n in range(12)]
            ]

        with ThreadPoolExecutor(8) as pool:
            for several in pool.map(work, range(8)):
                for number, found in several:
                    same(found, expected[number])

    def test_the_longest_unused_goes_first(self, monkeypatch):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        engine(x[:1], 1)
        cache = graphs.cache_of(torch.device("cpu"))
        each = cache.nbytes
        assert each > 0
        cache.limit = int(9 * each)
        for batch in (2, 3, 1):
            engine(x[:batch], 1)
        held, count = cache.nbytes, Tape.made
        assert held > each
        engine(x[:1], 1)
        assert Tape.made == count
        cache.limit = held
        # A new kind must have had more calls than what goes for it.
        engine(x[:4], 1)
        assert Tape.made == count
        engine(x[:4], 1)
        assert Tape.made > count
        assert cache.nbytes <= held
        count = Tape.made
        # One example was asked for after two were.
        engine(x[:1], 1)
        assert Tape.made == count
        replayed = Tape.replayed
        # Two were given up, and come back with one call more than those that are kept.
        engine(x[:2], 1)
        assert Tape.replayed == replayed
        engine(x[:2], 1)
        assert Tape.made > count

    def test_what_is_too_large_is_not_kept(self):
        net, x = seeded(Tabular, 7)
        graphs.cache_of(torch.device("cpu")).limit = 10
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        for k in range(2):
            same(
                engine(x[:2], k), sf.Engine(net, sf.IntegratedGradients(4), graphs=False)(x[:2], k)
            )
        assert graphs.cache_of(torch.device("cpu")).nbytes == 0

    def test_goes_with_its_model(self):
        net, x = seeded(Tabular, 7)
        sf.explain(net, x[:2], target=1, method=sf.SmoothGrad(8))
        weight = weakref.ref(net[0].weight)
        cache = graphs.cache_of(torch.device("cpu"))
        assert cache.nbytes > 0
        del net
        gc.collect()
        assert cache.nbytes == 0
        assert weight() is None

    def test_requests_share_launches_instead(self):
        net, x = seeded(Tabular, 7)
        with sf.Engine(net, sf.IntegratedGradients(4), latency=0.1) as engine:
            engine.explain_many([{"inputs": one, "target": 1} for one in x.split(1)])
            assert engine.statistics.launches < 16
        assert Tape.replayed == 0


def test_pieces_that_are_computed_again(monkeypatch):
    """Checkpoints inside of a recorded launch."""
    original = Planner._fitting

    def fitting(self: Any, found: Any, *about: Any) -> Any:
        segments = found.strategy.program.in_segments(3)
        strategy = Strategy(segments, precision=found.strategy.precision)
        return original(self, replace(found, strategy=strategy), *about)

    monkeypatch.setattr(Planner, "_fitting", fitting)
    net, x = seeded(Image, 3, 9, 9)
    engine = sf.Engine(net, sf.IntegratedGradients(6))
    for k in range(2):
        found = engine(x[k : k + 2], k)
        assert "computed again in 3 pieces" in found.provenance.strategy
        expected = sf.Engine(net, sf.IntegratedGradients(6), graphs=False)(x[k : k + 2], k)
        same(found, expected)
    recorded(engine)
    assert Tape.made == 3
