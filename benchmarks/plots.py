"""Time and peak memory against steps and against resolution, ours and Captum.

    python -m benchmarks.plots              about a minute and a half on two cores
    python -m benchmarks.plots --redraw     draws again from the JSON, measures nothing

Integrated Gradients of ResNet-50, batch 1. Writes steps.png and resolution.png with the data of
each in a .json beside it. Every contender has a process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import CAPTUM, OURS, TUNED, Setting
from benchmarks.end_to_end import RESULTS, machine
from benchmarks.processes import Child
from benchmarks.race import Clock, race

NAMES = (OURS, CAPTUM, TUNED)
COLORS = {OURS: "#0b6e4f", CAPTUM: "#c8553d", TUNED: "#8d99ae"}


@dataclass(frozen=True)
class Sweep:
    """One axis: for each tick an input side and a setting."""

    name: str
    axis: str
    title: str
    ticks: tuple[tuple[int, int, Setting], ...]


def _ig(steps: int) -> Setting:
    return Setting("integrated_gradients", steps)


SWEEPS = (
    Sweep(
        "steps",
        "steps",
        "ResNet-50, 3x64x64, batch 1",
        tuple((steps, 64, _ig(steps)) for steps in (10, 25, 50, 100, 200, 400)),
    ),
    Sweep(
        "resolution",
        "input side, pixels",
        "ResNet-50, IG-10, batch 1",
        tuple((side, side, _ig(10)) for side in (64, 96, 128, 192, 256)),
    ),
)


def quick(sweep: Sweep) -> Sweep:
    """Two small ticks, for tests."""
    ticks = tuple((tick, 32, replace(one, points=2)) for tick, _, one in sweep.ticks[:2])
    return replace(sweep, ticks=ticks)


def measure(
    sweep: Sweep, say: Callable[[str], None] = lambda _: None, threads: int | None = None
) -> dict[str, Any]:
    """Median seconds and peak bytes of each contender at each tick."""
    clock, found = Clock(None), []
    for side in sorted({side for _, side, _ in sweep.ticks}):
        case = Case("resnet50", (1,), side)
        children = {name: Child("resnet50", side, name, threads=threads) for name in NAMES}
        try:
            for child in children.values():
                child.ready()
                child.load(1)
            for tick, _, setting in (one for one in sweep.ticks if one[1] == side):
                entries = race(children, setting, None, clock, seconds=1.0, rounds=5)
                say(f"{clock.spent:4.0f} s  {case.label} {setting.label}")
                found += [
                    {
                        "tick": tick, "contender": name, "seconds": entry.median,
                        "peak_bytes": entry.peak_bytes, "rounds": len(entry.seconds),
                        "reason": entry.reason or None,
                    }
                    for name, entry in entries.items()
                ]  # fmt: skip
        finally:
            for child in children.values():
                child.close()
    about = machine("cpu") | {"seconds_taken": round(clock.spent)}
    return {"setting": about, "axis": sweep.axis, "title": sweep.title, "rows": found}


def draw(document: dict[str, Any], path: Path) -> None:
    """Two panels, time and memory, to a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    panels = (("seconds", 1.0, "seconds"), ("peak_bytes", 2**20, "peak memory, MiB"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        for name in NAMES:
            shown = [
                (row["tick"], row[key] / unit)
                for row in document["rows"]
                if row["contender"] == name and row[key] is not None
            ]
            if shown:
                axis.plot(*zip(*shown, strict=True), "o-", color=COLORS[name], label=name)
        axis.set(xlabel=document["axis"], ylabel=label, xscale="log", yscale="log")
        ticks = sorted({row["tick"] for row in document["rows"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    about = document["setting"]
    figure.suptitle(f"{document['title']}; {about['device']}, {about['threads']} threads")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="two small ticks, for tests")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick measures nothing worth keeping: give it another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    for sweep in SWEEPS:
        path: Path = options.out / f"{sweep.name}.json"
        if not options.redraw:
            chosen, threads = (quick(sweep), 1) if options.quick else (sweep, None)
            document = measure(chosen, lambda line: print(line, flush=True), threads)
            path.write_text(json.dumps(document, indent=1) + "\n")
        draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
