"""CUDA graphs: launches captured once and replayed without the host's work, and their cache.

A recorder runs a body a few times, records what it asks of the device, and gives back a function
that asks for the same again, on the same memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

WARM_UPS = 2
"""Times that a body runs before it is recorded, while kernels are compiled and chosen."""
SHARE = 8
"""The part of a device's memory, one in so many, that captured launches may hold between calls."""
MOST_BYTES = 8 * 1024**3
"""And at most so much."""


class Recorder(Protocol):
    """Records bodies that use one another's memory, in the order in which they are replayed."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """A function that does on the device what `body` did; `body` has run, more than once."""

    def done(self) -> None:
        """What was asked of the device so far must be over before another thread's work."""

    def wait(self) -> None:
        """Waits, on the device, for what was `done`."""


class CudaRecorder:
    """CUDA graphs that share one private pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._done: Any = None

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    body()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on asking for memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
        replay: Callable[[], None] = graph.replay
        return replay

    def done(self) -> None:
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By the type of a device."""
CAPTURING = threading.Lock()
"""One thread captures at a time."""


class Kept(Protocol):
    """What a cache keeps: the bytes that it holds."""

    nbytes: int


class Captures(dict[Any, Any]):
    """Captured launches of a model by kind, or why there are none."""

    __slots__ = ("__weakref__",)


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

    def put(self, owner: Captures, key: Any, one: Kept) -> None:
        """Keeps `one` in `owner[key]`, and gives up others where that is too much."""
        with self._lock:
            owner[key] = one
            self._kept[id(one)] = weakref.ref(one), weakref.ref(owner), key
            self._kept.move_to_end(id(one))
            self._trim()

    def take(self, owner: Captures, key: Any) -> Any:
        """What is in `owner[key]`, which is taken out; None where there is nothing."""
        with self._lock:
            one = owner.pop(key, None)
            self._kept.pop(id(one), None)
            return one

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

    def _trim(self) -> None:
        while len(self._kept) and self._held() > self.limit:
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
