"""What the lean engine spares: memory of a launch, bytes kept of a point, work before the prefix.

    python -m benchmarks.lean               about ten minutes on two cores
    python -m benchmarks.lean --quick       seconds; tiny models, for tests

Three parts, in lean-cpu.json and lean-cpu.md. "launch": all points of a call at once, against
Captum, with lean off, and under a budget that is a share of what Captum took. "saved": what
`Engine.plan` counts that autograd keeps of a point. "prefix": with it and without. Contenders run
as in `benchmarks.end_to_end`, and what was planned stands beside what was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cases import Case
from benchmarks.contenders import (
    CAPTUM,
    GRADIENT,
    LEAN_OFF,
    NO_PREFIX,
    ONE_LAUNCH,
    OURS,
    Setting,
    budgeted,
)
from benchmarks.end_to_end import RESULTS, brief, machine, save
from benchmarks.processes import Child, ContenderError
from benchmarks.race import Clock, Entry, race, rows
from benchmarks.reference import CACHE, attribution
from saliency_fast.engine.plan import Plan

SECONDS, ROUNDS = 25.0, 3
"""A race ends after so many seconds or rounds; where one round takes longer, after that."""
LAUNCH = (CAPTUM, LEAN_OFF, ONE_LAUNCH)
PREFIX = (OURS, NO_PREFIX)
MEASURED_AGAINST = (CAPTUM, LEAN_OFF, NO_PREFIX)


@dataclass(frozen=True)
class Comparison:
    """One race of a part. share: ours also runs in this part of the memory that Captum took."""

    part: str
    case: Case
    setting: Setting
    names: tuple[str, ...]
    share: int | None = None


def _ig(steps: int) -> Setting:
    return Setting("integrated_gradients", steps)


def _one(workload: str, side: int | None = None) -> Case:
    return Case(workload, (1,), side)


COMPARISONS = (
    Comparison("launch", _one("resnet50", 448), _ig(8), LAUNCH, share=12),
    Comparison("launch", _one("unet3d", 64), _ig(4), LAUNCH),
    Comparison("launch", _one("unet3d", 128), GRADIENT, LAUNCH),
    Comparison("launch", _one("unet3d-instance", 64), _ig(4), LAUNCH, share=4),
    Comparison("launch", _one("vit_b16", 224), _ig(8), (LEAN_OFF, ONE_LAUNCH)),
    Comparison("prefix", _one("resnet50"), _ig(50), PREFIX),
    Comparison("prefix", _one("vit_b16", 112), _ig(50), PREFIX),
    Comparison("prefix", _one("unet3d", 32), _ig(50), PREFIX),
    Comparison("prefix", _one("volume"), _ig(50), PREFIX),
)
COUNTED = (_one("resnet50"), _one("unet3d", 64), _one("vit_b16"))
QUICK_COMPARISONS = (
    Comparison("launch", _one("tiny-unet3d", 40), _ig(4), LAUNCH, share=2),
    Comparison("launch", _one("tiny-vit"), _ig(4), (LEAN_OFF, ONE_LAUNCH)),
    Comparison("prefix", _one("volume", 32), _ig(6), PREFIX),
)
QUICK_COUNTED = (_one("tiny-unet3d", 40),)


def compare(
    one: Comparison,
    clock: Clock,
    cache: Path,
    say: Callable[[str], None],
    *,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a race, with the plans of ours and every ratio."""
    case, setting = one.case, one.setting
    reference = attribution(case.found(), setting, examples=1, samples=case.samples, cache=cache)
    children: dict[str, Child] = {}
    try:
        for name in one.names:
            children[name] = Child(case.workload, case.side, name, threads=threads)
        for child in children.values():
            child.ready()
            child.load(1)
        budget = _mebibytes(children[CAPTUM], setting, one.share) if one.share else None
        if budget is not None:
            name = budgeted(budget)
            child = children[name] = Child(case.workload, case.side, name, threads=threads)
            child.ready()
            child.load(1)
        entries = race(children, setting, reference, clock, seconds=seconds, rounds=rounds)
        plans = {name: _plan(child, setting) for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    say(f"{clock.spent:4.0f} s  {one.part} {case.label} {setting.label}: {brief(entries)}")
    return [
        {"part": one.part} | row | _planned(plans[name], entries[name]) | _against(name, entries)
        for name, row in zip(entries, rows(case, 1, setting, entries), strict=True)
    ]


def _mebibytes(captum: Child, setting: Setting, share: int) -> int | None:
    """A budget of the memory that Captum takes over `share`; None where that is not known."""
    try:
        captum.warm(setting)
        peak = captum.run(setting, memory=True).peak_bytes
    except ContenderError:
        # The race comes upon it again, and its row says why.
        return None
    return peak // share // 2**20 if peak else None


def _plan(child: Child, setting: Setting) -> Plan | None:
    try:
        return child.plan(setting)
    except ContenderError:
        return None


def _planned(plan: Plan | None, entry: Entry) -> dict[str, Any]:
    """What the plan foresaw, beside what was measured."""
    if plan is None:
        ratios = ("planned_over_peak", "planned_over_rise")
        names = ("points_per_launch", "planned_bytes", *ratios, "way", "prefix")
        return {"rise_bytes": entry.rise_bytes} | dict.fromkeys(names)
    return {
        "rise_bytes": entry.rise_bytes,
        "points_per_launch": plan.points_per_launch,
        "planned_bytes": plan.peak_bytes,
        "planned_over_peak": _over(plan.peak_bytes, entry.peak_bytes),
        "planned_over_rise": _over(plan.peak_bytes, entry.rise_bytes),
        "way": plan.lean,
        "prefix": plan.prefix,
        "notes": list(plan.notes),
    }


def _against(name: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Seconds and bytes of others over those of contender `name`."""
    mine = entries[name]
    return {
        "against": {
            other: {
                "time": _over(entries[other].median, mine.median),
                "memory": _over(entries[other].peak_bytes, mine.peak_bytes),
            }
            for other in MEASURED_AGAINST
            if other in entries
        }
    }


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def count(case: Case, threads: int | None = None) -> dict[str, Any]:
    """Bytes that autograd keeps of a point, as the model is and as ours runs it."""
    child, plan, reason = Child(case.workload, case.side, OURS, threads=threads), None, None
    try:
        child.ready()
        child.load(1)
        plan = child.plan(GRADIENT)
    except ContenderError as failed:
        reason = str(failed)
    finally:
        child.close()
    before, after = (plan.saved_before, plan.saved_after) if plan else (None, None)
    return {
        "part": "saved",
        "workload": case.workload,
        "shape": list(case.found().shape),
        "saved_before": before,
        "saved_after": after,
        "times_less": _over(before, after),
        "left": dict(plan.left) if plan else {},
        "reason": reason,
    }


def measure(
    *, quick: bool = False, cache: Path = CACHE, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    clock = Clock(None)
    # As in `end_to_end.measure`: one thread needs no quiet machine.
    threads = 1 if quick else None
    limits: dict[str, Any] = {"seconds": 0.3, "rounds": 2} if quick else {}
    found = [count(case, threads) for case in (QUICK_COUNTED if quick else COUNTED)]
    for one in QUICK_COMPARISONS if quick else COMPARISONS:
        found += compare(one, clock, cache, say, threads=threads, **limits)
    about = machine("cpu") | {"quick": quick, "seconds_taken": round(clock.spent)}
    return {"setting": about, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--out", type=Path, help="a directory; without one, --quick writes nothing")
    options = parser.parse_args()
    document = measure(quick=options.quick, say=lambda line: print(line, flush=True))
    out = options.out or (None if options.quick else RESULTS)
    text = tables.lean(document)
    if out is not None:
        save(document, text, out, "lean-cpu")
    print(text)


if __name__ == "__main__":
    main()
