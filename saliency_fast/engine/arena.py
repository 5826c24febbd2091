"""Arena: memory that the launches of a call share, on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from saliency_fast.ops.dispatch import forced, native_library

RESERVED = 64 * 1024**3
"""Bytes of addresses that an arena reserves; memory is what its tensors touch."""


class Arena:
    """Gives a launch's large tensors the memory that an earlier launch has let go of.

    Inside `inside()` the tensors that this thread makes come from it; they may outlive it. Nothing
    changes where the C++ ops are not built, or on other devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = _library() if device.type == "cpu" else None
        self._handle = self._library and self._library.saliency_fast_arena_open(RESERVED)

    @property
    def extent(self) -> int:
        """The bytes that it has taken from the system, at most."""
        if not self._handle:
            return 0
        return int(self._library.saliency_fast_arena_extent(self._handle))  # type: ignore[union-attr]

    @contextmanager
    def inside(self) -> Iterator[None]:
        if not self._handle:
            yield
            return
        enter = self._library.saliency_fast_arena_enter  # type: ignore[union-attr]
        before = enter(self._handle)
        try:
            yield
        finally:
            enter(before)

    def close(self) -> None:
        """Gives back what no tensor lives in; the rest goes when its tensors go."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.saliency_fast_arena_close(handle)  # type: ignore[union-attr]


@cache
def _library() -> Any:
    """The C++ ops' library, or None where they are not built or not wanted."""
    path = native_library()
    if path is None or forced() not in (None, "native"):
        return None
    library = ctypes.CDLL(str(path))
    place, size = ctypes.c_void_p, ctypes.c_size_t
    for name, gives, takes in (
        ("open", place, [size]),
        ("enter", place, [place]),
        ("extent", size, [place]),
        ("close", None, [place]),
    ):
        function = getattr(library, f"saliency_fast_arena_{name}")
        function.restype, function.argtypes = gives, takes
    return library
