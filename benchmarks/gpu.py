"""Everything that a GPU has to show, in one command and at most eight minutes.

    python -m benchmarks.gpu --out DIR                          or: make bench-gpu
    python -m benchmarks.gpu --only smoke,ceilings              some stages alone
    python -m benchmarks.gpu --device cpu --quick --out DIR     the same code without a GPU

`STAGES` is the table of the run. Each stage is work for processes of its own, ends at its time, and
has its rows on disk after every unit: a kernel that fails, a process that dies and one that hangs
take nothing with them (`benchmarks.stages`). Ops that the first stage did not find right are not
measured later. DIR gets a JSON file for each kind of row, and one page, gpu.md.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.stages import TIME, Child, Forked, Found, Row, Stage, run_stage

RESULTS = Path(__file__).parent / "results"
SECONDS = 480.0
STAGES = (
    Stage("smoke", 60, "benchmarks.gpu_smoke:units", "smoke"),
    Stage("ceilings", 120, "benchmarks.gpu_ceilings:units", "ceilings"),
    Stage("tables", 310, "benchmarks.gpu_networks:races", "end-to-end"),
    Stage("switches", 350, "benchmarks.gpu_switches:units", "switches"),
    Stage("profile", 375, "benchmarks.gpu_networks:profiles", "profile"),
    Stage("ops", 410, "benchmarks.ops:units", "ops"),
    Stage("networks of timm", 438, "benchmarks.gpu_networks:others", "timm"),
    Stage("compiled", SECONDS, "benchmarks.gpu_networks:compiled", "end-to-end"),
)
"""In order; a stage that ends early leaves its time to those behind it."""
PRELOAD = (*dict.fromkeys(stage.work.partition(":")[0] for stage in STAGES), "captum.attr")
INSTALL = "pip install --no-deps --no-build-isolation --editable ."
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of which the driver of a GPU makes; PyTorch would take seconds to answer."""
ABOUT = {"device": "unknown", "threads": "?", "torch": "?", "captum": "?", "date": "?"}
"""Of a machine that no stage could describe."""


def not_installed() -> str:
    """Why the kernels cannot be imported, or nothing; found without importing PyTorch."""
    package = importlib.util.find_spec("saliency_fast")
    if package is None:
        return "saliency_fast is not installed"
    places = package.submodule_search_locations
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and find("saliency_fast.kernels", places) is not None:
            return ""
    return "saliency_fast.kernels is not installed: a checkout alone lacks it"


