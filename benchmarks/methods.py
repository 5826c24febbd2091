"""Code written for Captum, with Captum and with `saliency_fast.captum` in its place.

    python -m benchmarks.methods             about ten minutes on two cores
    python -m benchmarks.methods --quick     seconds; tiny models, for tests

Each call is the same code run against either library, in processes of their own that take turns:
time, peak memory, and how far both are from Captum's numbers in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.calls import CALLS, Called
from benchmarks.cases import sized
from benchmarks.contenders import CALLED, Setting
from benchmarks.end_to_end import command, machine
from benchmarks.processes import Child, ContenderError, Worker
from benchmarks.race import Clock, race
from benchmarks.tables import aligned, bytes_text, caption, error_text, time_text, times_text

OURS, CAPTUM = CALLED
SECONDS, ROUNDS = 4.0, 20


@dataclass(frozen=True)
class Case:
    """A workload, the side of its inputs, and the calls that are made of it."""

    workload: str
    side: int | None
    calls: tuple[str, ...]
    batch: int = 1


_ALL = tuple(CALLS)
# Captum's hooks refuse in-place ReLUs for DeepLift and modules that run twice.
_RESIDUAL = tuple(name for name in _ALL if name != "DeepLift")
_RECTIFIED = ("GuidedBackprop", "Deconvolution")
CASES = (
    Case("resnet50", 224, _RESIDUAL),
    Case("unet3d", 32, tuple(name for name in _RESIDUAL if "Ablation" not in name)),
    # It has no ReLU.
    Case("volume", 48, tuple(name for name in _ALL if name not in _RECTIFIED)),
)
QUICK = (Case("tiny-unet3d", 8, ("Saliency", "Occlusion, 7 windows a side")),)


def _reference(case: Case, setting: Setting) -> Tensor:
    workload = sized(case.workload, case.side)
    called = Called(CAPTUM, workload, workload.build().double())
    return called(workload.inputs(case.batch).double(), setting)


def measure(
    *, device: str = "cpu", quick: bool = False, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The document of a run."""
    clock, found = Clock(None), []
    limits: dict[str, Any] = {"seconds": 0.3, "rounds": 2} if quick else {}
    for case in QUICK if quick else CASES:
        runners = {name: _runner(case, name, device, quick=quick) for name in CALLED}
        try:
            for runner in runners.values():
                runner.load(case.batch)
            for name in case.calls:
                row = _row(case, name, runners, clock, **limits)
                say(f"{clock.spent:4.0f} s  {row['workload']} {name}: {row['times_captum']}")
                found.append(row)
        finally:
            for runner in runners.values():
                runner.close()
    about = machine(device) | {"quick": quick, "seconds_taken": round(clock.spent)}
    return {"setting": about, "rows": found}


def _runner(case: Case, name: str, device: str, *, quick: bool) -> Child | Worker:
    """A library in a process of its own, or, on a GPU, whose memory PyTorch counts, in this one."""
    if device != "cpu":
        return Worker(case.workload, case.side, name, device)
    child = Child(case.workload, case.side, name, threads=1 if quick else None)
    child.ready()
    return child


def _row(
    case: Case,
    name: str,
    runners: Mapping[str, Child | Worker],
    clock: Clock,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    setting = Setting(name)
    try:
        reference: Tensor | None = _reference(case, setting)
    except (RuntimeError, AssertionError) as error:
        raise ContenderError(f"Captum in float64 failed in {name}: {error}") from error
    entries = race(runners, setting, reference, clock, seconds=seconds, rounds=rounds)
    ours, theirs = entries[OURS], entries[CAPTUM]
    both = ours.median and theirs.median
    return {
        "workload": case.workload,
        "shape": list(sized(case.workload, case.side).shape),
        "batch": case.batch,
        "call": name,
        "seconds": ours.median,
        "captum_seconds": theirs.median,
        "times_captum": theirs.median / ours.median if both else None,
        "peak_bytes": ours.peak_bytes,
        "captum_peak_bytes": theirs.peak_bytes,
        "error": ours.error,
        "captum_error": theirs.error,
        "reason": ours.reason or theirs.reason or None,
        "rounds": len(ours.seconds),
    }


def table(document: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = [
        [
            f"{row['workload']} {'x'.join(map(str, row['shape']))}",
            row["call"],
            row["reason"] or time_text(row["seconds"]),
            time_text(row["captum_seconds"]),
            times_text(row["times_captum"]),
            bytes_text(row["peak_bytes"]),
            bytes_text(row["captum_peak_bytes"]),
            error_text(row["error"]),
            error_text(row["captum_error"]),
        ]
        for row in document["rows"]
    ]
    header = (
        "model, call:, ours, Captum, times faster, peak memory ours, Captum, error ours, Captum"
    )
    lines = [
        caption(document["setting"]),
        "",
        *aligned(header, rows),
        "",
        "The same code, with `saliency_fast.captum` and with `captum.attr`. Medians of interleaved "
        "calls. Peak memory is over the level right after the model was built. Error is relative "
        "L2 against Captum's numbers in float64.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(__doc__, "tiny models", measure, table, "methods")
