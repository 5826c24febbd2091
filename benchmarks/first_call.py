"""First calls, small calls and memory against Captum: `python -m benchmarks.first_call`.

    python -m benchmarks.first_call                     about an hour on two cores
    python -m benchmarks.first_call --only "IG-50"      rows whose text matches a pattern
    python -m benchmarks.first_call --quick             seconds; tiny models, for tests

Every round of a row has fresh interpreters of all contenders: first calls in turn, then later
calls slice by slice. Ratios are geometric means over rounds with a 95 % interval.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Setting
from benchmarks.fresh import CAPTUM, OURS, ROOT, Shown, Work, compare
from benchmarks.reference import attribution, relative_error
from benchmarks.tables import aligned, bytes_text, caption, error_text, time_text

TUNED = f"{CAPTUM}, 8 at a time"
ROUNDS, LEAST_ROUNDS, SECONDS = 7, 3, 150.0
"""A row has at most so many rounds; after so many seconds no more than the least."""
_TIMED = """
from time import {clock} as clock
begun = clock()
{imports}
print(clock() - begun)
"""
IMPORTS = ("import torch", "import torch; import saliency_fast")
SLACK = 0.97
"""A goal is reached where the lower end of the interval is at least this share of it."""


@dataclass(frozen=True)
class Goal:
    """What the ratio of some rows must reach.

    measure: "first", "steady" and "peak" are Captum's over ours, and "own" is our steady call over
    our first. against: the contenders; least: the ratio, or one per network.
    """

    text: str
    measure: str
    works: tuple[Work, ...]
    against: tuple[str, ...]
    least: float | dict[str, float]

    def needed(self, work: Work) -> float:
        return self.least if isinstance(self.least, float) else self.least[work.network]


def _integrated(network: str, side: int | None = None, points: int = 50) -> Work:
    return Work(network, side, method="integrated_gradients", points=points)


_SIZES = {"resnet50": 224, "vit_b16": 224, "unet3d": 48, "small-cnn": None, "small-mlp": None}
_LAYERS = {"resnet50": "stages", "small-cnn": "10", "unet3d": "bottom"}
LARGEST = (
    _integrated("resnet50", 448, 8), _integrated("unet3d", 64, 4), _integrated("vit_b16", 224, 8)
)  # fmt: skip
INTEGRATED = tuple(_integrated(name, side) for name, side in _SIZES.items())
SMALL = (*INTEGRATED[3:], _integrated("digits"))
GRADIENTS = tuple(
    Work(name, side, batch) for name, side in (_SIZES | {"digits": None}).items()
    for batch in (1, 16)
)  # fmt: skip
CAMS = tuple(
    Work(name, _SIZES[name], method="grad_cam", layer=layer) for name, layer in _LAYERS.items()
)
GOALS = (
    Goal("first IG-50 takes at most 1.15 times the steady call", "own", INTEGRATED, (), 1 / 1.15),
    Goal("first IG-50 is faster than Captum's first", "first", INTEGRATED, (CAPTUM, TUNED), 1.0),
    Goal(
        "first gradient or Grad-CAM takes at most 1.1 times Captum's first", "first",
        (*(work for work in GRADIENTS if work.batch == 1), *CAMS), (CAPTUM,), 1 / 1.1,
    ),
    Goal("steady gradient", "steady", GRADIENTS, (CAPTUM,), 1.0),
    Goal("steady IG-50, as documented", "steady", SMALL, (CAPTUM,), 1.3),
    Goal("steady IG-50, 8 at a time", "steady", SMALL, (TUNED,), 1.0),
    Goal(
        "peak, first call included", "peak", LARGEST, (CAPTUM,),
        {"resnet50": 5.0, "unet3d": 4.0, "vit_b16": 1.5},
    ),
)  # fmt: skip
_TINY = (_integrated("small-mlp", points=4), Work("tiny-unet3d", 8, 2))
QUICK = (
    Goal("first call", "first", _TINY, (CAPTUM,), 0.0),
    Goal("steady call", "steady", _TINY, (CAPTUM,), 0.0),
    Goal("own", "own", _TINY, (), 0.0),
)
IMPORT_GOAL = 0.10
"""Seconds that `import saliency_fast` may add to `import torch`."""


def interval(ratios: Sequence[float]) -> list[float | None]:
    """The geometric mean of paired ratios, with the ends of its 95 % interval (Student's t)."""
    from scipy import stats

    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return [math.exp(mean), None, None]
    t = float(stats.t.ppf(0.975, len(logs) - 1))
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return [math.exp(mean), math.exp(mean - half), math.exp(mean + half)]


def seconds_of(imports: str, clock: str = "perf_counter") -> float:
    """Seconds that a fresh process takes for these imports, by a clock of the module `time`."""
    command = [sys.executable, "-c", _TIMED.format(imports=imports, clock=clock)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def importing(processes: int) -> dict[str, Any]:
    """Seconds of both imports and what is added, medians over neighbours in time."""
    for imports in IMPORTS:
        # Once untimed, so that neither kind pays for files that are not in memory yet.
        seconds_of(imports)
    pairs = [[seconds_of(imports) for imports in IMPORTS] for _ in range(processes)]
    alone, both = (statistics.median(kind) for kind in zip(*pairs, strict=True))
    added = [both - alone for alone, both in pairs]
    return {
        "torch": alone, "both": both, "added": statistics.median(added),
        "lowest": min(added), "highest": max(added), "processes": processes,
    }  # fmt: skip


def measure(
    *,
    only: str = "",
    rounds: int = ROUNDS,
    threads: int | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of a run: a row per call and contender, and the imports."""
    from benchmarks.end_to_end import machine

    threads = threads or os.cpu_count() or 1
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    for work, names in _works(QUICK if quick else GOALS, only).items():
        rows.append(_row(work, names, rounds, threads))
        say(f"{time.perf_counter() - begun:5.0f} s  {label(rows[-1])}: {_brief(rows[-1])}")
    document: dict[str, Any] = {"rows": rows, "quick": quick}
    if re.search(only, "import"):
        document["importing"] = importing(2 if quick else 11)
    about = machine("cpu") | {"threads": threads, "rounds": rounds}
    document["setting"] = about | {"seconds_taken": round(time.perf_counter() - begun)}
    return document


def _works(goals: Sequence[Goal], only: str) -> dict[Work, list[str]]:
    """Every call that some goal is about, with its contenders."""
    found: dict[Work, list[str]] = {}
    for goal in goals:
        for work in goal.works:
            if not re.search(only, _named(work.network, work.call, work.batch)):
                continue
            names = found.setdefault(work, [OURS])
            names += [name for name in goal.against if name not in names]
    return found


def _named(network: str, call: str, batch: int) -> str:
    return f"{network} {call} batch {batch}"


def label(row: dict[str, Any]) -> str:
    """The network with its input, the call and the batch."""
    shape = "x".join(map(str, row["shape"]))
    return _named(f"{row['network']} {shape}", row["call"], row["batch"])


def _row(work: Work, names: list[str], most: int, threads: int) -> dict[str, Any]:
    """Medians over rounds of every contender, and its ratios to ours."""
    found: dict[str, list[Shown]] = {name: [] for name in names}
    steady, begun, number = work not in LARGEST, time.perf_counter(), 0
    while number < most:
        # Whoever comes first in a round comes last in the next.
        turn = number % len(names)
        shown = compare(work, names[turn:] + names[:turn], threads, steady=steady)
        for name, one in shown.items():
            found[name].append(one)
        number += 1
        if number >= LEAST_ROUNDS and time.perf_counter() - begun > SECONDS:
            break
    reference = _reference(work, found)
    row: dict[str, Any] = {
        "network": work.network, "shape": list(work.workload().shape), "batch": work.batch,
        "side": work.side, "call": work.call, "rounds": number, "contenders": {},
    }  # fmt: skip
    for name, several in found.items():
        about = summarised(several, reference)
        if name == OURS:
            about["own"] = _ratios(several, several, "steady", "first")
        else:
            for key in ("first", "steady", "peak"):
                about[f"times_{key}"] = _ratios(several, found[OURS], key, key)
        row["contenders"][name] = about
    return row


def _reference(work: Work, found: dict[str, list[Shown]]) -> torch.Tensor | None:
    """In float64 where that is simple; Captum's own map for Grad-CAM."""
    if work.method == "grad_cam":
        return next(
            (torch.from_numpy(one.values) for one in found[CAPTUM] if one.values is not None), None
        )
    return attribution(work.workload(), Setting(work.method, work.points), examples=1, samples=0)


def summarised(several: Sequence[Shown], reference: torch.Tensor | None) -> dict[str, Any]:
    """Medians over processes of one contender; the error is that of the worst map."""

    def median(name: str) -> float | None:
        values = [getattr(one, name) for one in several if getattr(one, name) is not None]
        return statistics.median(values) if values else None

    maps = [torch.from_numpy(one.values) for one in several if one.values is not None]
    errors = [relative_error(one, reference) for one in maps] if reference is not None else []
    return {
        "reason": next((one.reason for one in several if one.reason), None),
        "first": median("first"),
        "steady": median("steady"),
        "peak_bytes": median("peak_bytes"),
        "resident_bytes": median("resident_bytes"),
        "error": max(errors, default=None),
        "strategy": next((one.strategy for one in several if one.strategy), ""),
    }


def _ratios(
    theirs: Sequence[Shown], ours: Sequence[Shown], of_theirs: str, of_ours: str
) -> list[float | None] | None:
    """Their measure over ours in the same rounds, with its interval."""
    names = {"peak": "peak_bytes"}
    pairs = [
        (getattr(one, names.get(of_theirs, of_theirs)), getattr(two, names.get(of_ours, of_ours)))
        for one, two in zip(theirs, ours, strict=True)
    ]
    found = [one / two for one, two in pairs if one and two]
    return interval(found) if found else None


def _brief(row: dict[str, Any]) -> str:
    """One line for whoever waits."""
    parts = []
    for name, about in row["contenders"].items():
        times = [time_text(about[key]) for key in ("first", "steady")]
        error = error_text(about["error"])
        parts.append(f"{name} {about['reason'] or ' '.join(times)} error {error}")
    return "; ".join(parts)


def ratio_text(found: list[float | None] | None) -> str:
    """A ratio with its interval."""
    if found is None or found[0] is None:
        return "-"
    text = f"{found[0]:.3g}"
    return text if found[1] is None else f"{text} [{found[1]:.3g}, {found[2]:.3g}]"


def summary(document: dict[str, Any]) -> str:
    """The goals: how many of their rows reach them, and which do not."""
    rows = {
        (row["network"], row["side"], row["batch"], row["call"]): row for row in document["rows"]
    }
    cells = []
    for goal in QUICK if document["quick"] else GOALS:
        reached, missed = 0, list[str]()
        for work in goal.works:
            row = rows.get((work.network, work.side, work.batch, work.call))
            for name in goal.against or (OURS,) if row is not None else ():
                key = "own" if goal.measure == "own" else f"times_{goal.measure}"
                found = row["contenders"][name].get(key)
                if found and (found[1] or found[0]) >= SLACK * goal.needed(work):
                    reached += 1
                else:
                    missed.append(f"{label(row)} against {name}: {ratio_text(found)}")
        if reached or missed:
            needed = sorted({f"{goal.needed(work):.3g}" for work in goal.works}, reverse=True)
            count = f"{reached} of {reached + len(missed)}"
            cells.append([goal.text, " / ".join(needed), count, "; ".join(missed) or "-"])
    if found := document.get("importing"):
        holds = "1 of 1" if found["added"] <= IMPORT_GOAL else "0 of 1"
        text = (
            f"{found['added']:.3f} s ({found['lowest']:.3f} to {found['highest']:.3f}) on top of "
            f"{found['torch']:.3f} s"
        )
        cells.append(["`import saliency_fast` after `import torch`", "0.1 s", holds, text])
    lines = [
        caption(document["setting"]),
        "",
        *aligned("goal:, ratio, rows that reach it, rows that do not:", cells),
        "",
        "Captum's seconds or bytes over ours, for one example unless a batch is given: geometric "
        "means over rounds of fresh processes, with 95 % intervals. A goal is reached where the "
        f"lower end of the interval is at least {SLACK} of it.",
    ]
    return "\n".join(lines) + "\n"


def table(document: dict[str, Any]) -> str:
    """The goals, and every row with all that was measured."""
    cells = []
    for row in document["rows"]:
        for name, about in row["contenders"].items():
            against = [ratio_text(about.get(f"times_{key}")) for key in ("first", "steady", "peak")]
            cells.append(
                [
                    label(row), name, about["reason"] or time_text(about["first"]), against[0],
                    time_text(about["steady"]), against[1], ratio_text(about.get("own")),
                    bytes_text(about["peak_bytes"]), against[2],
                    bytes_text(about["resident_bytes"]), error_text(about["error"]),
                ]
            )  # fmt: skip
    header = (
        "call:, contender:, first, over ours, steady, over ours, steady over first, peak memory, "
        "over ours, resident after, error"
    )
    lines = [
        summary(document),
        *aligned(header, cells),
        "",
        "Peak memory is the high-water mark of the first call, and resident after is what stays "
        "when its map is gone, both over the idle process with its model and libraries. Error is "
        "relative L2 to the same points in float64 (of the first example), of Grad-CAM to Captum's "
        "map.",
    ]
    return "\n".join(lines) + "\n"


def options_of(about: str, quick: str) -> argparse.ArgumentParser:
    """Options that benchmarks of fresh processes share."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose text matches")
    parser.add_argument("--rounds", type=int, default=None, help="fresh processes of each row")
    parser.add_argument("--threads", type=int, help="of PyTorch; one per core unless given")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="a directory; needed for a part of the rows")
    return parser


def main() -> None:
    from benchmarks.end_to_end import RESULTS, save

    options = options_of(__doc__, "tiny models, to see that it works").parse_args()
    document = measure(
        only=options.only,
        rounds=options.rounds or (1 if options.quick else ROUNDS),
        threads=options.threads,
        quick=options.quick,
        say=lambda line: print(line, flush=True),
    )
    out = options.out or (None if options.quick or options.only else RESULTS)
    if out is not None:
        save(document, table(document), out, "first-call-cpu")
    print(table(document))


if __name__ == "__main__":
    main()
