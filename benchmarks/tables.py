"""Markdown from the measured JSON, and the tables of README and docs from it.

    python -m benchmarks.tables             rewrites what lies between the markers of README.md and
                                            of the pages under docs/
    python -m benchmarks.tables --check     fails where that would change anything

A marker is `<!-- benchmark:NAME -->` ... `<!-- /benchmark:NAME -->`. NAME is the stem of a file
under benchmarks/results/: "end-to-end-cpu", "end-to-end-gpu" (every row), the same with "-summary"
(one line per race), "lean-cpu", "lean-gpu", "ops-cpu" or "ops-gpu"; "kernels" (what compilers make
of every kernel), "kernels-summary" (one line per kernel), "kernels-gpu" (what was timed) or the
same with "-summary" (only what is checked in or to be); "precision-cpu", "precision-gpu",
"requests-cpu", "requests-gpu" (both also with "-summary"), "evaluation-cpu", "metaevaluation-cpu",
"gpu-model" (counted, not measured), "intervals", "methods-cpu", "methods-gpu", "smoothgrad",
"first-call-cpu" or "real-models-cpu" (both also with "-summary").
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured yet"
GPU_OPS = ("ops-gpu.json", "ops-cuda.json")
"""The files of per-op rows on a GPU, by `benchmarks.gpu` and by `benchmarks.ops`."""
OWN_TABLES = (
    "evaluation",
    "first-call",
    "gpu-model",
    "intervals",
    "metaevaluation",
    "methods",
    "precision",
    "real-models",
    "requests",
    "smoothgrad",
)
"""Modules beside this one whose `table` makes what they measured into Markdown."""
OURS, CAPTUM, TUNED, LOOP = "saliency_fast", "captum", "captum tuned", "hand-written loop"
HALF = "saliency_fast, bfloat16"

Row = dict[str, Any]


def full(document: dict[str, Any]) -> str:
    """Every row of an end-to-end run."""
    lines = [
        caption(document["setting"]),
        "",
        "| model | batch | method | contender | time | spread | gradients/s | against Captum "
        "| peak memory | error |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        if "contender" not in row:
            lines.append(f"| {row['workload']} | | | | {row['reason']} | | | | | |")
            continue
        cells = [
            model_text(row),
            str(row["batch"]),
            row["setting"],
            row["contender"],
            row["reason"] or time_text(row["seconds"]),
            _spread(row),
            number_text(row["gradients_per_second"]),
            times_text(row["times_captum"]),
            bytes_text(row["peak_bytes"]),
            error_text(row["error"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(document)]) + "\n"


def summary(document: dict[str, Any]) -> str:
    """One line per race: times, our speed-up over each, memory and error beside Captum's."""
    lines = [
        caption(document["setting"]),
        "",
        "| model | batch | method | ours | Captum | Captum tuned | loop | ours, bfloat16 "
        "| peak memory, ours | Captum | error, ours | Captum | ours, bfloat16 |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [row for row in document["rows"] if "contender" in row]
    for _, group in groupby(rows, lambda row: (model_text(row), row["batch"], row["setting"])):
        by = {row["contender"]: row for row in group}
        if OURS not in by:
            continue
        ours, captum, half = by[OURS], by.get(CAPTUM, {}), by.get(HALF)
        cells = [
            model_text(ours),
            str(ours["batch"]),
            ours["setting"],
            ours["reason"] or time_text(ours["seconds"]),
            *(_against(ours, by.get(name)) for name in (CAPTUM, TUNED, LOOP)),
            _half(half, captum),
            bytes_text(ours["peak_bytes"]),
            bytes_text(captum.get("peak_bytes")),
            error_text(ours["error"]),
            error_text(captum.get("error")),
            error_text(half["error"] if half else None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(document)]) + "\n"


def _half(half: Row | None, captum: Row) -> str:
    """Our time in a half type, and how many times Captum's it is the speed of."""
    if half is None or not half.get("seconds"):
        return "-"
    theirs = captum.get("seconds")
    against = f" ({theirs / half['seconds']:.2f}x Captum)" if theirs else ""
    return time_text(half["seconds"]) + against


def ops(document: dict[str, Any]) -> str:
    """The per-op table, as `benchmarks.ops` writes it, with the rows that were refused."""
    from benchmarks.ops import table

    kept = [row for row in document["rows"] if not row.get("reason")]
    refused = [row for row in document["rows"] if row.get("reason")]
    lines = [
        f"Not measured: `{row.get('op') or row['unit']}` ({row['reason']})." for row in refused
    ]
    return table(kept, document["setting"]) + "".join(f"\n{line}\n" for line in lines)


def lean(document: dict[str, Any]) -> str:
    """What `benchmarks.lean` measured: launches, saved bytes, the prefix."""
    names = ("launch", "saved", "prefix")
    parts = {one: [row for row in document["rows"] if row["part"] == one] for one in names}
    off, captum = "saliency_fast, one launch, lean off", CAPTUM
    foreseen = "planned, over peak, of the call, planned over it"
    launch = [
        [
            model_text(row), row["setting"], row["contender"],
            number_text(row["points_per_launch"]), row["reason"] or time_text(row["seconds"]),
            _spread(row), _ratio(row, captum, "time"), _ratio(row, off, "time"),
            bytes_text(row["peak_bytes"]), _ratio(row, captum, "memory"),
            _ratio(row, off, "memory"), *_foreseen(row), error_text(row["error"]),
        ]
        for row in parts["launch"]
    ]  # fmt: skip
    saved = [
        [model_text(row), *(bytes_text(row[key]) for key in ("saved_before", "saved_after")),
         row["reason"] or times_text(row["times_less"])]
        for row in parts["saved"]
    ]  # fmt: skip
    prefix = [
        [
            model_text(row), row["setting"], row["contender"],
            row["reason"] or time_text(row["seconds"]), _spread(row),
            _ratio(row, "saliency_fast, no prefix", "time"),
            row["prefix"] or "-", bytes_text(row["peak_bytes"]),
            _ratio(row, "saliency_fast, no prefix", "memory"), *_foreseen(row),
            error_text(row["error"]),
        ]
        for row in parts["prefix"]
    ]  # fmt: skip
    lines = [
        caption(document["setting"]),
        "",
        *aligned(
            "model, method, contender:, a launch, time, spread, against Captum, against lean off, "
            f"peak memory, Captum's over it, lean off's over it, {foreseen}, error",
            launch,
        ),
        "",
        "Bytes that autograd keeps of one point from forward to backward (counted, not timed):",
        "",
        *aligned("model, as the model is, lean, times less", saved),
        "",
        "The affine prefix, applied once instead of for every point where the plan says it pays:",
        "",
        *aligned(
            "model, method, contender:, time, spread, against no prefix, what the plan takes once:,"
            f" peak memory, no prefix's over it, {foreseen}, error",
            prefix,
        ),
        "",
        "Times are medians of interleaved calls; ratios above 1 are in favour of the row. Peak "
        "memory is the high-water mark of a call over the level right after the model was built, "
        "in a process of its own; planning and warming come before it. Of the call is the same "
        "mark over the level right before it, so without prepared weights and loaded modules; that "
        "is what a plan foretells. Error is relative L2 "
        "against the same points in float64.",
    ]
    return "\n".join(lines) + "\n"


def kernels(name: str, document: dict[str, Any], results: Path) -> str:
    """What `benchmarks.kernels` wrote, with the bandwidths that `benchmarks.ops` measured."""
    from benchmarks.kernels import full, summary, tuned

    if name.startswith("kernels-gpu"):
        return tuned(document, brief=name.endswith("-summary"))
    measured = [path for path in map(results.joinpath, GPU_OPS) if path.exists()]
    speeds = json.loads(measured[0].read_text()) if measured else None
    return summary(document, speeds) if name.endswith("-summary") else full(document)


def _foreseen(row: Row) -> list[str]:
    """What was planned, what the call alone took, and how the plan compares."""
    return [
        bytes_text(row["planned_bytes"]),
        times_text(row["planned_over_peak"]),
        bytes_text(row["rise_bytes"]),
        times_text(row["planned_over_rise"]),
    ]


def aligned(header: str, rows: list[list[str]]) -> list[str]:
    """A table; columns named "model", "method" or with a colon behind are flush left."""
    names = header.split(", ")
    left = [name in ("model", "method") or name.endswith(":") for name in names]
    lines = [[name.rstrip(":") for name in names], *rows]
    found = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [found[0], "|" + "|".join("---" if one else "---:" for one in left) + "|", *found[1:]]


def _ratio(row: Row, other: str, kind: str) -> str:
    """What another contender took over what this row takes."""
    return times_text(row["against"].get(other, {}).get(kind))


def caption(about: dict[str, Any]) -> str:
    return (
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, captum "
        f"{about['captum']}, {about['date']}; `{about['command']}`."
    )


def notes(document: dict[str, Any]) -> list[str]:
    """What the columns mean."""
    lines = [
        "Medians of interleaved calls; spread is (slowest - fastest) / median. Against Captum: its "
        "time as documented over this one's, so above 1 is faster. Peak memory is over the level "
        "right after the model was built. Error is relative L2 in float64: of the gradient and of "
        "IG against the same points, so rounding; of SmoothGrad against many more samples, so "
        "sampling (ours draws antithetic pairs, the others independent samples)."
    ]
    samples = {
        f"{row['workload']} {row['reference_samples']}"
        for row in document["rows"]
        if row.get("reference_samples")
    }
    if samples:
        lines.append(f"Samples of the SmoothGrad references: {', '.join(sorted(samples))}.")
    return lines


def model_text(row: Row) -> str:
    return f"{row['workload']} {'x'.join(map(str, row['shape']))}"


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _spread(row: Row) -> str:
    if row["seconds"] is None:
        return "-"
    if row["rounds"] < 2:
        return "1 call"
    return f"{(row['slowest'] - row['fastest']) / row['seconds']:.0%}"


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _against(ours: Row, other: Row | None) -> str:
    """The other's time, and how many times faster ours is."""
    if other is None or other["seconds"] is None:
        return other["reason"] or "-" if other else "-"
    if ours["seconds"] is None:
        return time_text(other["seconds"])
    return f"{time_text(other['seconds'])} ({other['seconds'] / ours['seconds']:.2f}x)"


def bytes_text(count: int | None) -> str:
    if count is None:
        return "-"
    mebi = count / 2**20
    return f"{mebi / 1024:.1f} GiB" if mebi >= 1024 else f"{mebi:.3g} MiB"


def error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value < 0.01 else f"{value:.3f}"


def table(name: str, results: Path = RESULTS) -> str:
    """The table of a marker, or that it is not measured yet."""
    stem = name.removesuffix("-summary")
    path = results / f"{stem}.json"
    if stem == "ops-gpu":
        path = next((p for p in map(results.joinpath, GPU_OPS) if p.exists()), path)
    if not path.exists():
        return NOT_MEASURED + "\n"
    document = json.loads(path.read_text())
    if stem.startswith("kernels"):
        return kernels(name, document, results)
    if stem.startswith("ops-"):
        return ops(document)
    if stem.startswith("lean-"):
        return lean(document)
    short = stem.removesuffix("-cpu").removesuffix("-gpu")
    # Rows of a GPU are races of one run, in their own order.
    short = "gpu" if stem == "end-to-end-gpu" else short
    if short == "gpu" or short in OWN_TABLES:
        module = import_module(f"benchmarks.{short.replace('-', '_')}")
        found: str = (module.summary if name.endswith("-summary") else module.table)(document)
        return found
    return summary(document) if name.endswith("-summary") else full(document)


def splice(text: str, results: Path = RESULTS) -> str:
    """`text` with the table of every marker between its two lines."""

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- benchmark:{name} -->\n{table(name, results)}<!-- /benchmark:{name} -->"

    pattern = r"<!-- benchmark:(?P<name>[\w-]+) -->.*?<!-- /benchmark:(?P=name) -->"
    return re.sub(pattern, filled, text, flags=re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """README and what lies under docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="README.md and docs/*.md, unless given")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where stale")
    options = parser.parse_args()
    stale = []
    for path in options.files or pages():
        before = path.read_text()
        after = splice(before)
        if after != before and options.check:
            stale.append(path.name)
        elif after != before:
            path.write_text(after)
    if stale:
        sys.exit(f"{', '.join(stale)}: stale tables; run `python -m benchmarks.tables`")


if __name__ == "__main__":
    main()
