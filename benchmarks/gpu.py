"""Everything that a GPU has to show, in one command and at most eight minutes.

    python -m benchmarks.gpu --out DIR                          or: make bench-gpu
    python -m benchmarks.gpu --out DIR --device cpu --quick     the same code without a GPU

First every op is checked on the device against its reference; an op that fails gets no row. Then
each op's bandwidth as a share of a measured copy, then whole models: all contenders in turn, in
one process, with PyTorch's allocator counting memory. Rows that the time does not allow are there
with the reason "time". One table is printed last; DIR gets ops-gpu and end-to-end-gpu, each as
JSON and as Markdown.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops as op_benchmarks
from benchmarks import tables
from benchmarks.cases import GPU_CASES, QUICK_CASES, QUICK_SETTINGS, SETTINGS, Case
from benchmarks.contenders import (
    CAPTUM,
    COMPILED,
    ON_CPU,
    ON_GPU,
    OURS,
    TUNED,
    Setting,
)
from benchmarks.end_to_end import RESULTS, brief, machine, save
from benchmarks.processes import Worker
from benchmarks.race import Clock, Entry, race, rows
from benchmarks.reference import attribution
from saliency_fast.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 480.0
SHARE_OF_CHECKS = 0.35
SECONDS_OF_COMPILING = 90.0
"""Kept back for the compiled models, which come last."""
CHECKS = {
    "cuda": ("tests/kernels/test_kernels_on_gpu.py", "tests/graphs/test_graphs_on_gpu.py"),
    "cpu": ("tests/ops/test_native.py",),
}
_RESULT = re.compile(r"^(?P<test>\S*::.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b")


def check_ops(device: str, seconds: float) -> dict[str, str]:
    """For every op "passed", or why its rows are refused; for "all", why the run itself failed."""
    command = [sys.executable, "-m", "pytest", *CHECKS[device], "-v", "-o", "addopts=", "--tb=line"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    failure = ""
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        output = done.stdout
        if done.returncode not in (0, 1):
            failure = f"pytest ended with {done.returncode}: {(done.stderr or output)[-300:]}"
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        failure = "time"
    verdicts = read_checks(output)
    return verdicts | ({"all": failure} if failure else {})


def read_checks(output: str) -> dict[str, str]:
    """The verdict on each op from what pytest printed, a test per line."""
    outcomes: dict[str, list[str]] = {name: [] for name, op in OPS.items() if op.triton}
    others = []
    for match in filter(None, map(_RESULT.match, output.splitlines())):
        mentioned = [name for name in outcomes if re.search(rf"\b{name}\b", match["test"])]
        for name in mentioned:
            outcomes[name].append(match["outcome"])
        if not mentioned and match["outcome"] in ("FAILED", "ERROR"):
            others.append(match["test"].split("::")[-1])
    verdicts = {}
    for name, seen in outcomes.items():
        bad = sum(outcome in ("FAILED", "ERROR") for outcome in seen)
        if bad:
            verdicts[name] = f"{bad} of its {len(seen)} checks failed"
        else:
            verdicts[name] = "passed" if "PASSED" in seen else "not checked"
    return verdicts | dict.fromkeys(others, "failed")


def measure_ops(device: str, verdicts: dict[str, str]) -> dict[str, Any]:
    """Per-op rows; those of ops that are not proven right hold the reason instead."""
    checked = [(name, verdicts[name]) for name in OPS if name in verdicts]
    refused = [{"op": name, "reason": seen} for name, seen in checked if seen != "passed"]
    try:
        measured = op_benchmarks.measure(device)
    except Exception as error:
        reason = f"the measurement failed: {type(error).__name__}: {error}".splitlines()[0]
        refused, measured = [{"op": name, "reason": reason} for name in OPS], []
    proven = [row for row in measured if verdicts[row["op"]] == "passed"]
    about = op_benchmarks.setting(device) | {"command": machine(device)["command"]}
    return {"setting": about, "rows": proven + refused, "checks": verdicts}


class Field:
    """The contenders on one model, side by side in this process."""

    def __init__(self, case: Case, names: tuple[str, ...], device: str, cache: Path) -> None:
        self.case, self.device, self.cache = case, device, cache
        # One model serves all: whoever changes his copies it first.
        model = case.found().build().to(device)
        self.workers = {
            name: Worker(case.workload, case.side, name, device, model=model) for name in names
        }
        self.pace: dict[str, float] = {}

    def run(
        self, batch: int, setting: Setting, clock: Clock, seconds: float
    ) -> tuple[list[dict[str, Any]], dict[str, Entry]]:
        work = batch * setting.points
        reference = None
        if clock.left > 0:
            reference = attribution(
                self.case.found(), setting, examples=self.case.examples(batch),
                samples=self.case.samples, device=self.device, cache=self.cache,
            )  # fmt: skip
            for worker in self.workers.values():
                worker.load(batch)
        # Seconds per gradient only fall as batches grow, so this guess is on the safe side.
        expected = {name: pace * work for name, pace in self.pace.items()}
        entries = race(
            self.workers, setting, reference, clock, seconds=seconds, rounds=20, expected=expected
        )
        for name, entry in entries.items():
            if entry.median:
                self.pace[name] = min(self.pace.get(name, 1e9), entry.median / work)
        return rows(self.case, batch, setting, entries), entries


def measure_models(
    device: str, clock: Clock, cache: Path, *, quick: bool
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows race by race, each with a line to print; every model gets its share of the time."""
    cases = QUICK_CASES if quick else GPU_CASES
    names = ON_CPU if device == "cpu" else ON_GPU
    kept_back = 0.0 if device == "cpu" else SECONDS_OF_COMPILING
    gradient, *averages = QUICK_SETTINGS if quick else SETTINGS
    for number, case in enumerate(cases):
        share = Clock((clock.left - kept_back) / (len(cases) - number))
        field = Field(case, names, device, cache)
        for setting in (*averages, gradient):
            for batch in case.batches:
                found, entries = field.run(batch, setting, share, 0.3 if quick else 2.0)
                yield _said(clock, case, batch, setting, entries), found
        del field
        _release(device)
    for case in cases if device == "cuda" else ():
        # Compiling takes most of a minute for each shape, so one race a model must do.
        field = Field(case, (OURS, CAPTUM, TUNED, *COMPILED), device, cache)
        left = clock if clock.left > SECONDS_OF_COMPILING / 3 else Clock(0.0)
        found, entries = field.run(case.batches[0], averages[0], left, 2.0)
        compiled = [row for row in found if row["contender"] in COMPILED]
        yield _said(clock, case, case.batches[0], averages[0], entries), compiled
        del field
        _release(device)


