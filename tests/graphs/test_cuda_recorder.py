"""How CUDA graphs are captured and replayed, by a stand-in for `torch.cuda`."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import saliency_fast as sf
from saliency_fast.engine import cudagraph
from saliency_fast.engine.cudagraph import (
    CannotCaptureError,
    CudaRecorder,
    DryRun,
    Sharing,
    launching,
)
from saliency_fast.errors import BusyError
from tests.graphs.recording_cuda import POOL, CUDAError, FakeCuda, Taped
from tests.models import Image, Tabular
from tests.service.asking import same, seeded

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    gc.collect()
    monkeypatch.setattr(cudagraph, "_LAST", {})
    return FakeCuda().install(monkeypatch)


class TestStreams:
    @pytest.mark.parametrize("device", [FIRST, SECOND])
    def test_are_of_the_recorders_device_and_each_graphs_own(self, cuda: FakeCuda, device: Any):
        recorders = [CudaRecorder(device) for _ in range(3)]
        replays = [one.record(lambda: cuda.ask("f")) for one in recorders for _ in range(4)]
        streams = [one.streams[0] for one in replays]
        assert len({one.cuda_stream for one in streams}) == 12
        assert {one.index for one in streams} == {device.index}
        assert all(one.graph.body == ["f"] for one in replays)
        assert {one.graph.mode for one in replays} == {"thread_local"}
        assert len({id(one.graph.pool) for one in replays}) == 3

    def test_no_graph_that_lives_shares_one_with_another_recorder(self, cuda: FakeCuda):
        recorders = [CudaRecorder(FIRST) for _ in range(POOL)]
        replays = [one.record(lambda: cuda.ask("f")) for one in recorders]
        with pytest.raises(BusyError, match="streams of the device"):
            CudaRecorder(FIRST).record(lambda: cuda.ask("f"))
        # Graphs of one recorder are replayed one after another, and share one where few are left.
        again = recorders[0].record(lambda: cuda.ask("f"))
        assert again.streams == replays[0].streams
        given_up = replays.pop(5).streams
        assert CudaRecorder(FIRST).record(lambda: cuda.ask("f")).streams == given_up

    def test_the_current_one_comes_back(self, cuda: FakeCuda):
        own = cuda.Stream(SECOND)
        with cuda.stream(own):
            CudaRecorder(SECOND).record(lambda: cuda.ask("f"))
            assert cuda.current_stream(SECOND) == own
        assert cuda.current_device() == 0


class TestFailures:
    def failing(self, cuda: FakeCuda, broken: bool) -> Any:
        def body() -> None:
            cuda.ask("f")
            cuda.capturing[threading.get_ident()].broken = broken
            raise ValueError("the cause")

        return body

    @pytest.mark.parametrize("broken", [False, True])
    def test_leave_nothing_behind(self, cuda: FakeCuda, broken: bool):
        recorder, own = CudaRecorder(FIRST), cuda.Stream(FIRST)
        with cuda.stream(own):
            with pytest.raises(ValueError, match="the cause"):
                recorder.record(self.failing(cuda, broken))
            assert cuda.current_stream(FIRST) == own
        assert not cuda.capturing
        assert len(cuda.ended) == 1
        # And the next one succeeds.
        assert recorder.record(lambda: cuda.ask("g")).graph.body == ["g"]

    def test_captures_that_broke_unseen(self, cuda: FakeCuda):
        def body() -> None:
            cuda.ask("f")
            cuda.capturing[threading.get_ident()].broken = True

        with pytest.raises(CUDAError, match="previous error"):
            CudaRecorder(FIRST).record(body)
        assert cuda.current_stream(FIRST).cuda_stream == 0
        assert len(cuda.ended) == 1


class TestReplays:
    def test_of_a_device_follow_one_another(self, cuda: FakeCuda):
        one, two = (CudaRecorder(FIRST).record(lambda: cuda.ask("f")) for _ in range(2))
        other = CudaRecorder(SECOND).record(lambda: cuda.ask("f"))
        mine = cuda.Stream(FIRST)
        cuda.log.clear()
        one()
        other()
        with cuda.stream(mine):
            two()
        first, default = cuda.did("replay"), cuda.current_stream(FIRST)
        assert [(a, b) for _, a, b in first] == [
            (one.streams[0], default),
            (other.streams[0], cuda.current_stream(SECOND)),
            (two.streams[0], mine),
        ]
        # The one on another stream waits for the end of the last on its device, and of no other.
        assert cuda.did("wait") == [("wait", mine, default)]
        order = [what[0] for what in cuda.log if what[0] != "stream"]
        assert order == ["replay", "record"] * 2 + ["wait", "replay", "record"]

    def test_another_thread_waits_for_what_was_done(self, cuda: FakeCuda):
        recorder, mine = CudaRecorder(FIRST), cuda.Stream(FIRST)
        recorder.wait()
        assert not cuda.did("wait")
        recorder.done()
        with cuda.stream(mine):
            recorder.wait()
        assert cuda.did("wait") == [("wait", mine, cuda.current_stream(FIRST))]


class TestCalls:
    """Whole calls by the recorder for GPUs, the CPU doing their arithmetic."""

    @pytest.fixture
    def gpu(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        return cuda.capture_calls(monkeypatch, Taped)

    @pytest.mark.parametrize(
        "method", [sf.IntegratedGradients(6), sf.SmoothGrad(5, seed=(3, 4)), sf.VarGrad(4)]
    )
    def test_are_those_without_captures(self, gpu: FakeCuda, method: Any):
        net, x = seeded(Image, 3, 9, 9)
        engine, plain = (sf.Engine(net, method, graphs=one) for one in (True, False))
        for k in range(3):
            gpu.log.clear()
            same(engine(x[k : k + 2], k), plain(x[k : k + 2], k))
            assert bool(gpu.did("begin")) == (k == 0)
            assert gpu.did("replay")
        # The stream of the call waits for the last call's end before anything is written.
        order = [one[0] for one in gpu.log]
        assert order[0] == "wait"
        assert order[-1] == "record"
        assert not gpu.capturing

    def test_from_threads_with_streams_of_their_own(self, gpu: FakeCuda):
        nets = [seeded(Image, 3, 9, 9), seeded(Tabular, 7)]
        method = sf.IntegratedGradients(6)
        expected = [sf.Engine(net, method, graphs=False)(x[:2], 1) for net, x in nets]

        def work(number: int) -> None:
            net, x = nets[number % 2]
            with gpu.stream(gpu.Stream(FIRST)):
                for _ in range(4):
                    same(sf.Engine(net, method)(x[:2], 1), expected[number % 2])

        with ThreadPoolExecutor(4) as pool:
            for one in [pool.submit(work, number) for number in range(8)]:
                one.result(60)
        # Each replay waits for the one before it, on whichever stream that was.
        last, waits = None, set[Any]()
        for what, *about in gpu.log:
            if what == "wait":
                waits.add(tuple(about))
            elif what == "replay":
                assert last is None or (about[1], last) in waits
                last, waits = about[1], set()

    def test_one_that_is_given_up_hurts_no_other(self, gpu: FakeCuda):
        net, x = seeded(Tabular, 7)
        engine = sf.Engine(net, sf.IntegratedGradients(4))
        plain = sf.Engine(net, sf.IntegratedGradients(4), graphs=False)
        engine(x[:1], 1)
        engine(x[:2], 1)
        streams = {one.streams for one in cudagraph._REPLAYS}
        assert cudagraph.cache_of(x.device).give_up_one()
        assert {one.streams for one in cudagraph._REPLAYS} < streams
        gpu.log.clear()
        same(engine(x[2:4], 2), plain(x[2:4], 2))
        assert not gpu.did("begin")


class TestSharing:
    def test_no_thread_asks_for_anything_while_another_captures(self, cuda: FakeCuda):
        def body() -> None:
            for _ in range(4):
                cuda.ask("f")
                time.sleep(0.001)

        def capture() -> None:
            assert CudaRecorder(FIRST).record(body).graph.body == ["f"] * 4

        def launch() -> None:
            with launching(FIRST):
                body()

        with ThreadPoolExecutor(6) as pool:
            made = [pool.submit(capture if n % 4 == 0 else launch) for n in range(60)]
            assert [one.exception() for one in made] == [None] * 60

    def test_all_runs_of_a_model_share(self, monkeypatch):
        monkeypatch.setitem(cudagraph.RECORDERS, "cpu", cudagraph.CudaRecorder)
        shared: list[bool] = []

        class Net(Image):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                shared.append(threading.get_ident() in cudagraph.DEVICES._sharing)
                return super().forward(x)

        several = (sf.IntegratedGradients(20), sf.Occlusion((1, 3, 3)), sf.GradCAM("0"), "gradient")
        for method in several:
            engine = sf.Engine(Net().eval().float(), method, graphs=False)
            for target in (1, "predicted"):
                engine(torch.randn(3, 3, 9, 9), target)
            engine.plan(torch.randn(3, 3, 9, 9), 1)
        assert all(shared)
        assert len(shared) > 20

    def test_a_call_waits_for_a_capture(self, monkeypatch):
        monkeypatch.setitem(cudagraph.RECORDERS, "cpu", cudagraph.CudaRecorder)
        engine = sf.Engine(torch.nn.Linear(9, 3), sf.IntegratedGradients(20), graphs=False)
        with ThreadPoolExecutor(1) as pool:
            with cudagraph.DEVICES.alone():
                running = pool.submit(engine, torch.randn(2, 9), 1)
                time.sleep(0.2)
                assert not running.done()
            assert running.result(20).values.shape == (2, 9)

    def test_launches_share_and_captures_are_alone(self):
        gate, inside, most, wrong = Sharing(), [0], [0], list[str]()
        lock = threading.Lock()

        def launch() -> None:
            with gate.shared(), gate.shared():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with lock:
                    inside[0] -= 1

        def capture() -> None:
            with gate.alone(), gate.shared():
                before = inside[0]
                time.sleep(0.001)
                if before or inside[0]:
                    wrong.append("a launch beside a capture")

        with ThreadPoolExecutor(8) as pool:
            made = [pool.submit(capture if n % 5 == 0 else launch) for n in range(200)]
            assert all(one.exception() is None for one in made)
        assert not wrong
        assert most[0] > 1

    def test_a_launch_that_does_not_end_forbids_captures_alone(self, monkeypatch: Any):
        monkeypatch.setattr(cudagraph, "PATIENCE", 0.05)
        gate, go_on = Sharing(), threading.Event()

        def long() -> None:
            with gate.shared():
                go_on.wait(10)

        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(long)
            while not gate._sharing:
                time.sleep(0.001)
            with pytest.raises(BusyError), gate.alone():
                pass
            # Nobody has to wait for it.
            pool.submit(lambda: gate.shared().__enter__()).result(5)
            go_on.set()
            running.result(5)


class TestDryRun:
    CPU = torch.device("cpu")
    x = torch.arange(4.0)

    @pytest.mark.parametrize(
        "body",
        [
            lambda x: float(x.sum()),
            lambda x: x[x > 1],
            lambda x: x.nonzero(),
            lambda x: x.index_put_((x > 1,), x[:1]),
            lambda x: torch.unique(x),
            lambda x: bool((x > 0).all()),
            lambda x: torch.equal(x, x),
            lambda x: torch.tensor([1.0, 2.0]) + x[:2],
            lambda x: x.to("meta"),
            lambda x: x.repeat_interleave(x.long()),
        ],
    )
    def test_finds_what_no_capture_allows(self, body: Any):
        with pytest.raises(CannotCaptureError), DryRun(self.CPU):
            body(self.x.clone())

    def test_also_in_the_backward_pass(self):
        x = self.x.clone().requires_grad_()
        y = x.exp()
        y.register_hook(lambda grad: grad * float(grad.sum()))
        with pytest.raises(CannotCaptureError), DryRun(self.CPU):
            y.sum().backward()

    def test_lets_everything_else_pass(self):
        x = self.x.clone()
        with DryRun(self.CPU):
            y = torch.where(x > 1, x, 2.0)[torch.arange(2)].repeat_interleave(2).clone()
            y.index_add_(0, torch.arange(4), x).copy_(x).mul_(torch.ones(()))

    def test_numbers_of_another_device_may_be_read(self):
        with DryRun(torch.device("cuda")):
            assert float(self.x.sum()) == 6.0


def test_no_call_waits_for_a_whole_device():
    """The device's idleness is asked for nowhere: that breaks captures of other threads."""
    root = Path(sf.__file__).parent
    texts = {path: path.read_text() for path in root.rglob("*.py") if "kernels" not in path.parts}
    for word in ("cuda.synchronize(", "torch.cuda.graph(", "cudnn.flags(", "cudnn.benchmark"):
        assert not [str(path) for path, text in texts.items() if word in text], word
    # Given back only where a launch has run out of memory.
    users = [path.name for path, text in texts.items() if "empty_cache(" in text]
    assert users == ["planner.py"]
