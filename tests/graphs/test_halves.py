"""Captured launches in two halves, each on a stream of its own, by a stand-in for `torch.cuda`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import captured, cudagraph
from saliency_fast.engine.cudagraph import CudaRecorder
from saliency_fast.engine.evaluation import parts_of
from saliency_fast.errors import ModelError
from tests.configured import configure
from tests.graphs.recording_cuda import POOL, CUDAError, FakeCuda, Taped, WatchedGraph
from tests.models import Image, Tabular
from tests.service.asking import METHODS, same, seeded

FIRST = torch.device("cuda", 0)
Parts = Sequence[Callable[[], Any]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    gc.collect()
    monkeypatch.setattr(cudagraph, "_LAST", {})
    configure(monkeypatch, direct_points=0, graph_calls=1, graph_seconds=9e9, graph_halves=True)
    return FakeCuda().install(monkeypatch)


def sides(cuda: FakeCuda) -> set[str]:
    """Streams of kernels on which no capture began."""
    began = {str(stream) for _, stream in cuda.did("begin")}
    return {str(stream) for _, _, stream in cuda.did("kernel")} - began


class TestCalls:
    @pytest.fixture
    def gpu(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        return cuda.capture_calls(monkeypatch, Taped)

    @pytest.mark.parametrize("limit", [None, 7])
    @pytest.mark.parametrize(
        "method",
        [
            *METHODS,
            sf.SmoothGrad(6, seed=(3, 4)),
            sf.BlurIG(7, max_sigma=2.0),
            sf.GradientShap(6, 0.2),
            sf.SmoothGrad(6, shared_axis=2),
        ],
        ids=lambda one: f"{one.name}-{one.recipe().count}",
    )
    def test_are_those_of_whole_launches(self, gpu: FakeCuda, method: Any, limit: int | None):
        """Each row has its own example, node, seed, weight and replicate, wherever it is."""
        net, x = seeded(Image, 3, 9, 9)
        engine = sf.Engine(net, method, points_per_launch=limit)
        plain = sf.Engine(net, method, points_per_launch=limit, graphs=False)
        rows = x[10:] if method.recipe().baseline == "set" else None
        for k in range(2):
            found, expected = engine(x[k : k + 2], k, rows), plain(x[k : k + 2], k, rows)
            same(found, expected)
            assert torch.equal(found.points, expected.points)
        assert gpu.did("replay")
        assert not gpu.races
        # Launches of two rows, at the inputs themselves, are not divided.
        assert bool(sides(gpu)) == (method.recipe().count > 1)

    def test_further_arguments_follow_their_rows(self, gpu: FakeCuda):
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(5, 4)

            def forward(self, x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
                return (self.a(x).tanh() * weight + table).sin()

        torch.manual_seed(0)
        net, x = Two().double(), torch.randn(3, 5).double()
        engine, plain = (sf.Engine(net, sf.SmoothGrad(5), graphs=one) for one in (True, False))
        for target in ([0, 1, 2], "predicted"):
            more = {"forward_args": (torch.rand(3, 1).double(), torch.randn(4).double())}
            same(engine(x, target, **more), plain(x, target, **more))
        assert sides(gpu)
        assert not gpu.races

    def test_are_the_same_every_time(self, gpu: FakeCuda):
        net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
        engine = sf.Engine(net, sf.IntegratedGradients(20))
        first, again = (engine(x[:2], 1) for _ in range(2))
        assert torch.equal(first.values, again.values)

    def test_plans_say_so_and_proofs_are_of_halves(self, gpu: FakeCuda):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(9, "midpoint"), points_per_launch=9)
        engine(x[:1], 1)
        assert engine.plan(x[:1], 1).graphs == "one for launches of 9, in two halves"
        known = engine._location.cache.rows.values()
        assert any({4, 5} <= one._sizes for one in known)


def test_small_launches_stay_whole(cuda: FakeCuda):
    config = sf.Engine(nn.Identity()).config
    assert [parts_of(n, config) for n in (1, 2, 3)] == [(1,), (2,), (3,)]
    assert [parts_of(n, config) for n in (4, 5, 50)] == [(2, 2), (2, 3), (25, 25)]


# What might be wrong with `CudaRecorder.beside`: each is found.
Beside = Callable[[CudaRecorder, Parts], list[Any]]


def begins_before_its_inputs(self: Any, parts: Parts) -> list[Any]:
    current, side = torch.cuda.current_stream(FIRST), self._stream(torch.cuda.current_stream())
    side.wait_event(START[0])
    with torch.cuda.stream(side):
        others = [part() for part in parts[1:]]
    found = [parts[0](), *others]
    current.wait_event(side.record_event())
    return found


def is_read_before_it_is_done(self: Any, parts: Parts) -> list[Any]:
    current, side = torch.cuda.current_stream(FIRST), self._stream(torch.cuda.current_stream())
    side.wait_event(current.record_event())
    with torch.cuda.stream(side):
        done = side.record_event()
        others = [part() for part in parts[1:]]
    found = [parts[0](), *others]
    current.wait_event(done)
    torch.cat([one.scores for one in found])
    current.wait_event(side.record_event())
    return found


def frees_what_the_other_reads(self: Any, parts: Parts) -> list[Any]:
    current, side = torch.cuda.current_stream(FIRST), self._stream(torch.cuda.current_stream())
    shared = torch.ones(3)
    side.wait_event(current.record_event())
    with torch.cuda.stream(side):
        others = [part() for part in parts[1:]]
        shared.sum()
    del shared
    found = [parts[0](), *others]
    current.wait_event(side.record_event())
    return found


def is_never_joined(self: Any, parts: Parts) -> list[Any]:
    current, side = torch.cuda.current_stream(FIRST), self._stream(torch.cuda.current_stream())
    side.wait_event(current.record_event())
    with torch.cuda.stream(side):
        others = [part() for part in parts[1:]]
    return [parts[0](), *others]


START: list[Any] = []


class TestOrder:
    """By operators, memory and clocks of streams; see `Watched`."""

    def run(self, cuda: FakeCuda, patch: pytest.MonkeyPatch, beside: Beside | None = None) -> Any:
        cuda.capture_calls(patch, WatchedGraph)
        if beside is not None:

            def only_in_captures(self: Any, parts: Parts) -> list[Any]:
                capturing = torch.cuda.is_current_stream_capturing() and len(parts) > 1
                return beside(self, parts) if capturing else [part() for part in parts]

            patch.setattr(CudaRecorder, "beside", only_in_captures)
        evaluated = captured.CapturedEvaluation._evaluated

        def starting(self: Any, size: int) -> Any:
            START[:] = [torch.cuda.current_stream(FIRST).record_event()]
            return evaluated(self, size)

        patch.setattr(captured.CapturedEvaluation, "_evaluated", starting)
        net, x = seeded(Image, 3, 9, 9)
        engine = sf.Engine(net, sf.SmoothGrad(9), points_per_launch=18)
        with suppress(ModelError):
            # Nothing is computed.
            engine(x[:2], 1)
        return engine.plan(x[:2], 1).graphs

    def test_of_a_capture_is_right(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
        assert self.run(cuda, monkeypatch).startswith("one for")
        assert sides(cuda)
        assert not cuda.races

    @pytest.mark.parametrize(
        ("beside", "race"),
        [
            (begins_before_its_inputs, "before what it uses is written"),
            (is_read_before_it_is_done, "before what it uses is written"),
            (frees_what_the_other_reads, "memory that others are not done with"),
        ],
    )
    def test_that_is_wrong_is_found(self, cuda: FakeCuda, monkeypatch: Any, beside: Any, race: str):
        self.run(cuda, monkeypatch, beside)
        assert [one for one in cuda.races if race in one]

    def test_of_a_stream_that_is_not_joined(self, cuda: FakeCuda, monkeypatch: Any):
        assert "unjoined work" in self.run(cuda, monkeypatch, is_never_joined)


class TestStreams:
    def forked(self, cuda: FakeCuda, recorder: CudaRecorder) -> Callable[[], None]:
        return lambda: recorder.beside([lambda: cuda.ask("f"), lambda: cuda.ask("g")])

    def test_of_halves_are_no_other_graphs(self, cuda: FakeCuda):
        recorders = [CudaRecorder(FIRST) for _ in range(6)]
        replays = [one.record(self.forked(cuda, one)) for one in recorders for _ in range(2)]
        mains = {one.streams[0].cuda_stream for one in replays}
        beside = {one.streams[1].cuda_stream for one in replays}
        assert len(beside) == 6
        assert not mains & beside
        assert all(one.graph.body == ["g", "f"] for one in replays)

        def more() -> None:
            for _ in range(POOL):
                recorders.append(CudaRecorder(FIRST))
                replays.append(recorders[-1].record(self.forked(cuda, recorders[-1])))

        with pytest.raises(cudagraph.NoStreamError):
            more()

    def test_wait_for_one_another(self, cuda: FakeCuda):
        recorder = CudaRecorder(FIRST)
        main, side = map(str, recorder.record(self.forked(cuda, recorder)).streams)
        order = [tuple(map(str, one)) for one in cuda.log if one[0] in ("kernel", "wait")]
        assert order == [("wait", side, main), ("kernel", "g", side), ("kernel", "f", main),
                         ("wait", main, side)]  # fmt: skip

    @pytest.mark.parametrize("half", [0, 1])
    @pytest.mark.parametrize("broken", [False, True])
    def test_come_back_where_a_half_fails(self, cuda: FakeCuda, half: int, broken: bool):
        recorder = CudaRecorder(FIRST)
        kernels: list[Callable[[], None]] = [lambda: cuda.ask("f")] * 2

        def fails() -> None:
            cuda.ask("f")
            for graph in cuda.capturing.values():
                graph.broken = broken
            raise ValueError("the cause")

        kernels[half] = fails
        with pytest.raises(ValueError, match="the cause"):
            recorder.record(lambda: recorder.beside(kernels))
        assert not cuda.capturing
        assert len(cuda.ended) == 1
        assert cuda.current_stream(FIRST).cuda_stream == 0
        # The next one has streams of its own, whatever became of these.
        found = recorder.record(self.forked(cuda, recorder))
        assert found.streams[0] != found.streams[1]

    def test_outside_of_a_capture_stay_as_they_are(self, cuda: FakeCuda):
        recorder = CudaRecorder(FIRST)
        self.forked(cuda, recorder)()
        assert {str(stream) for _, _, stream in cuda.did("kernel")} == {"0:0"}
        with pytest.raises(CUDAError, match="no capture"):
            cuda.CUDAGraph().capture_end()
