"""Arena: memory that the launches of a call share, on the CPU, and traces of what they take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from saliency_fast._types import Inputs
from saliency_fast.ops.dispatch import forced, native_library

RESERVED = 8 * 1024**3
"""Bytes of addresses that an arena reserves at least; memory is what its tensors touch."""
LEAST = 64 * 1024
"""Bytes from which a tensor's memory is the arena's."""
WORTH = 16 * LEAST
"""Bytes of a launch from which an arena is opened for it."""
COPIES = 4
"""Times its own bytes that an example takes in a model, at least, as a rule."""
LEAST_TRACED = 1024
"""Bytes from which a trace notes memory: with more rows it may grow into the arena's."""


class _Life(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("bytes", "start", "stop")]


@dataclass(frozen=True)
class Trace:
    """The memory that a launch takes, piece by piece in the order in which it is asked for.

    lives: (bytes, from, until) with the events of the launch between which a piece lives.
    """

    lives: tuple[tuple[int, int, int], ...] = ()

    @cached_property
    def needed(self) -> int:
        """The bytes that a launch takes when every piece lies where it fits best."""
        lives = self.array()
        return int(_library().saliency_fast_arena_needed(lives, len(lives)))

    def array(self) -> Any:
        large = [_Life(*life) for life in self.lives if life[0] >= LEAST]
        return (_Life * len(large))(*large)


@dataclass(frozen=True)
class LaunchMemory:
    """What launches of one call take: traces by their rows, and for more rows what two of them
    foretell: pieces grow by as much with every row.
    """

    known: Mapping[int, Trace]
    _grown: dict[int, Trace | None] = field(default_factory=dict, compare=False, repr=False)

    def of(self, rows: int) -> Trace | None:
        """The trace of a launch of `rows`; the same object for every one of them."""
        if rows not in self._grown:
            self._grown[rows] = self._foretold(rows)
        return self._grown[rows]

    def bytes_of(self, rows: int) -> int | None:
        """What a launch of `rows` takes at most; None where that is not known."""
        least = min((size for size in self.known if size >= rows), default=rows)
        trace = self.of(least)
        return None if trace is None else trace.needed

    def _foretold(self, rows: int) -> Trace | None:
        if rows in self.known or len(self.known) < 2:
            return self.known.get(rows)
        (few, one), (more, other) = sorted(self.known.items())
        if rows < few:
            return None
        pairs = zip(one.lives, other.lives, strict=True)
        return Trace(
            tuple(
                (size + (larger - size) * (rows - few) // (more - few), start, stop)
                for (size, start, stop), (larger, _, _) in pairs
            )
        )

    @property
    def consistent(self) -> bool:
        """Whether all take the same pieces, one after another."""
        kinds = {tuple(life[1:] for life in trace.lives) for trace in self.known.values()}
        return len(kinds) == 1


def served(device: torch.device) -> bool:
    """Whether launches on a device have an arena."""
    return device.type == "cpu" and _library() is not None


class Arena:
    """Gives a launch's tensors the memory that an earlier launch has let go of.

    Inside `launch()` the tensors that this thread makes come from it; they may outlive it. Nothing
    changes where the C++ ops are not built, or on other devices.
    """

    def __init__(self, device: torch.device, least: int = LEAST, about: int = WORTH) -> None:
        """least: bytes from which memory is its own; about: what a launch is thought to take."""
        self.device, self._least = device, least
        self._library: Any = None
        self._handle: int | None = None
        self._expected: Trace | None = None
        self._about = about
        self.renew(about)

    @property
    def extent(self) -> int:
        """The bytes that it has taken from the system, at most."""
        return int(self._library.saliency_fast_arena_extent(self._handle)) if self._handle else 0

    @contextmanager
    def launch(self, expected: Trace | None = None) -> Iterator[None]:
        """Inside, memory is the arena's; with places found beforehand for what is expected."""
        if not self._handle:
            yield
            return
        if expected is not self._expected:
            if self._expected is None and self.extent:
                # Where scores lie there is no place for what is expected.
                self.renew(self._about)
            lives = (expected or Trace()).array()
            self._library.saliency_fast_arena_expect(self._handle, lives, len(lives))
            self._expected = expected
        before = self._library.saliency_fast_arena_enter(self._handle)
        try:
            yield
        finally:
            self._library.saliency_fast_arena_leave(before)

    def trace(self) -> Trace | None:
        """What the last launch took; None where nothing is known."""
        if not self._handle:
            return None
        seen = self._library.saliency_fast_arena_seen
        count = seen(self._handle, None, 0)
        lives = (_Life * count)()
        seen(self._handle, lives, count)
        return Trace(tuple((one.bytes, one.start, one.stop) for one in lives))

    def renew(self, about: int) -> None:
        """Gives back what launches of another kind have taken, and begins anew."""
        self.close()
        self._expected, self._about = None, about
        if about >= WORTH and served(self.device):
            self._library, size = _library(), max(RESERVED, 4 * about)
            self._handle = self._library.saliency_fast_arena_open(size, self._least)

    def close(self) -> None:
        """Gives back what no tensor lives in; the rest goes when its tensors go."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.saliency_fast_arena_close(handle)


@contextmanager
def lent(device: torch.device, inputs: Inputs) -> Iterator[None]:
    """Inside, a point of these inputs is measured in memory that goes back to the system."""
    arena = Arena(device, about=least_bytes(inputs))
    try:
        with arena.launch():
            yield
    finally:
        arena.close()


def least_bytes(inputs: Inputs) -> int:
    """What a launch takes at least where nothing was measured."""
    return COPIES * sum(x[0].nbytes for x in inputs)


def _library() -> Any:
    """The C++ ops' library, or None where they are not built or not wanted."""
    path = native_library()
    return None if path is None or forced() not in (None, "native") else _loaded(path)


@cache
def _loaded(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    place, size, lives = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(_Life)
    for name, gives, takes in (
        ("open", place, [size, size]),
        ("enter", place, [place]),
        ("leave", None, [place]),
        ("extent", size, [place]),
        ("seen", size, [place, lives, size]),
        ("expect", None, [place, lives, size]),
        ("needed", size, [lives, size]),
        ("close", None, [place]),
    ):
        function = getattr(library, f"saliency_fast_arena_{name}")
        function.restype, function.argtypes = gives, takes
    return library
