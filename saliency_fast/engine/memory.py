"""Memory: what a budget says, what is free, and what one point needs."""

from __future__ import annotations

import ctypes
import itertools
import re
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import (
    DispatchMode,
    WithoutFunctionModes,
)
from saliency_fast.errors import InputError, InputTypeError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}
FREE_SHARE = 0.8


def read_budget(budget: int | str | None, device: torch.device) -> int:
    """Bytes that a call may use; None is 80 % of what is free on `device` now."""
    if budget is None:
        return int(FREE_SHARE * free_bytes(device))
    given = budget
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?)B?\s*", budget.upper())
        try:
            budget = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        except (KeyError, ValueError, OverflowError):
            budget = 0
    elif isinstance(budget, bool) or not isinstance(budget, int):
        raise InputTypeError(f"memory_budget: expected bytes or text: got {type(budget).__name__}")
    if budget <= 0:
        raise InputError(
            f"memory_budget must be a positive number of bytes or text such as '8GiB' or '500MB': "
            f"got {given!r}"
        )
    return budget


def free_bytes(device: torch.device) -> int:
    """Free memory of `device`, with what PyTorch's own cache could hand out again."""
    if device.type != "cuda":
        # The half second as an argument: calls by the thousand need not read the system anew.
        return _free_host_bytes(int(2 * time.monotonic()))
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # To look takes milliseconds, so that it is done anew every few seconds.
    return int(free + cached) - _private_bytes(device, int(time.monotonic() / 4))


@lru_cache(maxsize=8)
def _private_bytes(device: torch.device, moment: int) -> int:
    """Free memory in the private pools of CUDA graphs, which serves nobody else."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    private = (one for one in segments if tuple(one["segment_pool_id"]) != (0, 0))
    own = (one for one in private if one["device"] == device.index)
    return sum(one["total_size"] - one["allocated_size"] for one in own)


@lru_cache(maxsize=1)
def _free_host_bytes(half_second: int) -> int:
    available = _field(_read(Path("/proc/meminfo")), "MemAvailable") or 4 * 1024**3
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    return min(available, limit - used) if limit and used else available


LIBRARIES = 24 * 1024**2
"""Bytes of code and buffers, about, that PyTorch and its libraries take when a process first uses
them on the CPU: 16 to 31 MiB, whether we or others call them."""
RECORDING = 16 * 1024**2
"""Bytes of code, about, that recording a model and comparing it with autograd load beside."""
MALLOC_KEEPS = 32 * 1024**2
"""Bytes of freed memory, about, that malloc keeps: larger launches take theirs from an arena."""
_FIRST = [True]


def library_bytes(*, recorded: bool) -> int:
    """What libraries take on the CPU beside tensors, once they were used."""
    return LIBRARIES + RECORDING * recorded


def first_of_process() -> bool:
    """Whether the next call is the first one of this process."""
    return _FIRST[0]


def note_call() -> None:
    """From now on libraries are in use."""
    _FIRST[0] = False


def give_back() -> None:
    """Lets malloc give freed memory back to the system, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> tuple[int, int]:
    """(resident now, its high-water mark) of this process, (0, 0) where the system tells not."""
    # Not getrusage: its mark is inherited from the process that started this one.
    status = _read(Path("/proc/self/status"))
    return _field(status, "VmRSS"), _field(status, "VmHWM")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0


def bytes_text(count: float) -> str:
    """`count` bytes for people: "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass(frozen=True)
class Cost:
    """What a point costs.

    Args:
        peak: Bytes of the tensors that live at once.
        largest: Bytes of the largest tensor.
        kept: Bytes that autograd keeps from forward to backward, by the call that asked for them.
        drew: Whether a call was made that may take random numbers.
        random: Whether it took any, which attention without dropout does not.
    """

    peak: int
    largest: int
    kept: Mapping[str, int] = field(default_factory=dict)
    drew: bool = False
    random: bool = False

    @property
    def saved(self) -> int:
        return sum(self.kept.values())

    def of_one(self, points: int) -> Cost:
        """The cost of one of so many points."""
        return replace(self, peak=-(-self.peak // points), largest=-(-self.largest // points))


class MemoryMeter(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that live at the same time inside its `with`, and the largest.

    Works on any device and for one thread alone, unlike the allocators' own counters; what an
    operator takes for itself while it runs is not seen. drew: whether one asked for random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.drew = False
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._numbers = itertools.count()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What an operator is given and was not seen here is not new: weights, buffers, inputs.
        self._watch((args, kwargs), new=False)
        self.drew |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        result = func(*args, **(kwargs or {}))
        self._watch(result, new=True)
        return result

    def cost(self, kept: Mapping[str, int], *, moved: bool) -> Cost:
        """What was counted. kept: for the backward pass; moved: whether random states moved."""
        drawn = self.drew, self.drew and moved
        return Cost(self.peak, self.largest, kept, *drawn)

    def size_of(self, tensor: Tensor) -> tuple[int, int]:
        """A number of the tensor's memory, and its bytes where they are new inside the `with`."""
        if tensor.layout != torch.strided:
            return -1, 0
        return self._sizes.get(id(tensor.untyped_storage()), (-1, 0))

    def _watch(self, values: object, *, new: bool) -> None:
        # Not by PyTorch's own walk over nested values, which takes longer than most small calls.
        if isinstance(values, Tensor):
            # Sparse tensors have no memory of their own; their parts are seen when they are made.
            if values.layout == torch.strided:
                self._watch_storage(values.untyped_storage(), new)
        elif isinstance(values, (tuple, list)):
            for value in values:
                self._watch(value, new=new)
        elif isinstance(values, dict):
            self._watch(tuple(values.values()), new=new)

    def _watch_storage(self, storage: torch.UntypedStorage, new: bool) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes() if new else 0

        def gone(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)
            self._sizes.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        # By number: another one may have its id once it is gone.
        self._sizes[key] = next(self._numbers), size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)


class Ledger(torch.autograd.graph.saved_tensors_hooks):
    """Notes what autograd keeps for the backward pass: `kept` bytes by the name in `label`.

    accepted: False where the model does not take its hooks.
    Memory is counted once, and not at all where `meter` has not seen it made: weights, inputs.
    """

    def __init__(self, meter: MemoryMeter, *, accepted: bool = True) -> None:
        super().__init__(self._note, lambda tensor: tensor)
        self.meter, self.accepted, self._counted = meter, accepted, set[int]()
        self.label, self.kept = "", dict[str, int]()

    def enter_call(self, name: str) -> None:
        """What is kept from here on is kept for the call of this name."""
        self.label = name

    def _note(self, tensor: Tensor) -> Tensor:
        # Custom functions save inside of the model's own code, where function modes are told of
        # every call, and of these too.
        with WithoutFunctionModes():
            key, size = self.meter.size_of(tensor)
            if size and key not in self._counted:
                self._counted.add(key)
                self.kept[self.label] = self.kept.get(self.label, 0) + size
            # A graph that holds its own results is never let go of where no backward pass runs.
            return tensor.detach()