def _said(clock: Clock, case: Case, batch: int, setting: Setting, entries: Any) -> str:
    return f"{clock.spent:4.0f} s  {case.label} batch {batch} {setting.label}: {brief(entries)}"


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and no per-op rows")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here (torch.cuda.is_available() is False)")
    clock, label = Clock(options.seconds), "gpu" if options.device == "cuda" else "cpu"

    verdicts = check_ops(options.device, SHARE_OF_CHECKS * options.seconds)
    for name, verdict in verdicts.items():
        print(f"{clock.spent:4.0f} s  check of {name}: {verdict}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        document = measure_ops(options.device, verdicts)
        text = tables.ops(document)
        save(document, text, options.out, f"ops-{label}")
        print(text, flush=True)

    found: list[dict[str, Any]] = []
    about = machine(options.device) | {"checks": verdicts, "quick": options.quick}
    for line, new in measure_models(
        options.device, clock, options.out / ".cache", quick=options.quick
    ):
        print(line, flush=True)
        found += new
        # After every race, so that a run that is cut short leaves what it had.
        document = {"setting": about | {"seconds_taken": round(clock.spent)}, "rows": found}
        save(document, tables.full(document), options.out, f"end-to-end-{label}")
    print(tables.full(document))
    if any(verdict != "passed" for verdict in verdicts.values()):
        sys.exit("not every op passed its checks on this device: see above")


if __name__ == "__main__":
    main()
