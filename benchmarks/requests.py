"""Maps per second for many callers at once: submit, the engine alone, Captum.

    python -m benchmarks.requests             about three minutes on two cores
    python -m benchmarks.requests --quick     seconds; a tiny model, for tests

Every caller is a thread that requests one map after another, each of its own input. The contenders
take turns in one process, on one model. "at once" hands many requests in together. Writes
requests-cpu or requests-gpu, JSON and Markdown, under benchmarks/results/.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.cases import sized
from benchmarks.contenders import CAPTUM, GRADIENT, Captum, Ours, Setting
from benchmarks.end_to_end import command, machine
from benchmarks.race import Clock
from benchmarks.reference import relative_error
from saliency_fast.engine.service import Statistics

ALONE, SUBMIT = "engine(x)", "engine.submit(x)"
ONE_BY_ONE, MANY, BATCH = "one by one", "explain_many", "one batch"


@dataclass(frozen=True)
class Load:
    """The load of a model: callers, calls of all of them (one each at least), rounds."""

    workload: str
    setting: Setting
    callers: tuple[int, ...]
    calls: int
    rounds: int = 2
    at_once: int | None = None

    @property
    def label(self) -> str:
        return f"{self.workload} {self.setting.label}"


def _ig(steps: int) -> Setting:
    return Setting("integrated_gradients", steps)


CALLERS = (1, 4, 16, 64)
LOADS = (
    Load("digits", GRADIENT, CALLERS, 64, at_once=64),
    Load("digits", _ig(8), CALLERS, 64, at_once=64),
    Load("digits", _ig(50), CALLERS, 16, at_once=64),
    Load("resnet50", GRADIENT, CALLERS, 8, rounds=1),
    # Captum would keep 64 times 8 points of 82 MiB at the same time.
    Load("resnet50", _ig(8), CALLERS[:3], 4, rounds=1),
)
QUICK_LOADS = (Load("mlp", _ig(4), (1, 3), 6, rounds=1, at_once=5),)


@dataclass
class Drive:
    """Of one contender: calls per second of each round, seconds of each call, and what the
    service counted meanwhile.
    """

    speeds: list[float]
    latencies: list[float]
    counted: dict[str, float]


class Contenders:
    """A model, an input for each caller, and the contenders to explain it."""

    def __init__(self, load: Load, device: str) -> None:
        workload = sized(load.workload)
        model = workload.build().to(device)
        most = max(*load.callers, load.at_once or 1)
        self.device, self.target, self.setting = device, workload.target, load.setting
        self.inputs = workload.inputs(most).to(device).split(1)
        ours = Ours(workload, model)
        self.engine, captum = ours.engine(load.setting), Captum(workload, model)
        self.calls: dict[str, Callable[[Tensor], Tensor]] = {
            ALONE: lambda x: self.engine(x, self.target).values,
            SUBMIT: lambda x: self.engine.submit(x, self.target).result().values,
            CAPTUM: lambda x: captum(x, load.setting),
        }

    def call(self, contender: str, number: int) -> Tensor:
        """The map of a caller's input."""
        values = self.calls[contender](self.inputs[number])
        if self.device == "cuda":
            torch.cuda.synchronize()
        return values

    def disagreement(self) -> dict[str, float]:
        """How far each contender's first map is from Captum's; also warms them."""
        expected = self.call(CAPTUM, 0)
        return {name: relative_error(self.call(name, 0), expected) for name in self.calls}

    def at_once(self, how: str, count: int) -> float:
        """Seconds for so many requests."""
        begun, inputs = time.perf_counter(), self.inputs[:count]
        if how == ONE_BY_ONE:
            for x in inputs:
                self.engine(x, self.target)
        elif how == MANY:
            self.engine.explain_many([{"inputs": x, "target": self.target} for x in inputs])
        else:
            self.engine(torch.cat(inputs), self.target)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def drive(
    call: Callable[[int], object], pool: ThreadPoolExecutor, callers: int, each: int
) -> tuple[float, list[float]]:
    """Seconds until `callers` threads of the pool had `each` results, and those of every call."""
    start = threading.Barrier(callers + 1)

    def caller(number: int) -> list[float]:
        start.wait()
        latencies = []
        for _ in range(each):
            begun = time.perf_counter()
            call(number)
            latencies.append(time.perf_counter() - begun)
        return latencies

    futures = [pool.submit(caller, number) for number in range(callers)]
    start.wait()
    begun = time.perf_counter()
    latencies = [one for future in futures for one in future.result()]
    return time.perf_counter() - begun, latencies


