"""A stand-in for `torch.cuda` on machines without a GPU: streams, events and graphs that only note
what they are asked for, with CUDA's laws of captures.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

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
        self.reads_fail = False
        self._here = threading.local()
        self._defaults: dict[int, Stream] = {}

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        names = (
            "Stream Event CUDAGraph stream device current_stream graph_pool_handle synchronize "
            "empty_cache get_device_properties"
        )
        for name in names.split():
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(
            "saliency_fast.engine.cudagraph.end_allocation_to_pool",
            lambda device, pool: self.ended.append(pool),
        )
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

    def ask(self, what: str) -> None:
        """A kernel on the current stream of the current device."""
        stream = self.current_stream()
        others = [one for one in self.capturing if one != threading.get_ident()]
        if others:
            raise CUDAError("a launch while another thread captures")
        graph = self.capturing.get(threading.get_ident())
        if graph is not None:
            if stream != graph.stream:
                raise CUDAError("the kernel is not on the capturing stream: it is lost")
            graph.body.append(what)
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

    def wait_event(self, event: Event) -> None:
        self.cuda.note("wait", self, event.stream)

    def record_event(self) -> Event:
        event = Event(self.cuda, {})
        event.record(self)
        return event


class Event:
    def __init__(self, cuda: FakeCuda, options: dict[str, bool]) -> None:
        self.cuda, self.options, self.stream = cuda, options, None

    def record(self, stream: Stream) -> None:
        self.stream = stream
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
        self.cuda.note("begin", self.stream)

    def capture_end(self) -> None:
        if self.cuda.capturing.pop(threading.get_ident(), None) is not self:
            raise CUDAError("no capture is under way")
        self.cuda.note("end", self.stream)
        if self.broken:
            raise CUDAError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.cuda.note("replay", self.stream, self.cuda.current_stream(self.stream.device))
