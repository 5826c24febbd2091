"""Nothing waits for a device that need not: times, results and counts, by a stand-in for CUDA."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saliency_fast as sf
from saliency_fast import ops
from saliency_fast.engine import launch, loop, memory, service, trials
from saliency_fast.engine.config import DEFAULT
from saliency_fast.engine.precision import PrecisionErrors
from saliency_fast.errors import BackendError
from saliency_fast.graph.autograd import activations
from saliency_fast.model.failures import is_out_of_memory, warn_of_kernel
from saliency_fast.model.preserve import restored_random_state
from saliency_fast.together import Arguments
from tests.configured import configure
from tests.graphs.recording_cuda import FakeCuda, Stream
from tests.models import Image, Tabular
from tests.service.asking import same, seeded

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


class TestTimes:
    def test_a_call_waits_for_its_own_stream(self, cuda: FakeCuda):
        own = cuda.Stream(GPU)
        with cuda.stream(own):
            launch.wait_for(GPU)
        assert cuda.did("host waits") == [("host waits", own)]
        launch.wait_for(torch.device("cpu"))
        assert len(cuda.did("host waits")) == 1

    def test_launches_are_timed_by_events_and_with_enough_rows(self, monkeypatch, cuda: FakeCuda):
        net, x = seeded(Tabular, 7, dtype=torch.float32)
        rows, events = [], []

        def trial(self: Any, count: int, arena: Any) -> None:
            rows.append(count)

        def mark(device: Any, **options: bool) -> Any:
            event = cuda.Event(**options)
            events.append(event)
            return event

        monkeypatch.setattr(loop.SumEvaluation, "trial", trial)
        engine = sf.Engine(net, sf.IntegratedGradients(200, "midpoint"), points_per_launch=200)
        job, _ = engine._prepare(engine._bound(_given(x[:1], 1)), _given(x[:1], 1))
        device = SimpleNamespace(type="cuda", index=0)
        of_gpu = replace(job, call=replace(job.call, inputs=job.call.inputs))
        monkeypatch.setattr(trials, "mark", mark)
        monkeypatch.setattr(type(job.call), "device", property(lambda _: device))
        monkeypatch.setattr(trials, "_trial", lambda job: SimpleNamespace(trial=partial_of(trial)))
        monkeypatch.setattr(trials, "restored_random_state", lambda *_: nullcontext())
        # The stand-in's events are a quarter of a second apart.
        assert trials._seconds_per_point(of_gpu) == 0.25 / 128
        assert rows == [128, 128]
        assert all(one.options == {"enable_timing": True} for one in events)


def partial_of(trial: Any) -> Any:
    return lambda rows, arena: trial(None, rows, arena)


def _given(x: Tensor, target: Any) -> Any:
    return Arguments(x, target, None, (), None, None, None, None)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.count += name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "_unique2")
        chosen = args[1] if name == "index" else ()
        self.count += any(one is not None and one.dtype == torch.bool for one in chosen)
        return func(*args, **(kwargs or {}))


def reads(engine: sf.Engine, x: Tensor) -> float:
    """How many numbers the host reads in a call for each of its launches."""
    for _ in range(8):
        engine(x, 1)
    with Reads() as counted:
        engine(x, 1)
    return counted.count / engine.plan(x, 1).launches


@pytest.mark.parametrize(
    "method",
    [
        sf.Occlusion((1, 3, 3), (1, 3, 3)),
        sf.FeatureAblation(),
        sf.Rise(100),
        sf.Rise(100, seed=(1, 2, 3, 4)),
    ],
    ids=lambda one: one.name,
)
def test_no_launch_of_a_round_is_read(method: Any):
    net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
    # About twenty of a call; a row that is proved now and then reads two more.
    each = reads(sf.Engine(net, method, points_per_launch=2, hashes=False), x[:4])
    assert each < 0.5


CAMS = sf.GradCAM("0"), sf.ScoreCAM("0"), sf.GuidedGradCAM("0")


def test_the_first_round_sets_the_classes_whatever_the_scores():
    """They are counted, and not looked for among scores that may be NaN for good."""
    net, x = seeded(Image, 3, 9, 9, dtype=torch.float32)
    for limit, method in ((limit, one) for limit in (None, 1) for one in CAMS):
        engine = sf.Engine(net, method, points_per_launch=limit)
        found = engine(x[:3], "predicted")
        assert torch.equal(found.classes, net(x[:3]).argmax(1))
        # Later rounds are about these.
        same(found, engine(x[:3], found.classes), 1e-5)


class TestResults:
    """Of requests: given out when the GPU has made them, while the thread goes on."""

    def test_the_thread_of_requests_does_not_wait(self, monkeypatch):
        net, x = seeded(Tabular, 7, dtype=torch.float32)
        made, go_on, waiters = [], threading.Event(), []

        class End:
            def synchronize(self) -> None:
                waiters.append(threading.current_thread().name)
                assert go_on.wait(20)

        monkeypatch.setattr(service, "mark", lambda device, **_: made.append(device) or End())
        expected = sf.Engine(net, "gradient")
        with sf.Engine(net, "gradient") as engine:
            futures = [engine.submit(x[k : k + 1], 1) for k in range(4)]
            while len(made) < 4:
                assert not futures[0].done()
            # All were computed while the first one's end was not there yet.
            go_on.set()
            for k, future in enumerate(futures):
                same(future.result(20), expected(x[k : k + 1], 1), 1e-5)
            # From a callback, too.
            closed = threading.Event()
            last = engine.submit(x[:1], 1)
            last.add_done_callback(lambda _: (engine.close(), closed.set()))
            assert closed.wait(20)
        assert set(waiters) == {f"{service.RESULTS}_0"}

    def test_what_fails_on_the_device_is_told(self, monkeypatch):
        net, x = seeded(Tabular, 7, dtype=torch.float32)

        class End:
            def synchronize(self) -> None:
                raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(service, "mark", lambda device, **_: End())
        engine = sf.Engine(net, "gradient")
        with engine, pytest.raises(RuntimeError, match="illegal memory access"):
            engine.submit(x[:1], 1).result(20)

    def test_their_memory_is_kept_for_the_callers_stream(self, cuda: FakeCuda):
        noted: list[Any] = []

        class OnGpu(Tensor):
            is_cuda = True

            def record_stream(self, stream: Stream) -> None:
                noted.append(stream)

        one, own = torch.zeros(2).as_subclass(OnGpu), cuda.Stream(GPU)
        launch.lend({"values": (one, one), "scores": one, "text": "x", "cpu": torch.zeros(2)}, own)
        assert noted == [own] * 3
        launch.lend([one], None)
        assert len(noted) == 3


class TestMemory:
    def test_private_pools_are_not_free(self, monkeypatch):
        pools = [((0, 0), 0), ((1, 0), 0), ((2, 0), 0), ((3, 0), 1)]
        snapshot = [
            {"segment_pool_id": pool, "device": device, "total_size": 100, "allocated_size": 30}
            for pool, device in pools
        ]
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 90)
        memory._private_bytes.cache_clear()
        assert memory.free_bytes(GPU) == 1000 + 210 - 140
        memory._private_bytes.cache_clear()

    def test_every_way_to_run_out_of_it(self):
        text = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
        assert is_out_of_memory(torch.AcceleratorError(text))
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
        assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access"))


def test_the_devices_random_state_comes_back(monkeypatch):
    state = [torch.zeros(3)]
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: state[0].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, _: state.__setitem__(0, new))
    for drew, expected in ((True, 0.0), (False, 1.0)):
        with restored_random_state(lambda drew=drew: drew, GPU):
            state[0] = state[0] + 1
        assert float(state[0].sum()) == 3 * expected


def _raised(module: str, error: Exception) -> Exception:
    """The error as a function of that module raises it."""
    about: dict[str, Any] = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", about)
    with pytest.raises(type(error)) as caught:
        about["fail"]()
    return caught.value


class TestKernelsThatFail:
    def test_are_told(self):
        with pytest.warns(UserWarning, match="a kernel failed.*BackendError: relu_mask_ failed"):
            warn_of_kernel(BackendError("relu_mask_ failed on cuda:0 with CUDA error 209"))
        with pytest.warns(UserWarning, match="no C compiler"):
            warn_of_kernel(_raised("triton.runtime.build", RuntimeError("no C compiler")))
        outer = RuntimeError("the model failed")
        outer.__cause__ = torch.AcceleratorError("CUDA error: an illegal memory access")
        with pytest.warns(UserWarning, match="illegal"):
            warn_of_kernel(outer)

    @pytest.mark.filterwarnings("error")
    def test_nothing_else_is(self):
        warn_of_kernel(RuntimeError("this layer has no version of ours"))
        warn_of_kernel(torch.AcceleratorError("CUDA error: out of memory"))

    @pytest.mark.parametrize(("points", "direct"), [(4, 0), (400, 0), (4, 16)])
    def test_a_strategy_is_not_given_up_silently(self, monkeypatch, points: int, direct: int):
        # Few points are intercepted by versions of which nothing was tried before.
        own = {"direct_points": direct, "direct_lean_from": 0}
        configure(monkeypatch, **own)

        def broken(*_: Any, **__: Any) -> Any:
            raise BackendError("relu_mask_ failed on cuda:0 with CUDA error 209")

        own = SimpleNamespace(**vars(ops) | {"relu_mask": broken, "relu_mask_": broken})
        monkeypatch.setattr(activations, "ops", own)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3)
        )
        x = torch.randn(1, 3, 96, 96)
        net(x)
        method = sf.IntegratedGradients(points, "midpoint")
        with pytest.warns(UserWarning, match="a kernel failed, and calls go on without it"):
            found = sf.explain(net, x, target=1, method=method)
        same(found, sf.explain(net, x, target=1, method=method, lean=False), 1e-4)


class TestPrecisionIsMeasuredRarely:
    def error(self, value: float) -> Tensor:
        return torch.full((1, 1), value, dtype=torch.float64)

    def measured(self, errors: PrecisionErrors, calls: int, *, rarely: bool) -> int:
        about = (50, 1, torch.device("cpu"), DEFAULT)
        count = 0
        for _ in range(calls):
            if errors.cached(*about, rarely=rarely) is None:
                count += 1
                errors.note(self.error(0.004), 0.0, 0.02)
        return count

    def test_where_it_stays_the_same(self):
        assert self.measured(PrecisionErrors(), 100, rarely=True) == 2 + 98 * 50 // 1050
        assert self.measured(PrecisionErrors(), 100, rarely=False) == 100

    @pytest.mark.parametrize("values", [(0.004, 0.009), (0.011, 0.011), (0.004, float("nan"))])
    def test_and_not_else(self, values: tuple[float, float]):
        errors = PrecisionErrors()
        for one in values:
            errors.note(self.error(one), 0.0, 0.02)
        assert errors.cached(50, 1, torch.device("cpu"), DEFAULT, rarely=True) is None
