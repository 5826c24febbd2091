"""Where a contender runs: here (`Worker`), or in a process of its own (`Child`) for its memory.

Both run the same calls. On a CPU peak memory is a process's high-water mark, so every
(workload, contender) gets a fresh process; its level right after the model was built is
subtracted. On a GPU PyTorch's allocator counts, and one process can hold all contenders.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import sized
from benchmarks.contenders import Ours, Setting, make, out_of_memory
from saliency_fast.engine.plan import Plan

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ContenderError(Exception):
    """A contender gave no result; the text is the reason that the row gets."""


@dataclass(frozen=True)
class Sample:
    """One call: its seconds, its first examples where requested, and its peak: over the idle level,
    and over the level right before the call, which what was planned and prepared has raised.
    """

    seconds: float
    peak_bytes: int | None = None
    rise_bytes: int | None = None
    values: Tensor | None = None


class Worker:
    """A contender on one model in this process.

    model: an own one is built unless given. threads: of this process, PyTorch's choice by default.
    """

    def __init__(
        self,
        workload: str,
        side: int | None,
        contender: str,
        device: str,
        *,
        model: nn.Module | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        # Captum says at every call that it had to make its input require gradients.
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
        self.workload, self.device = sized(workload, side), device
        model = self.workload.build().to(device) if model is None else model
        self.contender = make(contender, self.workload, model)
        # A contender that prepared a copy has no use for it.
        del model
        self.x, self.started = torch.empty(0), 0
        # What building the model left free counts neither for nor against the calls.
        _tidy(device)
        self.idle = _level("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()

    def load(self, batch: int) -> None:
        """Takes the first `batch` examples."""
        self.x = self.workload.inputs(batch).to(self.device)

    def warm(self, setting: Setting) -> None:
        """Plans and searches, untimed."""
        self._try(lambda: self.contender.warm(self.x, setting))
        self._synchronize()

    def plan(self, setting: Setting) -> Plan | None:
        """How ours runs it; None for whoever does not plan."""
        found = self.contender
        return self._try(lambda: found.plan(self.x, setting)) if isinstance(found, Ours) else None

    def run(self, setting: Setting, memory: bool = False, keep: int = 0) -> Sample:
        """One call, timed; with its peak memory, and its first `keep` examples, where requested."""
        if memory:
            _tidy(self.device)
            tracked = _reset_peak(self.device)
        before = self._above_idle()
        self._synchronize()
        begun = time.perf_counter()
        values = self._try(lambda: self.contender(self.x, setting))
        self._synchronize()
        seconds = time.perf_counter() - begun
        peak = self._peak() if memory and tracked else None
        rise = None if peak is None else max(0, peak - before)
        # The engine may hand out views of larger tensors, and pickling takes them whole.
        kept = values[:keep].detach().cpu().contiguous().clone() if keep else None
        return Sample(seconds, peak, rise, kept)

    def close(self) -> None:
        del self.contender, self.x
        _tidy(self.device)

    def _peak(self) -> int:
        if self.device == "cpu":
            return max(0, _level("VmHWM") - self.idle)
        return torch.cuda.max_memory_allocated() - self.started

    def _above_idle(self) -> int:
        """What is in use now over the level from which peaks count."""
        return _level("VmRSS") - self.idle if self.device == "cpu" else 0

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _try(self, call: Any) -> Any:
        if self.device == "cuda":
            self.started = torch.cuda.memory_allocated()
        try:
            return call()
        except (RuntimeError, MemoryError) as error:
            reason = "out of memory" if out_of_memory(error) else _first_line(error)
        # Outside the handler, so that the traceback's frames no longer hold the tensors.
        _tidy(self.device)
        raise ContenderError(reason)


class Child:
    """A `Worker` in a fresh process; `ready` waits until its model is built."""

    def __init__(
        self, workload: str, side: int | None, contender: str, *, threads: int | None = None
    ) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        arguments = (workload, side, contender, "cpu")
        self.process = context.Process(
            target=_serve, args=(theirs, arguments, threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        self._answer()

    def load(self, batch: int) -> None:
        self._ask("load", batch)

    def warm(self, setting: Setting) -> None:
        self._ask("warm", setting)

    def plan(self, setting: Setting) -> Plan | None:
        plan: Plan | None = self._ask("plan", setting)
        return plan

    def run(self, setting: Setting, memory: bool = False, keep: int = 0) -> Sample:
        sample: Sample = self._ask("run", setting, memory, keep)
        return sample

    def close(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            self.pipe.send((name, arguments))
        except OSError as error:
            raise ContenderError("its process had ended") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            result = self.pipe.recv()
        except EOFError as error:
            self.process.join(5)
            # How the system says that memory ran out.
            killed = self.process.exitcode == -9
            reason = "killed: out of memory" if killed else "its process ended"
            raise ContenderError(reason) from error
        if isinstance(result, ContenderError):
            raise result
        return result


def _serve(pipe: Connection, arguments: tuple[Any, ...], threads: int | None) -> None:
    """A child's life: builds its worker, then runs calls until the pipe is closed."""
    try:
        worker = Worker(*arguments, threads=threads)
    except Exception as error:
        pipe.send(ContenderError(_first_line(error)))
        return
    pipe.send(None)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(worker, name)(*given))
        except ContenderError as error:
            pipe.send(error)
        except Exception as error:
            pipe.send(ContenderError(_first_line(error)))


def _context() -> Any:
    """Processes forked from one that has imported PyTorch but has run nothing yet."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.processes"])
    return context


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _tidy(device: str) -> None:
    """Gives back what is free, so that the next peak holds nothing of earlier calls."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak(device: str) -> bool:
    """Starts a new high-water mark; False where the system has none to reset."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _REFERENCES.write_text("5")
    except OSError:
        return False
    return True


def _level(name: str) -> int:
    """A field of this process's status in bytes, 0 where the system tells not."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
