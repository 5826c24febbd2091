"""One call in a fresh interpreter: its first time, later times, memory and map.

The interpreter imports PyTorch, the network's library and the contender's library, and builds the
network, before anything is timed. Used by `benchmarks.first_call` and `benchmarks.real_models`.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.calls import Called
from benchmarks.models import Workload
from benchmarks.reference import gradient, relative_error

ROOT = Path(__file__).resolve().parent.parent
OURS, CAPTUM = "saliency_fast", "captum"
PATIENCE = 900.0
"""Seconds after which a process that has not answered is ended."""
WARM_CALLS, WARM_SECONDS, WARM_SECONDS_OF_MANY = 5, 45.0, 5.0
"""Untimed calls of ours after the first: few points are recorded once there were four calls of a
kind, and many at once, unless a call is short."""
TURNS, SLICE, STEADY_SECONDS = 6, 0.25, 20.0
"""Later calls: each contender in turn for a slice of seconds, so many turns or seconds in all."""
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ContenderError(Exception):
    """A contender gave no result; the text is the reason that the row gets."""


@dataclass(frozen=True)
class Work:
    """One call of a network.

    source: a module whose `sized(network, side)` is a `Workload`. method: "gradient", "grad_cam" or
    "integrated_gradients". layer: of Grad-CAM; ours finds it by itself in two dimensions.
    """

    network: str
    side: int | None = None
    batch: int = 1
    method: str = "gradient"
    points: int = 1
    layer: str = ""
    source: str = "benchmarks.cases"

    def workload(self) -> Workload:
        found: Workload = import_module(self.source).sized(self.network, self.side)
        return found

    @property
    def call(self) -> str:
        names = {"gradient": "gradient", "grad_cam": "Grad-CAM"}
        return names.get(self.method, f"IG-{self.points}")


@dataclass
class Shown:
    """What one contender has shown in one process; `reason` says why it shows no more."""

    first: float | None = None
    later: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    values: np.ndarray[Any, Any] | None = None
    strategy: str = ""
    reason: str = ""

    @property
    def steady(self) -> float | None:
        return statistics.median(self.later) if self.later else None


class Remote:
    """A process that answers requests (name, arguments) over a pipe."""

    pipe: Connection
    patience: float | None = None

    def ready(self) -> None:
        """Waits until the process has built its model."""
        self._answer()

    def ask(self, name: str, *arguments: Any) -> Any:
        try:
            self.pipe.send((name, arguments))
        except OSError as error:
            raise ContenderError("its process had ended") from error
        return self._answer()

    def exit_code(self) -> int | None:
        """Of the process, after a short wait; None while it runs."""
        raise NotImplementedError

    def _answer(self) -> Any:
        try:
            if self.patience is not None and not self.pipe.poll(self.patience):
                raise ContenderError(f"no answer in {self.patience:.0f} s")
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            # How the system says that memory ran out.
            killed = self.exit_code() == -9
            reason = "killed: out of memory" if killed else "its process ended"
            raise ContenderError(reason) from error
        if isinstance(result, ContenderError):
            raise result
        return result


def answer(pipe: Connection, make: Callable[[], object]) -> None:
    """A process's life: makes its worker, then runs the requested methods until the pipe closes."""
    try:
        worker = make()
    except Exception as error:
        pipe.send(ContenderError(first_line(error)))
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
            pipe.send(ContenderError(first_line(error)))


