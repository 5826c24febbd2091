"""Stand-ins for the stages of a run on a GPU, each with a failure; nothing here needs PyTorch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.stages import AbsentError, Report, Row, Unit

HANGING, PATIENCE = 60.0, 0.3
SETTINGS: list[str] = []


def good(report: Report) -> Iterator[Row]:
    yield {"settings": list(SETTINGS), "process": os.getpid()}


def raises(report: Report) -> Iterator[Row]:
    yield {"first": True}
    raise ValueError("a kernel failed\nwith more lines")


def dies(report: Report) -> Iterator[Row]:
    yield {"first": True}
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(report: Report) -> Iterator[Row]:
    os._exit(7)
    yield {}


def hangs(report: Report) -> Iterator[Row]:
    time.sleep(HANGING)
    yield {}


def leaves_settings(report: Report) -> Iterator[Row]:
    SETTINGS.append("changed")
    yield {"settings": list(SETTINGS)}


def misses_a_package(report: Report) -> Iterator[Row]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    yield {"package": a_package_that_nobody_has}


def is_absent(report: Report) -> Iterator[Row]:
    raise AbsentError("a tool is not here")
    yield {}


def race(report: Report) -> Iterator[Row]:
    """Of four; one dies, one's device answers nothing any more."""
    for name in ("one", "two", "three", "four"):
        if name in report.refused:
            yield {"contender": name, "reason": report.refused[name]}
            continue
        report.begin(name, 30.0)
        if name == "two":
            os.kill(os.getpid(), signal.SIGABRT)
        if name == "three":
            report.lost("an illegal access")
        yield {"contender": name, "reason": None}


WORK: dict[str, Callable[[Report], Iterator[Row]]] = {
    "good": good,
    "raises": raises,
    "dies": dies,
    "exits": exits,
    "hangs": hangs,
    "leaves settings": leaves_settings,
    "misses a package": misses_a_package,
    "is absent": is_absent,
    "race": race,
}


def units(options: dict[str, Any]) -> Iterator[Unit]:
    """The units that the options name, each followed by a good one."""
    for number, name in enumerate(options["units"]):
        patience = PATIENCE if name == "hangs" and not options.get("patient") else 30.0
        yield Unit(name, WORK[name], patience, alone=name == "leaves settings")
        yield Unit(f"good {number}", good)


def broken(options: dict[str, Any]) -> Iterator[Unit]:
    raise RuntimeError("no units today")


def dead(options: dict[str, Any]) -> Iterator[Unit]:
    """Dies before the first unit, the first time of several."""
    Path(options["marks"]).joinpath(str(os.getpid())).touch()
    os._exit(3)


def about(device: str) -> dict[str, str]:
    return {"device": f"a {device}"}
