"""A run in stages, each in processes of its own, so that nothing that fails takes others with it.

A stage is work in units, which a child process does one after another. The child reports every unit
before it begins it. Where it dies or hangs, the unit at which it did gets a row that says so, and
another child goes on behind that unit. A unit may report parts of itself, such as the contenders of
a race: the unit is begun anew without the part at which a child died. A stage ends at its time.

Children are forked from a process that has imported what they need and has touched no device; the
runner itself imports no PyTorch. `benchmarks.gpu` lists the stages of a run on a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Protocol

Row = dict[str, Any]
TIME = "time"
"""The reason of what was not done, since its stage was over."""
STARTING = 60.0
"""Seconds that a child may take before its first unit; the first one imports PyTorch."""


class AbsentError(Exception):
    """Something that a unit needs is not on this machine, which is no failure of the library."""


@dataclass(frozen=True)
class Stage:
    """A line of a run's table.

    Attributes:
        name: Of the stage.
        until: Seconds after the run's beginning at which it ends, whenever it began.
        work: "module:function" of the child's side, which makes the units from the run's options.
        file: The stem of the file that its rows are in; stages may share one.
    """

    name: str
    until: float
    work: str
    file: str


@dataclass(frozen=True)
class Unit:
    """What a child does at a time: `run` yields rows.

    Attributes:
        patience: Seconds without a report after which the child counts as hanging.
        alone: The child ends behind it: it leaves settings that others must not see.
    """

    name: str
    run: Callable[[Report], Iterable[Row]]
    patience: float = 30.0
    alone: bool = False


@dataclass
class Report:
    """What a unit sees of its run: the seconds left of the stage, and the parts to leave out.

    Attributes:
        refused: Why parts of units are left out, by name: a child died at them.
    """

    send: Callable[[tuple[Any, ...]], None]
    refused: Mapping[str, str]
    ends: float

    @property
    def left(self) -> float:
        return self.ends - time.perf_counter()

    def begin(self, name: str, patience: float) -> None:
        """From here on a death is that of the part `name`."""
        self.send(("begin", name, patience))

    def lost(self, reason: str) -> None:
        """Ends this process, whose device answers nothing any more, at the part that was begun."""
        self.send(("lost", reason))
        os._exit(1)


class Child(Protocol):
    """A process that does the units of a stage."""

    def receive(self, seconds: float) -> tuple[Any, ...] | None:
        """Its next message, None where none came in time; raises EOFError where it has ended."""

    def end(self, wait: float) -> str:
        """How it has ended; it is made to where it does not within `wait` seconds."""


class Forked:
    """A child of the fork server. preload: modules that it imports once for all children."""

    def __init__(self, arguments: tuple[Any, ...], preload: Sequence[str] = ()) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, seconds: float) -> tuple[Any, ...] | None:
        try:
            message: tuple[Any, ...] | None = self.pipe.recv() if self.pipe.poll(seconds) else None
        except OSError as error:
            raise EOFError from error
        return message

    def end(self, wait: float) -> str:
        self.process.join(wait)
        code = self.process.exitcode
        # What it has started is in its group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)
        self.pipe.close()
        if code is None:
            return "killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(
    pipe: Connection,
    work: str,
    options: Mapping[str, Any],
    done: frozenset[str],
    refused: Mapping[str, str],
    seconds: float,
) -> None:
    """A child's life."""
    os.setsid()
    report = Report(pipe.send, refused, time.perf_counter() + seconds)
    try:
        units = list(_found(work)(options))
        about = _found(options["about"])(options["device"]) if "about" in options else {}
    except Exception as error:
        pipe.send(("failed", _reason(error), not _absent(error)))
        return
    pipe.send(("units", [unit.name for unit in units], about))
    for unit in units:
        if unit.name in done:
            continue
        report.begin(unit.name, unit.patience)
        broken = False
        try:
            for row in unit.run(report):
                pipe.send(("row", row))
        except Exception as error:
            pipe.send(("row", {"reason": _reason(error), "failed": not _absent(error)}))
            broken = not device_answers()
        pipe.send(("end", unit.name))
        if unit.alone or broken:
            return
    pipe.send(("done",))


