"""A stand-in for `torch.cuda` on machines without a GPU: streams, events and graphs that note what
they are asked for, with CUDA's laws of captures and of the order of streams.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from saliency_fast.engine import cudagraph
from tests.graphs.tape import Tape, _Log

POOL = 32
"""Streams of a device: more that are asked for are the same ones again."""


class CUDAError(RuntimeError):
    """What CUDA would not allow."""


class FakeCuda:
    """Put in the place of `torch.cuda`; `log` holds (what, which, thread's current stream)."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.capturing: dict[int, Any] = {}
        self.made: dict[int, int] = {}
        self.ended: list[Any] = []
        self.clocks: dict[str, dict[str, int]] = {}
        self.races: list[str] = []
        self._here = threading.local()
        self._defaults: dict[int, Stream] = {}

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        names = (
            "Stream Event CUDAGraph stream device current_stream graph_pool_handle synchronize "
            "empty_cache get_device_properties is_current_stream_capturing"
        )
        for name in names.split():
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(
            "saliency_fast.engine.cudagraph.end_allocation_to_pool",
            lambda device, pool: self.ended.append(pool),
        )
        return self

    def capture_calls(self, patch: pytest.MonkeyPatch, kind: type[WatchedGraph]) -> FakeCuda:
        """From now on launches of calls on the CPU are captured here."""
        patch.setattr(torch.cuda, "CUDAGraph", lambda: kind(self))
        patch.setattr(cudagraph, "_CACHES", {})
        device = torch.device("cuda", 0)
        patch.setitem(cudagraph.RECORDERS, "cpu", lambda _: cudagraph.CudaRecorder(device))
        return self

    def note(self, what: str, *about: Any) -> None:
        self.log.append((what, *about))

    def did(self, what: str) -> list[tuple[Any, ...]]:
        return [one for one in self.log if one[0] == what]

    def Stream(self, device: Any = None, priority: int = 0) -> Stream:  # noqa: N802
        index = self.current_device() if device is None else torch.device(device).index
        number = self.made[index] = self.made.get(index, 0) + 1
        self.note("stream", index)
        return Stream(self, index, 1 + number % POOL)

    def Event(self, **options: bool) -> Event:  # noqa: N802
        return Event(self, options)

    def CUDAGraph(self) -> CUDAGraph:  # noqa: N802
        return CUDAGraph(self)

    def current_device(self) -> int:
        return getattr(self._here, "device", 0)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.current_device() if device is None else torch.device(device).index
        streams = getattr(self._here, "streams", {})
        if index not in self._defaults:
            self._defaults[index] = Stream(self, index, 0)
        return streams.get(index, self._defaults[index])

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        if not hasattr(self._here, "streams"):
            self._here.streams = {}
        before = self._here.streams.get(stream.index)
        self._here.streams[stream.index] = stream
        try:
            yield
        finally:
            self._here.streams.pop(stream.index)
            if before is not None:
                self._here.streams[stream.index] = before

    @contextmanager
    def device(self, device: Any) -> Any:
        before, self._here.device = self.current_device(), torch.device(device).index
        try:
            yield
        finally:
            self._here.device = before

    def graph_pool_handle(self) -> object:
        return object()

    def synchronize(self, device: Any = None) -> None:
        raise CUDAError("the whole device is waited for, which breaks captures of other threads")

    def empty_cache(self) -> None:
        raise CUDAError("memory is given back, for which the device is waited for")

    def get_device_properties(self, device: Any) -> Any:
        raise CUDAError("no device")

    def is_current_stream_capturing(self) -> bool:
        graph = self.capturing.get(threading.get_ident())
        return graph is not None and self.current_stream().behind(graph.begun)

    def ask(self, what: str) -> None:
        """A kernel on the current stream of the current device."""
        stream = self.current_stream()
        others = [one for one in self.capturing if one != threading.get_ident()]
        if others:
            raise CUDAError("a launch while another thread captures")
        graph = self.capturing.get(threading.get_ident())
        if graph is not None:
            if not stream.behind(graph.begun):
                raise CUDAError("the kernel is not on a capturing stream: it is lost")
            graph.body.append(what)
        stream.tick()
        self.note("kernel", what, stream)


class Stream:
    def __init__(self, cuda: FakeCuda, index: int, handle: int) -> None:
        self.cuda, self.index, self.cuda_stream = cuda, index, handle
        self.device = torch.device("cuda", index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and repr(other) == repr(self)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{self.index}:{self.cuda_stream}"

    @property
    def clock(self) -> dict[str, int]:
        """Kernels of each stream that come before what this one is asked for next."""
        return self.cuda.clocks.setdefault(repr(self), {})

    def tick(self) -> tuple[str, int]:
        self.clock[repr(self)] = self.clock.get(repr(self), 0) + 1
        return repr(self), self.clock[repr(self)]

    def behind(self, at: tuple[str, int]) -> bool:
        """Whether what was asked of a stream is over before anything that follows here."""
        return self.clock.get(at[0], 0) >= at[1]

    def wait_event(self, event: Event) -> None:
        self.cuda.note("wait", self, event.stream)
        for stream, number in event.clock.items():
            self.clock[stream] = max(number, self.clock.get(stream, 0))

    def record_event(self) -> Event:
        event = Event(self.cuda, {})
        event.record(self)
        return event


class Event:
    def __init__(self, cuda: FakeCuda, options: dict[str, bool]) -> None:
        self.cuda, self.options, self.stream = cuda, options, None

    def record(self, stream: Stream) -> None:
        self.stream, self.clock = stream, stream.clock.copy()
        self.cuda.note("record", stream)

    def synchronize(self) -> None:
        self.cuda.note("host waits", self.stream)

    def elapsed_time(self, end: Event) -> float:
        return 250.0


class CUDAGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.body, self.broken = cuda, list[str](), False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self.stream, self.pool, self.mode = self.cuda.current_stream(), pool, capture_error_mode
        if self.stream.cuda_stream == 0:
            raise CUDAError("the default stream cannot capture")
        self.cuda.capturing[threading.get_ident()] = self
        self.begun = self.stream.tick()
        self.cuda.note("begin", self.stream)

    def capture_end(self) -> None:
        if self.cuda.capturing.pop(threading.get_ident(), None) is not self:
            raise CUDAError("no capture is under way")
        self.cuda.note("end", self.stream)
        if self.broken:
            raise CUDAError("operation failed due to a previous error during capture")
        for stream, clock in self.cuda.clocks.items():
            inside = clock.get(self.begun[0], 0) >= self.begun[1]
            if inside and not self.stream.behind((stream, clock.get(stream, 0))):
                raise CUDAError("capturing stream has unjoined work")

    def replay(self) -> None:
        self.cuda.note("replay", self.stream, self.cuda.current_stream(self.stream.device))


class Watched(TorchDispatchMode):
    """Takes every operator of a capture as a kernel of the current stream, and notes as `races`
    where two that use the same memory are in no order, though one of them writes it, and where
    a stream may take memory again that another one is not done with.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.graph = cuda.capturing[threading.get_ident()]
        self.memory: dict[int, Any] = {}
        self.free: list[tuple[Stream, dict[str, int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.freed()
        made = func(*args, **(kwargs or {}))
        returned = [one.alias_info for one in func._schema.returns]
        if returned and all(one is not None and not one.is_write for one in returned):
            return made
        self.cuda.ask(str(func))
        stream = self.cuda.current_stream()
        at = repr(stream), stream.clock[repr(stream)]
        for value, about in zip(args, func._schema.arguments, strict=False):
            writes = about.alias_info is not None and about.alias_info.is_write
            for tensor in _tensors(value):
                self._used(tensor, stream, at, str(func), writes=writes)
        for tensor in _tensors(kwargs):
            self._used(tensor, stream, at, str(func), writes=False)
        for tensor in _tensors(made):
            if _key(tensor) not in self.memory and any(
                one == stream and not all(map(stream.behind, users.items()))
                for one, users in self.free
            ):
                self.cuda.races.append(f"{func} takes memory that others are not done with")
            known = self.memory.setdefault(_key(tensor), [stream, at, {}, _weak(tensor)])
            known[2].setdefault(at[0], at[1])
        return made

    def _used(
        self, tensor: Tensor, stream: Stream, at: tuple[str, int], name: str, *, writes: bool
    ) -> None:
        outside = [None, self.graph.begun, {}, _weak(tensor)]
        known = self.memory.setdefault(_key(tensor), outside)
        if not stream.behind(known[1]):
            self.cuda.races.append(f"{name} before what it uses is written")
        if writes and not all(map(stream.behind, known[2].items())):
            self.cuda.races.append(f"{name} writes before others are done")
        if writes:
            known[1] = at
        known[2][at[0]] = at[1]

    def freed(self) -> None:
        """Looks for memory that is free since the last time."""
        for key, (stream, _, users, weak) in list(self.memory.items()):
            if weak.expired():
                del self.memory[key]
                # What was made outside is not taken again inside.
                self.free += [] if stream is None else [(stream, users)]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_iter(value) if isinstance(one, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class WatchedGraph(CUDAGraph):
    """Watches its capture, and does nothing when it is replayed: memory is freed as on a GPU."""

    def modes(self) -> list[TorchDispatchMode]:
        return [Watched(self.cuda)]

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        super().capture_begin(pool, capture_error_mode)
        self.entered = self.modes()
        for one in self.entered:
            one.__enter__()

    def capture_end(self) -> None:
        while self.entered:
            self.entered.pop().__exit__(None, None, None)
        super().capture_end()


class Taped(WatchedGraph):
    """A graph that replays what a body asked of the CPU while it was captured."""

    def modes(self) -> list[TorchDispatchMode]:
        self.log = _Log()
        return [*super().modes(), self.log]

    def capture_end(self) -> None:
        try:
            super().capture_end()
        finally:
            self.log.undo()

    def replay(self) -> None:
        super().replay()
        Tape(torch.device("cpu"))._replay(self.log.calls)