def race(contenders: Contenders, load: Load, callers: int) -> dict[str, Drive]:
    """All contenders in turn, round by round, with the same threads."""
    each = -(-max(load.calls, callers) // callers)
    drives = {contender: Drive([], [], {}) for contender in contenders.calls}
    with ThreadPoolExecutor(callers) as pool:
        # Threads that have run no parallel loop yet would start their helpers while timed.
        drive(lambda _: torch.ones(2**17).add_(1), pool, callers, 1)
        for _ in range(load.rounds):
            for contender, found in drives.items():
                before = contenders.engine.statistics
                seconds, latencies = drive(
                    partial(contenders.call, contender),
                    pool,
                    callers,
                    each,
                )
                found.speeds.append(callers * each / seconds)
                found.latencies += latencies
                for name, value in counted(before, contenders.engine.statistics).items():
                    found.counted[name] = found.counted.get(name, 0) + value
    return drives


def counted(before: Statistics, after: Statistics) -> dict[str, float]:
    """What was counted in between."""
    names = [field.name for field in fields(Statistics) if field.name != "longest_queue"]
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def percentile(seconds: Iterable[float], share: float) -> float:
    """The least of them that a share so large is not above."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def rows(load: Load, callers: int, drives: dict[str, Drive]) -> list[dict[str, Any]]:
    """A row for every contender."""
    captum = statistics.median(drives[CAPTUM].speeds)
    found = []
    for contender, one in drives.items():
        speed, service = statistics.median(one.speeds), one.counted
        row = {
            "part": "callers", "workload": load.workload, "method": load.setting.label,
            "callers": callers, "way": contender, "calls": len(one.latencies),
            "maps_per_second": speed, "times_captum": speed / captum,
            "median_seconds": statistics.median(one.latencies),
            "slow_seconds": percentile(one.latencies, 0.95),
        }  # fmt: skip
        if service["begun"]:
            row |= {
                "queue_seconds": service["queue_seconds"] / service["begun"],
                "fill": service["points"] / service["places"],
                "launches": service["launches"],
                "points": service["points"],
            }
        found.append(row)
    return found


def together(contenders: Contenders, load: Load, count: int) -> list[dict[str, Any]]:
    """A row for every contender to get many maps at once."""
    seconds: dict[str, list[float]] = {how: [] for how in (ONE_BY_ONE, MANY, BATCH)}
    for how in seconds:
        contenders.at_once(how, count)
    for _ in range(load.rounds):
        for how, times in seconds.items():
            times.append(contenders.at_once(how, count))
    alone = statistics.median(seconds[ONE_BY_ONE])
    return [
        {
            "part": "at once", "workload": load.workload, "method": load.setting.label,
            "requests": count, "way": how, "seconds": statistics.median(times),
            "maps_per_second": count / statistics.median(times),
            "times_one_by_one": alone / statistics.median(times),
        }
        for how, times in seconds.items()
    ]  # fmt: skip


def measure(
    *, device: str = "cpu", quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    # Captum says at every call that it had to make its input require gradients.
    warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
    clock, found = Clock(None), []
    for load in QUICK_LOADS if quick else LOADS:
        contenders = Contenders(load, device)
        disagreement = contenders.disagreement()
        for callers in load.callers:
            new = rows(load, callers, race(contenders, load, callers))
            found += [row | {"from_captum": disagreement[row["way"]]} for row in new]
            say(f"{clock.spent:4.0f} s  {load.label} {callers}: " + _brief(new))
        if load.at_once is not None:
            new = together(contenders, load, load.at_once)
            found += new
            say(f"{clock.spent:4.0f} s  {load.label} at once: " + _brief(new))
        contenders.engine.close()
    about = machine(device) | {"quick": quick, "seconds_taken": round(clock.spent)}
    return {"setting": about, "rows": found}


def _brief(new: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['way']} {row['maps_per_second']:.3g}/s" for row in new)


def table(document: dict[str, Any]) -> str:
    """Callers first, then what was handed in at once."""
    callers, at_once = [], []
    for row in document["rows"]:
        name = [row["workload"], row["method"]]
        if row["part"] == "at once":
            cells = [str(row["requests"]), row["way"], tables.time_text(row["seconds"])]
            speeds = [f"{row['maps_per_second']:.3g}", tables.times_text(row["times_one_by_one"])]
            at_once.append([*name, *cells, *speeds])
            continue
        queue = tables.time_text(row.get("queue_seconds"))
        launches, fill = ["-", "-"]
        if "fill" in row:
            launches, fill = f"{row['launches'] / row['calls']:.2f}", f"{row['fill']:.1%}"
        callers.append([
            *name, str(row["callers"]), row["way"], f"{row['maps_per_second']:.3g}",
            tables.times_text(row["times_captum"]), tables.time_text(row["median_seconds"]),
            tables.time_text(row["slow_seconds"]), queue, launches, fill,
        ])  # fmt: skip
    lines = [
        tables.caption(document["setting"]),
        "",
        *tables.aligned(
            "model:, method, callers, contender:, maps/s, against Captum, median latency, 95th "
            "percentile, queued, launches a map, fill",
            callers,
        ),
        "",
        "Many requests at once, of one thread:",
        "",
        *tables.aligned(
            "model:, method, requests, contender:, time, maps/s, against one by one", at_once
        ),
        "",
        NOTES,
    ]
    return "\n".join(lines) + "\n"


def summary(document: dict[str, Any]) -> str:
    """A line for every number of callers: maps a second by contender, and how submit made them."""
    by: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in (one for one in document["rows"] if one["part"] == "callers"):
        by.setdefault((row["workload"], row["method"], row["callers"]), {})[row["way"]] = row
    lines = []
    for (workload, method, callers), contenders in by.items():
        ours, theirs = contenders[SUBMIT], contenders[CAPTUM]
        cells = [workload, method, str(callers)]
        cells += [f"{contenders[name]['maps_per_second']:.3g}" for name in (SUBMIT, ALONE, CAPTUM)]
        cells += [tables.times_text(ours["times_captum"])]
        for key in ("median_seconds", "slow_seconds"):
            cells += [f"{tables.time_text(ours[key])}; {tables.time_text(theirs[key])}"]
        cells += [f"{ours['launches'] / ours['calls']:.2f}", f"{ours['fill']:.1%}"]
        lines.append(cells)
    header = (
        "model:, method, callers, submit: maps/s, engine(x), Captum, against Captum, median "
        "latency; Captum's, 95th percentile; Captum's, launches a map, fill"
    )
    about = tables.caption(document["setting"])
    return "\n".join([about, "", *tables.aligned(header, lines), "", NOTES]) + "\n"


NOTES = (
    "Every caller is a thread that requests the next map when it has the last one, so latencies "
    "grow with the callers. Maps per second are medians over rounds, contenders in turn. "
    "Queued is the mean time until a launch with a request's points began; fill is the share of "
    "the slots of launches that had a point. All contenders take the same points; ours without the "
    "hashes that records carry."
)


def main() -> None:
    command(__doc__, "a tiny model", measure, table, "requests")


if __name__ == "__main__":
    main()
