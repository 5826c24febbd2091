"""CUDA graphs: launches captured once and replayed without the host's work, and their cache.

A recorder runs a body a few times, records what it asks of the device, and gives back a function
that asks for the same again, on the same memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from saliency_fast._torch_compat import DispatchMode, end_allocation_to_pool, tree_iter
from saliency_fast.errors import BusyError, SaliencyError

Found = TypeVar("Found")
WARM_UPS = 1
"""Times that a body runs before its dry run and its capture."""
PATIENCE = 1.0
"""Seconds that a capture waits for launches of other threads, which may wait for this one."""
STREAMS = 32
"""Streams of a device, which PyTorch hands out in turn. Where half of them are taken, graphs of one
recorder share one, so that there is one for each of many recorders."""
SHARE = 8
"""The part of a device's memory, one in so many, that captured launches may hold between calls."""
MOST_BYTES = 16 * 1024**3
"""And at most so much."""


class Sharing:
    """Launches share the devices, and a capture has them alone: what other threads may ask for in
    the meantime, such as memory, would break it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing, self._waiting = Counter[int](), 0
        self._alone: int | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, no other thread captures."""
        own = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._admits(own))
            self._sharing[own] += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= Counter((own,))
                self._changed.notify_all()

    def _admits(self, own: int) -> bool:
        inside = own in self._sharing or self._alone == own
        return inside or (self._alone is None and not self._waiting)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread launches or captures; raises BusyError where that goes on."""
        own = threading.get_ident()
        with self._changed:
            self._waiting += 1
            try:
                if not self._changed.wait_for(
                    lambda: self._alone is None and self._sharing.keys() <= {own}, PATIENCE
                ):
                    raise BusyError("launches of other threads go on: nothing was captured")
                self._alone = own
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = None
                self._changed.notify_all()


DEVICES = Sharing()


class NoStreamError(BusyError):
    """All streams of a device belong to captured launches."""


class CannotCaptureError(SaliencyError):
    """A body asks for what no capture allows."""


class DryRun(DispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what no capture on a device allows raises CannotCaptureError: numbers that the host
    waits for, and copies between the host and the device.
    """

    READS = frozenset(
        "_local_scalar_dense nonzero masked_select unique_dim unique_consecutive _unique _unique2 "
        "equal is_nonzero bincount repeat_interleave _pin_memory".split()
    )
    """Operators that the host waits for; those that take indices do for masks among these."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = [one for one in tree_iter((args, kwargs, result)) if isinstance(one, Tensor)]
        kinds = {one.device.type for one in tensors}
        if self._kind not in kinds:
            return result
        taken = args[1] if name.lstrip("_").startswith("index") and len(args) > 1 else ()
        masks = isinstance(taken, (list, tuple)) and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in taken
        )
        if name in self.READS or masks:
            raise CannotCaptureError(f"the host waits for {name}")
        # What is made of Python's numbers is copied before it is lifted.
        if name == "lift_fresh" or ("copy" in name and len(kinds) > 1):
            raise CannotCaptureError(f"{name} copies between the host and the device")
        return result


class Recorder(Protocol):
    """Records bodies that use one another's memory, in the order in which they are replayed."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """A function that does on the device what `body` asks for, which has run before."""

    def beside(self, parts: Sequence[Callable[[], Found]]) -> list[Found]:
        """What parts of a body give that use nothing of one another's: recorded side by side."""

    def done(self) -> None:
        """What was asked of the device so far must be over before another thread's work."""

    def wait(self) -> None:
        """Waits, on the device, for what was `done`."""