class Run:
    """A run's rows, by file.

    start: makes the children of a stage; now: the clock. Tests have stand-ins for both.
    """

    def __init__(
        self,
        out: Path,
        options: Row,
        *,
        seconds: float = SECONDS,
        start: Callable[[tuple[Any, ...]], Child] = lambda one: Forked(one, PRELOAD),
        now: Callable[[], float] = time.perf_counter,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.out, self.options, self.seconds = out, options, seconds
        self.start, self.now, self.say = start, now, say
        self.begun = now()
        self.rows: dict[str, dict[str, list[Row]]] = {}
        self.about: Row = ABOUT | {"command": options["command"]}

    @property
    def failures(self) -> list[str]:
        """What went wrong, a line each."""
        found = []
        for stages in self.rows.values():
            for stage, rows in stages.items():
                for row in (one for one in rows if one.get("failed")):
                    named = row.get("contender") or row.get("version") or row.get("method") or ""
                    reason = row.get("reason") or row.get("failure")
                    unit = ", ".join(filter(None, (row.get("unit"), named)))
                    found.append(f"{stage}: {unit or 'as a whole'}: {reason}")
        return found

    def run(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            until = self.begun + stage.until * self.seconds / SECONDS
            for found in run_stage(stage, self.options, until, start=self.start, now=self.now):
                self._keep(stage, found)
            self._said(stage)
            if stage.name == "smoke":
                self.options = self.options | {"verdicts": verdicts(self.rows[stage.file])}
        text = page(self)
        (self.out / f"{self._label('gpu')}.md").write_text(text)
        self.say(text)

    def _keep(self, stage: Stage, found: Found) -> None:
        """Writes what a stage has shown."""
        self.about = self.about | found.about
        self.rows.setdefault(stage.file, {})[stage.name] = found.all_rows
        document = self.document(stage.file)
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self._label(stage.file)}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")

    def document(self, file: str) -> Row:
        found = [row for rows in self.rows.get(file, {}).values() for row in rows]
        about = self.about | {"seconds_taken": round(self.now() - self.begun)}
        return {"setting": about | {"quick": self.options["quick"]}, "rows": found}

    def _label(self, file: str) -> str:
        if self.options["device"] == "cuda":
            return file if file == "gpu" else f"{file}-gpu"
        return f"{file}-trial"

    def _said(self, stage: Stage) -> None:
        rows = self.rows[stage.file][stage.name]
        bad = sum(bool(row.get("failed")) for row in rows)
        late = sum(row.get("reason") == TIME for row in rows)
        spent = self.now() - self.begun
        self.say(
            f"{spent:4.0f} s  {stage.name}: {len(rows)} rows, {bad} failed, {late} not in time"
        )


def verdicts(stages: dict[str, list[Row]]) -> dict[str, str]:
    """For every op that was checked "passed", or why it is not to be measured."""
    found: dict[str, str] = {}
    for row in (one for rows in stages.values() for one in rows):
        op = row.get("op") or (row["unit"] or "").partition("op ")[2]
        if op and found.get(op, "passed") == "passed":
            found[op] = row.get("reason") or "passed"
    return found


def page(run: Run) -> str:
    """Everything in one page; what failed comes first."""
    failed = run.failures
    lines = ["# A run on a GPU", "", tables.caption(run.about), ""]
    lines += [f"{len(failed)} failures:" if failed else "No failures.", ""]
    lines += [f"- {line}" for line in failed] + [""] * bool(failed)
    for file, show in TABLES.items():
        if file in run.rows:
            lines += [f"## {file}", "", *show(run.document(file)["rows"]), ""]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value in (None, "") else str(value).replace("|", "/").replace("\n", " ")


def _columns(*names: str) -> Callable[[list[Row]], list[str]]:
    """A table of these columns; rows with none of them say their unit and reason."""

    def show(rows: list[Row]) -> list[str]:
        columns = [*names, "reason"]
        header = ", ".join(f"{name.replace('_', ' ')}:" for name in ("unit", *columns))
        lines = [[_text(row.get(name)) for name in ("unit", *columns)] for row in rows]
        return tables.aligned(header, lines)

    return show


def races(rows: list[Row]) -> list[str]:
    """A line per contender of every race."""
    header = (
        "model, batch, contender:, time, gradients/s, against Captum, at equal arithmetic, "
        "peak memory, reserved, error, precision:, a launch, strategy:, graphs:"
    )
    lines = []
    for row in rows:
        if "contender" not in row:
            lines.append([_text(row["unit"]), "-", f"{row['reason']}", *["-"] * 11])
            continue
        lines.append([
            tables.model_text(row), str(row["batch"]), row["contender"],
            row["reason"] or tables.time_text(row["seconds"]),
            tables.number_text(row["gradients_per_second"]),
            tables.times_text(row["times_captum"]), tables.times_text(row.get("times_equal")),
            tables.bytes_text(row["peak_bytes"]), tables.bytes_text(row.get("reserved_bytes")),
            tables.error_text(row["error"]),
            *(_text(row.get(name))
              for name in ("precision", "points_per_launch", "strategy", "graphs")),
        ])  # fmt: skip
    return tables.aligned(header, lines)


def switches(rows: list[Row]) -> list[str]:
    """A line per network and switch, and which of them to take."""
    names = ("switch", "seconds", "times_off", "gap", "take", "strategy", "graphs")
    return [*_columns(*names)(rows), "", *verdict(rows)]


def verdict(rows: list[Row]) -> list[str]:
    """Which switches to take: those that pay on some network, and fail and cost on none."""
    lines = []
    for name in dict.fromkeys(row["switch"] for row in rows if row.get("switch", "off") != "off"):
        own = [row for row in rows if row.get("switch") == name]
        pays, against = (
            [row["workload"] for row in own if any(row.get(key) for key in keys)]
            for keys in (("take",), ("failed", "slower"))
        )
        text = f"take it, for {', '.join(pays)}" if pays and not against else "leave it off"
        lines.append(f"- {name}: {text}" + f"; against it: {', '.join(against)}" * bool(against))
    return lines


def table(document: dict[str, Any]) -> str:
    """Every row of the races."""
    lines = [tables.caption(document["setting"]), "", *races(document["rows"]), "", NOTES]
    return "\n".join(lines) + "\n"


def summary(document: dict[str, Any]) -> str:
    """A line per race: each of ours, with its speed against whoever computes alike."""
    header = (
        "model, batch, method:, ours in float16, against hand-tuned, in TF32, against Captum in "
        "TF32, in float32, against Captum in float32, by default:, against Captum as it is, error"
    )
    races: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in (one for one in document["rows"] if "contender" in one):
        key = tables.model_text(row), row["batch"], row["setting"]
        races.setdefault(key, {})[row["contender"]] = row
    lines = []
    for (model, batch, setting), by in races.items():
        cells = [model, str(batch), setting]
        for name in ("float16", "tf32", "float32"):
            ours = by.get(f"{tables.OURS}, {name}", {})
            cells += [ours.get("reason") or tables.time_text(ours.get("seconds")),
                      tables.times_text(ours.get("times_equal"))]  # fmt: skip
        auto = by.get(f"{tables.OURS}, auto", {})
        cells += [_text(auto.get("precision")), tables.times_text(auto.get("times_captum")),
                  tables.error_text(auto.get("error"))]  # fmt: skip
        lines.append(cells)
    about = tables.caption(document["setting"])
    return "\n".join([about, "", *tables.aligned(header, lines), "", NOTES]) + "\n"


NOTES = (
    "Medians of interleaved calls, end to end. Against others: their time over ours, so above 1 is "
    "faster. Captum as it is computes convolutions in TF32, which PyTorch allows by default. "
    "Hand-tuned is a loop in PyTorch with weights in float16, channels last, cuDNN's choice by "
    "time, a CUDA graph and the fastest number of points per launch. Peak memory is over the level "
    "right after the model was built, and reserved is all that the allocator then holds, private "
    "pools of graphs included. Error is relative L2 against the same points in float64."
)
TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "smoke": _columns("version", "method", "gap", "first_call_seconds", "strategy", "graphs"),
    "ceilings": _columns(
        "pass", "layout", "precision", "benchmark", "seconds", "teraflops", "gigabytes_per_second"
    ),
    "end-to-end": races,
    "switches": switches,
    "profile": _columns("kernel", "calls", "busy_seconds", "seconds", "share", "graphs"),
    "ops": _columns(
        "megabytes", "fast_ms", "copy_ms", "share_of_copy", "gigabytes_per_second", "error"
    ),
    "timm": _columns(
        "precision", "gradients_per_second", "times_plain", "error", "strategy", "graphs"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a directory; benchmarks/results on a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and sizes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--only", default="", help="stages, with commas between")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(","))) or {one.name for one in STAGES}
    stages = [one for one in STAGES if one.name in wanted]
    if len(stages) < len(wanted):
        parser.error(f"--only takes {', '.join(one.name for one in STAGES)}: got {options.only!r}")
    if options.device == "cuda":
        if why := not_installed():
            parser.error(f"{why}; run `{INSTALL}`")
        if not any(map(os.path.exists, DEVICES)):
            parser.error(f"there is no GPU here: expected one of {', '.join(DEVICES)}")
    elif options.out is None:
        parser.error("--device cpu needs --out DIR: its rows are no results")
    parts = [f"--device {options.device}"] * (options.device == "cpu") + ["--quick"] * options.quick
    parts += [f"--only {options.only!r}"] * bool(options.only)
    parts += [f"--seconds {options.seconds:g}"] * (options.seconds != SECONDS)
    command = " ".join(["python -m benchmarks.gpu", *parts])
    about = {"device": options.device, "quick": options.quick, "command": command,
             "about": "benchmarks.end_to_end:machine"}  # fmt: skip
    run = Run(options.out or RESULTS, about, seconds=options.seconds)
    run.run(stages)
    if run.failures:
        sys.exit("\n".join(["these failed:", *run.failures]))


if __name__ == "__main__":
    main()
