"""Where a contender runs: here (`Worker`), or in a process of its own (`Child`) for its memory.

Both run the same calls. On a CPU peak memory is a process's high-water mark, so every
(workload, contender) gets a fresh process; its level right after the model was built is
subtracted. On a GPU PyTorch's allocator counts, and one process can hold all contenders.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import sized
from benchmarks.contenders import Ours, Setting, make, out_of_memory
from benchmarks.fresh import ContenderError, Remote, answer, first_line, level, reset_peak, tidy
from saliency_fast.engine.plan import Plan


@dataclass(frozen=True)
class Sample:
    """One call: its seconds, its first examples where requested, and its peak: over the idle level,
    and over the level right before the call, which what was planned and prepared has raised. On a
    GPU also what the allocator has reserved then, private pools of graphs included.
    """

    seconds: float
    peak_bytes: int | None = None
    rise_bytes: int | None = None
    values: Tensor | None = None
    reserved_bytes: int | None = None


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
        self.idle = level("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()

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
            self.started = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        before = self._above_idle()
        # On a GPU, later calls are not the first: kernels are loaded by it, ours are recorded by
        # another. Memory is that of all of them.
        for _ in range(self._calls_before(memory)):
            self._try(lambda: self.contender(self.x, setting))
        self._synchronize()
        begun = time.perf_counter()
        values = self._try(lambda: self.contender(self.x, setting))
        self._synchronize()
        seconds = time.perf_counter() - begun
        peak = self._peak() if memory and tracked else None
        rise = None if peak is None else max(0, peak - before)
        # The engine may hand out views of larger tensors, and pickling takes them whole.
        kept = values[:keep].detach().cpu().contiguous().clone() if keep else None
        reserved = torch.cuda.memory_reserved() if self.device == "cuda" and memory else None
        return Sample(seconds, peak, rise, kept, reserved)

    def _calls_before(self, first: bool) -> int:
        if self.device == "cpu" or not first:
            return 0
        return 3 if isinstance(self.contender, Ours) else 1

    def close(self) -> None:
        del self.contender, self.x
        _tidy(self.device)

    def _peak(self) -> int:
        if self.device == "cpu":
            return max(0, level("VmHWM") - self.idle)
        return torch.cuda.max_memory_allocated() - self.started

    def _above_idle(self) -> int:
        """What is in use now over the level from which peaks count."""
        return level("VmRSS") - self.idle if self.device == "cpu" else 0

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _try(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            reason = "out of memory" if out_of_memory(error) else first_line(error)
        # Outside the handler, so that the traceback's frames no longer hold the tensors. A device
        # that answers nothing any more does not take its memory back either.
        with suppress(RuntimeError):
            _tidy(self.device)
        raise ContenderError(reason)


class Child(Remote):
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

    def load(self, batch: int) -> None:
        self.ask("load", batch)

    def warm(self, setting: Setting) -> None:
        self.ask("warm", setting)

    def plan(self, setting: Setting) -> Plan | None:
        plan: Plan | None = self.ask("plan", setting)
        return plan

    def run(self, setting: Setting, memory: bool = False, keep: int = 0) -> Sample:
        sample: Sample = self.ask("run", setting, memory, keep)
        return sample

    def exit_code(self) -> int | None:
        self.process.join(5)
        code: int | None = self.process.exitcode
        return code

    def close(self) -> None:
        self.pipe.close()
        if self.exit_code() is None:
            self.process.kill()


def _serve(pipe: Connection, arguments: tuple[Any, ...], threads: int | None) -> None:
    answer(pipe, lambda: Worker(*arguments, threads=threads))


def _context() -> Any:
    """Processes forked from one that has imported PyTorch but has run nothing yet."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Captum where it is installed: others are ignored.
    context.set_forkserver_preload(["benchmarks.processes", "captum.attr"])
    return context


def _tidy(device: str) -> None:
    """Gives back what is free, so that the next peak holds nothing of earlier calls."""
    tidy()
    if device == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: str) -> bool:
    """Starts a new high-water mark; False where the system has none to reset."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    return reset_peak()
