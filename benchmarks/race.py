"""One race: contenders on the same examples and setting, in turn, round by round.

Used by `python -m benchmarks.end_to_end` and `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import CAPTUM, EQUALS, Setting
from benchmarks.processes import ContenderError, Sample
from benchmarks.reference import relative_error


class Runner(Protocol):
    """A contender that has its model: a `Worker` or a `Child`."""

    def load(self, batch: int) -> None: ...
    def warm(self, setting: Setting) -> None: ...
    def run(self, setting: Setting, memory: bool = False, keep: int = 0) -> Sample: ...


class Clock:
    """The seconds that are left of a run; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.begun, self.seconds = time.perf_counter(), seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.spent


@dataclass
class Entry:
    """What one contender has shown so far; `reason` says why it shows no more."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    rise_bytes: int | None = None
    reserved_bytes: int | None = None
    error: float | None = None
    reason: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.reason else None


def race(
    runners: Mapping[str, Runner],
    setting: Setting,
    reference: Tensor | None,
    clock: Clock,
    *,
    seconds: float,
    rounds: int,
    expected: Mapping[str, float] = MappingProxyType({}),
    watch: Callable[[str, str], None] = lambda name, reason: None,
) -> dict[str, Entry]:
    """Runs everyone once for memory and error, then in timed rounds for `seconds`.

    The first round counts as timed only where it alone took so long. expected: seconds of a call,
    where they can be guessed; who would not be done before the clock runs out gets the reason
    "time". watch: is told who runs next, with no reason, and who failed.
    """
    entries = {name: Entry() for name in runners}
    for name, runner in runners.items():
        if clock.left <= expected.get(name, 0.0):
            entries[name].reason = "time"
            continue
        watch(name, "")
        _first(runner, setting, reference, entries[name])
        if entries[name].reason:
            watch(name, entries[name].reason)
    firsts = {name: entry.seconds[0] for name, entry in entries.items() if not entry.reason}
    if sum(firsts.values()) > seconds:
        return entries
    begun = time.perf_counter()
    for name in firsts:
        entries[name].seconds.clear()
    names = list(firsts)
    for number in range(rounds):
        # Whoever comes first in a round comes last in the next.
        for name in names[number % len(names) :] + names[: number % len(names)] if names else ():
            if clock.left <= 0 or entries[name].reason:
                continue
            watch(name, "")
            _again(runners[name], setting, entries[name])
            if entries[name].reason:
                watch(name, entries[name].reason)
        if time.perf_counter() - begun > seconds or not names:
            break
    for name, first in firsts.items():
        if not entries[name].seconds:
            entries[name].seconds.append(first)
    return entries


def _first(runner: Runner, setting: Setting, reference: Tensor | None, entry: Entry) -> None:
    try:
        runner.warm(setting)
        keep = 0 if reference is None else len(reference)
        sample = runner.run(setting, True, keep)
    except ContenderError as failed:
        entry.reason = str(failed)
        return
    entry.seconds = [sample.seconds]
    entry.peak_bytes, entry.rise_bytes = sample.peak_bytes, sample.rise_bytes
    entry.reserved_bytes = sample.reserved_bytes
    if reference is not None and sample.values is not None:
        entry.error = relative_error(sample.values, reference)


def _again(runner: Runner, setting: Setting, entry: Entry) -> None:
    try:
        entry.seconds.append(runner.run(setting).seconds)
    except ContenderError as failed:
        entry.reason = str(failed)


def rows(
    case: Case, batch: int, setting: Setting, entries: Mapping[str, Entry]
) -> list[dict[str, Any]]:
    """The race as JSON: a row per contender, with its ratio to Captum as documented, and to whoever
    computes in the same arithmetic.
    """
    captum = entries[CAPTUM].median if CAPTUM in entries else None
    found = []
    for name, entry in entries.items():
        median = entry.median
        equal = entries[EQUALS[name]].median if EQUALS.get(name) in entries else None
        row: dict[str, Any] = {
            "workload": case.workload,
            "shape": list(case.found().shape),
            "batch": batch,
            "method": setting.method,
            "setting": setting.label,
            "contender": name,
            "reason": entry.reason or None,
            "rounds": len(entry.seconds),
            "seconds": median,
            "fastest": min(entry.seconds) if median else None,
            "slowest": max(entry.seconds) if median else None,
            "gradients_per_second": batch * setting.points / median if median else None,
            "times_captum": captum / median if captum and median else None,
            "times_equal": equal / median if equal and median else None,
            "peak_bytes": entry.peak_bytes,
            "reserved_bytes": entry.reserved_bytes,
            "error": entry.error,
            "reference_items": case.examples(batch),
        }
        if setting.method == "smoothgrad":
            row["reference_samples"] = case.samples
        found.append(row)
    return found
