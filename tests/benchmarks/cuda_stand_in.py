"""A GPU by stand-ins: the device "cuda" is the CPU, graphs are logs of operators, events count.

Every line that a run takes on a GPU runs once, so that no misspelt call costs a run there. Numbers
are the CPU's; times are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from saliency_fast.engine import cudagraph
from saliency_fast.graph.passes import half
from saliency_fast.ops import Op
from tests.graphs import tape


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value == "cuda" else value


class OnCpu(TorchFunctionMode):
    """Calls that name the device "cuda" name the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


class Event:
    ticks = itertools.count(1)

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0

    def record(self, stream: Any = None) -> None:
        self.at = next(self.ticks)

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        assert end.at > self.at > 0
        return float(end.at - self.at)


class Stream:
    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert event.at

    def synchronize(self) -> None:
        pass


class Graph:
    """What `torch.cuda.graph` recorded, to be run again on the same tensors."""

    calls: list[Any] | None = None

    def replay(self) -> None:
        assert self.calls
        tape.Tape(torch.device("cpu"))._replay(self.calls)


@contextmanager
def graph(found: Graph, **options: Any) -> Iterator[None]:
    log = tape._Log()
    try:
        with log:
            yield
    finally:
        log.undo()
    found.calls = log.calls


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of a test; calls are to be made inside of `OnCpu()`."""
    properties = type("Properties", (), {"L2_cache_size": 1000, "total_memory": 2**34})
    current = Stream()
    found: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 1000,
        "max_memory_allocated": lambda *_: 3000,
        "memory_reserved": lambda *_: 5000,
        "reset_peak_memory_stats": lambda *_: None,
        "_sleep": lambda cycles: None,
        "current_stream": lambda *_: current,
        "stream": lambda stream: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
    }
    for name, one in found.items():
        monkeypatch.setattr(torch.cuda, name, one)
    # Kernels are the reference, and a CPU has the precisions of a GPU.
    monkeypatch.setattr(Op, "launcher", lambda self, backend: self.reference)
    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", tape.Tape)
    monkeypatch.setitem(half.OF_DEVICE, "cpu", half.OF_DEVICE["cuda"])
    profile = torch.profiler.profile
    cpu = [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=cpu))
    # Not a call that function modes see.
    to = nn.Module.to

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        return to(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", moved)