class CudaRecorder:
    """CUDA graphs that share one private pool of memory. Each is captured on a stream of its own,
    since libraries keep a workspace for each stream, which a graph goes on to use: the capture
    makes it, in the pool, where nothing else is put as long as any of these graphs lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._streams: list[torch.cuda.Stream] = []
        self._side: torch.cuda.Stream | None = None
        self._done: Any = None

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        stream = self._stream()
        with DEVICES.alone(), torch.cuda.device(self._device), torch.cuda.stream(stream):
            graph = self._captured(body)
        self._streams.append(stream)
        return _Replay(self._device, graph, stream, self._side)

    def beside(self, parts: Sequence[Callable[[], Found]]) -> list[Found]:
        """In a capture, parts behind the first go to a stream of their own: it waits for what comes
        before them, and what comes behind waits for it. Until then all that parts share is alive,
        and each stream has workspaces and free memory of its own.
        """
        if len(parts) == 1 or not torch.cuda.is_current_stream_capturing():
            return [part() for part in parts]
        current = torch.cuda.current_stream(self._device)
        side = self._side = self._side or self._stream(current)
        side.wait_event(current.record_event())
        try:
            with torch.cuda.stream(side):
                others = [part() for part in parts[1:]]
            return [parts[0](), *others]
        finally:
            # Also where a part fails: no capture ends before. One that broke says so at its end.
            with suppress(RuntimeError):
                current.wait_event(side.record_event())

    def _captured(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Not by `torch.cuda.graph`, which waits for the whole device and, after a failure, leaves
        its stream current and hides the error.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            body()
            graph.capture_end()
        except BaseException:
            self._side = None
            with suppress(Exception):
                graph.capture_end()
            with suppress(Exception):
                end_allocation_to_pool(self._device, self._pool)
            raise
        return graph

    def _stream(self, current: torch.cuda.Stream | None = None) -> torch.cuda.Stream:
        """A stream on which no graph was captured that lives, or one of ours where few are left;
        beside `current`, another one in any case.
        """
        living = [one.streams for one in list(_REPLAYS) if one.device == self._device]
        taken = {one.cuda_stream for streams in (*living, (current,)) for one in streams if one}
        if self._streams and len(taken) > STREAMS // 2 and current is None:
            return self._streams[0]
        for _ in range(2 * STREAMS):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in taken:
                return stream
        raise NoStreamError("all streams of the device belong to captured launches")

    def done(self) -> None:
        self._done = torch.cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


class _Replay:
    """Replays a graph on the current stream, behind the last replay on its device."""

    def __init__(
        self,
        device: torch.device,
        graph: torch.cuda.CUDAGraph,
        *streams: torch.cuda.Stream | None,
    ) -> None:
        self.device, self.graph, self.streams = device, graph, streams
        _REPLAYS.add(self)

    def __call__(self) -> None:
        with DEVICES.shared(), _ORDER:
            current = torch.cuda.current_stream(self.device)
            if (last := _LAST.get(self.device)) is not None:
                current.wait_event(last)
            self.graph.replay()
            _LAST[self.device] = current.record_event()


_REPLAYS: weakref.WeakSet[_Replay] = weakref.WeakSet()
"""All graphs that live."""
_LAST: dict[torch.device, torch.cuda.Event] = {}
"""By device, the end of the last replay."""
_ORDER = threading.Lock()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By the type of a device."""


def launching(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a device that can capture launches captures none of other threads."""
    return DEVICES.shared() if device.type in RECORDERS else nullcontext()


class Kept(Protocol):
    """What a cache keeps: the bytes that it holds."""

    nbytes: int


class Captures(dict[Any, Any]):
    """Captured launches of a model by kind, or why there are none; calls: those of each kind."""

    __slots__ = ("__weakref__", "calls")

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[Any]()


class GraphCache:
    """Captured launches by what they are for, those used longest ago given up first.

    Each serves one call at a time: it is taken out, and put back. They are their model's, and go
    with it: the cache counts what it does not hold.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[weakref.ref[Any], weakref.ref[Captures], Any]]
        self._kept = OrderedDict()

    def admits(self, nbytes: int, calls: int) -> bool:
        """Whether there is room for so many bytes without giving up launches of a kind that had as
        many calls: kinds that take turns must not drive one another out.
        """
        with self._lock:
            room = self.limit - self._held()
            for reference, owners, key in self._kept.values():
                one, owner = reference(), owners()
                if room >= nbytes or one is None or owner is None or owner.calls[key] >= calls:
                    break
                room += one.nbytes
            return room >= nbytes

    def put(self, owner: Captures, key: Any, one: Kept) -> None:
        """Keeps `one` in `owner[key]`, and gives up others where that is too much."""
        with self._lock:
            owner[key] = one
            self._kept[id(one)] = weakref.ref(one), weakref.ref(owner), key
            self._kept.move_to_end(id(one))
            self._trim(self.limit)

    def take(self, owner: Captures, key: Any) -> Any:
        """What is in `owner[key]`, which is taken out; None where there is nothing."""
        with self._lock:
            one = owner.pop(key, None)
            self._kept.pop(id(one), None)
            return one

    def give_up_one(self) -> bool:
        """Gives up what was used longest ago, if there is anything."""
        with self._lock:
            held = self._held()
            self._trim(held - 1)
            return held > 0

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._held()

    def _held(self) -> int:
        for name, (reference, owners, key) in list(self._kept.items()):
            one, owner = reference(), owners()
            if one is None or owner is None or owner.get(key) is not one:
                del self._kept[name]
        alive = [reference() for reference, _, _ in self._kept.values()]
        return sum(one.nbytes for one in alive if one is not None)

    def _trim(self, limit: int) -> None:
        while len(self._kept) and self._held() > limit:
            _, (_, owners, key) = self._kept.popitem(last=False)
            if (owner := owners()) is not None:
                owner.pop(key, None)


_CACHES: dict[torch.device, GraphCache] = {}


def cache_of(device: torch.device) -> GraphCache:
    """The captured launches on a device."""
    if device not in _CACHES:
        limit = MOST_BYTES
        with suppress(Exception):
            limit = min(limit, torch.cuda.get_device_properties(device).total_memory // SHARE)
        _CACHES[device] = GraphCache(limit)
    return _CACHES[device]
