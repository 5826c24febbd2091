"""Watches what Triton kernels do with memory in the interpreter.

Each address must lie in the tensor from whose pointer it was made, and programs, which run at the
same time on a GPU, must not read or overwrite what another one stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

TAG = 48
"""Bits of an address; those above hold the number of the launch's argument."""
ADDRESS = (1 << TAG) - 1
MOST_FOUND = 10


class Guard:
    """What is `found` wrong, a line each."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.begin("")

    def begin(self, kernel: str) -> None:
        """A launch begins."""
        self.kernel = kernel
        self.tensors: list[tuple[int, int]] = []
        self.accesses: dict[str, list[tuple[np.ndarray, np.ndarray, int, int]]] = {
            "load": [], "store": [], "atomic": []
        }  # fmt: skip

    def say(self, text: str) -> None:
        if len(self.found) < MOST_FOUND:
            self.found.append(f"{self.kernel}: {text}")

    def tag(self, tensor: torch.Tensor) -> np.uint64:
        """The tag of pointers to the tensor, whose memory the launch may use from here on."""
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = span * tensor.element_size() if tensor.numel() else 0
        self.tensors.append((tensor.data_ptr(), tensor.data_ptr() + size))
        return np.uint64(len(self.tensors) << TAG)

    def access(self, kind: str, program: int, pointers: Any, mask: Any, values: Any = None) -> Any:
        """(pointers without tags, mask without what lies outside of its tensor)."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        wanted = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        tagged = pointers.data[wanted]
        if tagged.size and not self._inside(tagged.min(), tagged.max(), width):
            inside = np.array([self._inside(one, one, width) for one in tagged.tolist()])
            self.say(f"{(~inside).sum()} elements of a {kind} lie outside of the tensor")
            wanted[wanted] = inside
            tagged = tagged[inside]
        if kind == "store":
            bits = np.ascontiguousarray(np.broadcast_to(values.data, wanted.shape))
            numbers = bits.view(f"u{bits.dtype.itemsize}")[wanted]
        else:
            numbers = np.zeros(0, np.uint64)
        self.accesses[kind].append(
            (tagged & np.uint64(ADDRESS), numbers.astype(np.uint64), width, program)
        )
        stripped = interpreter.TensorHandle(pointers.data & np.uint64(ADDRESS), pointers.dtype)
        return stripped, interpreter.TensorHandle(wanted, mask.dtype)

    def _inside(self, first: int, last: int, width: int) -> bool:
        """Whether elements at pointers from `first` to `last` lie in one tensor of the launch."""
        number = int(first) >> TAG
        if number != int(last) >> TAG or not 1 <= number <= len(self.tensors):
            return False
        begin, end = self.tensors[number - 1]
        return begin <= int(first) & ADDRESS and (int(last) & ADDRESS) + width <= end

    def end(self) -> None:
        """A launch has ended: compares what its programs did."""
        stores, values, programs, calls, widths = self._table("store")
        atomics, _, atomic_programs, _, _ = self._table("atomic")
        order = np.lexsort((calls, programs, stores))
        stores, values, programs = stores[order], values[order], programs[order]
        calls, widths = calls[order], widths[order]
        same = stores[1:] == stores[:-1]
        other = (programs[1:] != programs[:-1]) | (calls[1:] == calls[:-1])
        if (same & other & (values[1:] != values[:-1])).any():
            self.say("an element is stored twice, with different values, in no order")
        if (~same & (stores[1:] < stores[:-1] + widths[:-1])).any():
            self.say("stores overlap in part")
        loads, _, load_programs, _, _ = self._table("load")
        if _shared(loads, load_programs, stores, programs):
            self.say("a program loads what another one stores")
        for addresses, owners, what in (
            (loads, load_programs, "loads"), (stores, programs, "stores")
        ):  # fmt: skip
            if _shared(addresses, owners, atomics, atomic_programs):
                self.say(f"a program {what} what another one changes by an atomic")

    def _table(self, kind: str) -> tuple[np.ndarray, ...]:
        """Addresses, values, programs, numbers of calls, and widths of all elements."""
        rows = self.accesses[kind]
        lengths = [len(addresses) for addresses, *_ in rows]
        none = [np.zeros(0, np.uint64)]
        return (
            np.concatenate([row[0] for row in rows] or none),
            np.concatenate([row[1] for row in rows] or none),
            np.repeat(np.array([row[3] for row in rows], np.int64), lengths),
            np.repeat(np.arange(len(rows)), lengths),
            np.repeat(np.array([row[2] for row in rows], np.uint64), lengths),
        )


def _shared(first: np.ndarray, owners: np.ndarray, second: np.ndarray, others: np.ndarray) -> bool:
    """Whether an address of `first` is in `second`, too, for another owner."""
    if not len(first) or not len(second):
        return False
    near = (first >= second.min()) & (first <= second.max())
    first, owners = first[near], owners[near]
    order = np.lexsort((others, second))
    second, others = second[order], others[order]
    # Of an address the first and the last owner: one of them is another one, if any is.
    for side, step in (("left", 0), ("right", -1)):
        place = np.clip(np.searchsorted(second, first, side) + step, 0, len(second) - 1)
        if ((second[place] == first) & (others[place] != owners)).any():
            return True
    return False


@contextmanager
def guarded() -> Iterator[Guard]:
    """Watches every launch within."""
    guard = Guard()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    convert, call = interpreter._implicit_cvt, executor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    add = builder.create_atomic_rmw

    def tagged(argument: Any) -> Any:
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            # A tensor seen as another type is wrapped.
            tag = guard.tag(getattr(argument, "base", argument))
            converted.handle.data = converted.handle.data | tag
        return converted

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        guard.begin(self.fn.__name__)
        call(self, *args, **kwargs)
        guard.end()

    def program(self: Any) -> int:
        (x, y, z), (width, height, _) = self.grid_idx, self.grid_dim
        return x + width * (y + height * z)

    def loaded(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any) -> Any:
        pointers, mask = guard.access("load", program(self), pointers, mask)
        return load(self, pointers, mask, other, *hints)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *hints: Any) -> Any:
        pointers, mask = guard.access("store", program(self), pointers, mask, value)
        return store(self, pointers, value, mask, *hints)

    def added(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *order: Any) -> Any:
        pointers, mask = guard.access("atomic", program(self), pointers, mask)
        return add(self, kind, pointers, value, mask, *order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", tagged)
        patch.setattr(executor, "__call__", launch)
        patch.setattr(builder, "create_masked_load", loaded)
        patch.setattr(builder, "create_masked_store", stored)
        patch.setattr(builder, "create_atomic_rmw", added)
        yield guard