def _found(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def _absent(error: Exception) -> bool:
    """Whether an error says that something is not on this machine."""
    own = ("saliency_fast", "benchmarks")
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in own
    return missing or isinstance(error, AbsentError)


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AbsentError):
        return text
    return f"{type(error).__name__}: {text}"


def device_answers() -> bool:
    """Whether the GPU of this process, where it uses one, still does what it is asked for."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


@dataclass
class Found:
    """What a stage has shown so far.

    Attributes:
        rows: By unit; None stands for the stage as a whole.
        about: What the child says of its machine.
        complete: Whether every unit was begun and ended.
    """

    rows: dict[str | None, list[Row]] = field(default_factory=dict)
    about: Row = field(default_factory=dict)
    complete: bool = False
    _units: list[str] = field(default_factory=list)
    _done: set[str] = field(default_factory=set)
    _refused: dict[str, str] = field(default_factory=dict)
    _unit: str | None = None
    _part: str | None = None

    @property
    def progress(self) -> tuple[int, int]:
        return len(self._done), len(self._refused)

    @property
    def all_rows(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows]

    def note(self, message: tuple[Any, ...]) -> None:
        """Takes a child's message."""
        kind, *given = message
        if kind == "units":
            self._units, self.about = given
        elif kind == "begin" and given[0] in self._units:
            self._unit, self._part = given[0], None
            self.rows[given[0]] = []
        elif kind == "begin":
            self._part = given[0]
        elif kind == "row":
            self.rows[self._unit].append({"unit": self._unit} | given[0])
        elif kind == "end":
            self._done.add(given[0])
            self._unit = self._part = None
        elif kind == "failed":
            self.whole(*given)
        elif kind == "done":
            self.complete = True

    def whole(self, reason: str, failed: bool) -> None:
        """The stage as a whole ends, for this reason."""
        self.rows.setdefault(None, []).append({"unit": None, "reason": reason, "failed": failed})
        self.complete = True

    def died(self, reason: str) -> None:
        """A child has ended before its units did."""
        if not self._units:
            self.whole(f"its process ended at its start: {reason}", True)
        elif self._unit is None:
            return
        elif self._part is not None and self._part not in self._refused:
            self._refused[self._part] = reason
        else:
            self._end(self._unit, reason, failed=True)
        self._unit = self._part = None

    def over(self) -> None:
        """The stage's time is over: what was not done says so."""
        for name in self._units:
            if name not in self._done:
                self._end(name, TIME, failed=False)
        if not self._units:
            self.whole(TIME, False)
        self.complete = True

    def _end(self, unit: str, reason: str, *, failed: bool) -> None:
        rows = self.rows.setdefault(unit, [])
        rows.append({"unit": unit, "reason": reason, "failed": failed})
        self._done.add(unit)

    def arguments(self, stage: Stage, options: Row, seconds: float) -> tuple[Any, ...]:
        """Of the next child."""
        return stage.work, options, frozenset(self._done), dict(self._refused), seconds


def run_stage(
    stage: Stage,
    options: Row,
    ends: float,
    *,
    start: Callable[[tuple[Any, ...]], Child],
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Found]:
    """Does a stage until `ends`; yields what it has shown, after every unit and at its end."""
    found, before = Found(), None
    while not found.complete and now() < ends:
        child = start(found.arguments(stage, options, ends - now()))
        yield from _follow(child, found, ends, now)
        before, last = found.progress, before
        if before == last and not found.complete:
            found.whole("its processes end before they begin", True)
    if not found.complete:
        found.over()
    yield found


def _follow(child: Child, found: Found, ends: float, now: Callable[[], float]) -> Iterator[Found]:
    """One child's life as its runner sees it."""
    patience, reason = STARTING, ""
    try:
        while not found.complete:
            waited = min(patience, ends - now())
            message = child.receive(max(0.0, waited))
            if message is None and now() >= ends:
                found.over()
            elif message is None:
                found.died(f"no answer in {patience:.0f} s")
                break
            elif message[0] == "lost":
                found.died(message[1])
                break
            else:
                patience = message[2] if message[0] == "begin" else patience
                found.note(message)
                if message[0] == "end":
                    yield found
    except EOFError:
        reason = child.end(2.0)
        found.died(reason)
    finally:
        if not reason:
            child.end(0.0)
