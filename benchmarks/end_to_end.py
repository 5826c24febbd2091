"""Ours, Captum as documented, Captum tuned and a hand-written loop on whole models.

    python -m benchmarks.end_to_end --device cpu            about six minutes on two cores
    python -m benchmarks.end_to_end --device cpu --quick    seconds; tiny models, for tests
    python -m benchmarks.reference                          once before, fills the float64 cache

Every contender has a fresh process with its own copy of the model; the processes take turns, so
drifts of the machine hit all alike. Medians are reported. For a GPU see `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import saliency_fast as sf
from benchmarks import tables
from benchmarks.cases import CPU_CASES, QUICK_CASES, QUICK_SETTINGS, SETTINGS, Case
from benchmarks.contenders import ON_CPU, Setting
from benchmarks.processes import Child, ContenderError
from benchmarks.race import Clock, Entry, race, rows
from benchmarks.reference import CACHE, attribution

RESULTS = Path(__file__).parent / "results"
SECONDS, ROUNDS = 6.0, 40
"""A race ends after so many seconds or rounds; large models finish one round."""


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on, with the command that made them."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "captum": _version("captum"),
        "saliency_fast": sf.__version__,
        "backends": sf.backends(),
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32,
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": _command(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _command() -> str:
    """`python -m benchmarks.NAME ARGUMENTS`, without any directory of this machine."""
    kept = [
        given
        for given, before in zip(sys.argv[1:], sys.argv, strict=False)
        if "--out" not in (given, before) and not given.startswith("--out=")
    ]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *kept])


def measure_case(
    case: Case,
    settings: Iterable[Setting],
    clock: Clock,
    cache: Path,
    say: Callable[[str], None],
    *,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """All rows of a workload on the CPU."""
    children = {name: Child(case.workload, case.side, name, threads=threads) for name in ON_CPU}
    found: list[dict[str, Any]] = []
    try:
        for child in children.values():
            child.ready()
        for batch in case.batches:
            for child in children.values():
                # Whose process has ended gets rows that say so.
                with suppress(ContenderError):
                    child.load(batch)
            for setting in settings:
                reference = attribution(
                    case.found(),
                    setting,
                    examples=case.examples(batch),
                    samples=case.samples,
                    cache=cache,
                )
                entries = race(children, setting, reference, clock, seconds=seconds, rounds=rounds)
                found += rows(case, batch, setting, entries)
                say(
                    f"{clock.spent:4.0f} s  {case.label} batch {batch} {setting.label}: "
                    + brief(entries)
                )
    finally:
        for child in children.values():
            child.close()
    return found


def brief(entries: dict[str, Entry]) -> str:
    """One line of medians for whoever waits."""
    return ", ".join(
        f"{name} {entry.reason or f'{entry.median or 0:.4f} s'}" for name, entry in entries.items()
    )


def measure(
    *,
    quick: bool = False,
    only: str | None = None,
    cache: Path = CACHE,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of a CPU run, or of one workload's part of it."""
    clock = Clock(None)
    found: list[dict[str, Any]] = []
    # One thread needs no quiet machine, so that tests take the same time anywhere.
    limits: dict[str, Any] = {"seconds": 0.3, "rounds": 2, "threads": 1} if quick else {}
    settings = QUICK_SETTINGS if quick else SETTINGS
    for case in QUICK_CASES if quick else CPU_CASES:
        if only not in (None, case.workload):
            continue
        found += measure_case(case, settings, clock, cache, say, **limits)
    about = machine("cpu") | {"quick": quick, "seconds_taken": round(clock.spent)}
    return {"setting": about, "rows": found}


def save(document: dict[str, Any], text: str, out: Path, name: str) -> None:
    """Writes NAME.json and the table that was made from it, NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / f"{name}.md").write_text(text)


def command(
    about: str,
    tiny: str,
    measure: Callable[..., dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    stem: str,
) -> None:
    """Runs a benchmark of a device from the command line, and writes what it measured."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"{tiny}, to see that it works")
    parser.add_argument("--out", type=Path, help="a directory; without one, --quick writes nothing")
    options = parser.parse_args()
    document = measure(
        device=options.device, quick=options.quick, say=lambda line: print(line, flush=True)
    )
    out = options.out or (None if options.quick else RESULTS)
    text = table(document)
    if out is not None:
        save(document, text, out, f"{stem}-{'gpu' if options.device == 'cuda' else 'cpu'}")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--only", metavar="WORKLOAD", help="one model, to look at")
    parser.add_argument(
        "--out", type=Path, help="a directory; without one, --quick and --only write nothing"
    )
    options = parser.parse_args()
    if options.device == "cuda":
        parser.error("a GPU is measured by `python -m benchmarks.gpu --out DIR`")
    document = measure(
        quick=options.quick, only=options.only, say=lambda line: print(line, flush=True)
    )
    partly = options.quick or options.only is not None
    out = options.out or (None if partly else RESULTS)
    text = tables.full(document)
    if out is not None:
        save(document, text, out, "end-to-end-cpu")
    print(text)


if __name__ == "__main__":
    main()