class Fresh(Remote):
    """A `Caller` in a fresh interpreter."""

    patience = PATIENCE

    def __init__(self, work: Work, contender: str, threads: int) -> None:
        self.pipe, theirs = Pipe()
        command = f"from benchmarks.fresh import serve; serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command],
            cwd=ROOT,
            pass_fds=(theirs.fileno(),),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self.pipe.send((work, contender, threads))

    def exit_code(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(5)
        return None

    def close(self) -> None:
        self.pipe.close()
        if self.exit_code() is None:
            self.process.kill()
            self.process.wait()


def serve(number: int) -> None:
    """The life of a fresh interpreter whose pipe has this number."""
    pipe = Connection(number)
    arguments = pipe.recv()
    answer(pipe, lambda: Caller(*arguments))


class Caller:
    """A contender and its call in this process: `saliency_fast`, `captum` or `captum, 8 at a time`.

    threads: of PyTorch. What it may allocate is what is free now, so that it fails alone.
    """

    def __init__(self, work: Work, contender: str, threads: int) -> None:
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        _die_first()
        self.work, self.workload = work, work.workload()
        self.model, self.x = self.workload.build(), self.workload.inputs(work.batch)
        self.strategy, self.call = "", self._made(contender)
        tidy()
        self.idle = level("VmRSS")

    def first(self) -> Shown:
        """The first call, timed, with its memory and its map."""
        tracked = reset_peak()
        begun = time.perf_counter()
        values = self.call()
        shown = Shown(time.perf_counter() - begun, strategy=self.strategy)
        if tracked:
            shown.peak_bytes = max(0, level("VmHWM") - self.idle)
        shown.values = values.detach().numpy().copy()
        del values
        tidy()
        shown.resident_bytes = max(0, level("VmRSS") - self.idle - shown.values.nbytes)
        return shown

    def repeat(self, calls: int, seconds: float) -> list[float]:
        """Seconds of each of up to so many more calls, begun within so many seconds."""
        found: list[float] = []
        begun = time.perf_counter()
        while not found or (len(found) < calls and time.perf_counter() - begun < seconds):
            started = time.perf_counter()
            self.call()
            found.append(time.perf_counter() - started)
        return found

    def integrate(self, steps: int, rule: str) -> tuple[np.ndarray[Any, Any], float]:
        """Our map by another rule, with the seconds of a second call."""
        self.work = replace(self.work, points=steps)
        call = self._ours(rule)
        call()
        begun = time.perf_counter()
        values = call()
        return values.detach().numpy().copy(), time.perf_counter() - begun

    def exactness(self, steps: int) -> float:
        """Relative L2 in float64 of our map of two unlike examples to a loop of plain autograd."""
        import saliency_fast as sf

        # Anew, since networks that keep what they computed cannot be copied.
        model = self.workload.build().double()
        x = self.workload.inputs(2, dtype=torch.float64)
        x[1].mul_(0.5).add_(0.1)
        target = self.workload.target
        loop = torch.zeros_like(x)
        for row in range(len(x)):
            for step in range(steps):
                # Twice the same point: PyTorch's gradient of one row alone may be wrong
                # (native_batch_norm_backward of gradients whose channels come last).
                point = (step + 0.5) / steps * torch.stack((x[row], x[row]))
                loop[row] += gradient(model, point, target)[0] / steps * x[row]
        method = sf.IntegratedGradients(steps=steps, rule="midpoint")
        ours = sf.explain(model, x, target=target, method=method).values
        return relative_error(ours, loop)

    def _made(self, contender: str) -> Callable[[], Tensor]:
        if contender == OURS:
            return self._ours("gauss_legendre")
        rows = re.search(r", (\d+) at a time", contender)
        return self._captum(int(rows[1]) if rows else None)

    def _ours(self, rule: str) -> Callable[[], Tensor]:
        import saliency_fast as sf

        work = self.work
        layer = "auto" if self.x.dim() == 4 else work.layer
        method: Any = {
            "gradient": lambda: sf.Gradient(),
            "grad_cam": lambda: sf.GradCAM(layer, relu=False),
            "integrated_gradients": lambda: sf.IntegratedGradients(work.points, rule),
        }[work.method]()

        def call() -> Tensor:
            found = sf.explain(self.model, self.x, target=self.workload.target, method=method)
            about = found.provenance
            self.strategy = f"{about.strategy}, {about.points_per_launch} a launch"
            values: Tensor = found.values
            return values

        return call

    def _captum(self, points: int | None) -> Callable[[], Tensor]:
        """`points` of each example at a time, None for all."""
        work, called = self.work, Called("captum.attr", self.workload, self.model)
        library, model, x = called.library, called.model, self.x
        target: Any = called.target
        rows = None if points is None else points * len(x)

        def grad_cam() -> Tensor:
            layer = library.LayerGradCam(model, self.model.get_submodule(work.layer))
            raw = layer.attribute(x, target=target)
            mode = {4: "bilinear", 5: "trilinear"}[x.dim()]
            resized: Tensor = library.LayerAttribution.interpolate(raw, tuple(x.shape[2:]), mode)
            return resized

        return {
            "gradient": lambda: library.Saliency(model).attribute(x, target=target, abs=False),
            "grad_cam": grad_cam,
            "integrated_gradients": lambda: library.IntegratedGradients(model).attribute(
                x, target=target, n_steps=work.points, internal_batch_size=rows
            ),
        }[work.method]


def compare(
    work: Work,
    contenders: Sequence[str],
    threads: int,
    *,
    steady: bool = True,
    after: Callable[[Mapping[str, Fresh]], None] = lambda _: None,
) -> dict[str, Shown]:
    """One round: everyone's first call in turn, then later calls, slice by slice.

    Interpreters start side by side, and nothing is timed before all are ready. after: what else is
    asked of those that are well.
    """
    runners = {name: Fresh(work, name, threads) for name in contenders}
    shown = {name: Shown() for name in contenders}

    def each(run: Callable[[str], None]) -> None:
        for name in contenders:
            if not shown[name].reason:
                try:
                    run(name)
                except ContenderError as failed:
                    shown[name].reason = str(failed)

    def first(name: str) -> None:
        shown[name] = runners[name].ask("first")

    def warm(name: str) -> None:
        if name == OURS:
            seconds = WARM_SECONDS if work.points == 1 else WARM_SECONDS_OF_MANY
            runners[name].ask("repeat", WARM_CALLS, seconds)

    def later(name: str) -> None:
        shown[name].later += runners[name].ask("repeat", 10_000, SLICE)

    try:
        each(lambda name: runners[name].ready())
        each(first)
        if steady:
            each(warm)
            begun = time.perf_counter()
            for _ in range(TURNS):
                each(later)
                if time.perf_counter() - begun > STEADY_SECONDS:
                    break
        after({name: runner for name, runner in runners.items() if not shown[name].reason})
    finally:
        for runner in runners.values():
            runner.close()
    return shown


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def tidy() -> None:
    """Gives back what is free, so that the next peak holds nothing of earlier calls."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Starts a new high-water mark; False where the system has none to reset."""
    try:
        _REFERENCES.write_text("5")
    except OSError:
        return False
    return True


def level(name: str, path: Path = _STATUS) -> int:
    """A field of this process's status in bytes, 0 where the system tells not."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _die_first() -> None:
    """Allocations end at what is free now, and the system takes this process before others."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    free = level("MemAvailable", Path("/proc/meminfo"))
    if free:
        resource.setrlimit(resource.RLIMIT_DATA, (free, resource.RLIM_INFINITY))
