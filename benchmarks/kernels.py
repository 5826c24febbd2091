"""The GPU kernels one by one: what the compilers make of them, and which configuration is fastest.

    python -m benchmarks.kernels            compiles all of them for every target, without a GPU
    python -m benchmarks.kernels --tune     times candidate configurations, and Triton against
                                            CUDA C++, on the GPU of this machine

The first writes benchmarks/results/kernels.json and .md, the second kernels-gpu.json and .md.
Nothing is searched at run time: kernels/configurations.py holds what was chosen.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured yet"
OPS_OF_CUDA = {
    "noise_points": "noise_points",
    "select": "magnitude_percentile",
    "rectify": "relu_mask",
    "gradient": "relu_mask_backward",
    "pack": "pack_mask",
    "pack_numbers": "pack_mask",
}
"""The op of each kernel in csrc/cuda."""
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "unsigned int": "float32",
    "unsigned long": "float64",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
}
_SHOWN = ("float32", "int64", "bool")
_SHOWN_CUDA = ("noise_points<float, true>", "select<unsigned int>", "rectify<float, none>",
               "gradient<float, none>", "pack")  # fmt: skip

Row = dict[str, Any]


def bytes_per_element(op: str, width: int) -> float:
    """What a perfect kernel moves in the benchmark's call, over its largest tensor's elements."""
    from benchmarks.tuning import call_for

    call = call_for(op, width, "meta")
    out = call.op(*call.args)
    returned = (out,) if isinstance(out, Tensor) else out or ()
    tensors = [value for value in (*call.args, *returned) if isinstance(value, Tensor)]
    found: float = call.op.moved(*call.args) / max(tensor.numel() for tensor in tensors)
    return round(found, 3)


def triton_rows(kernel: str | None = None) -> list[Row]:
    """One row per specialisation and target, of all kernels or of one."""
    from benchmarks.compiled import LIMITS, of_triton, resident_warps
    from benchmarks.specialisations import TARGETS, specialisations
    from benchmarks.tuning import OP_OF

    rows = []
    for special in specialisations():
        if kernel not in (None, special.key):
            continue
        op = OP_OF[special.key]
        counted = bytes_per_element(op, special.width)
        for target in TARGETS:
            chosen = special.configuration(target)
            counters = of_triton(special.compiled(target))
            held = resident_warps(counters, chosen.warps, target)
            rows.append(
                {"language": "Triton", "kernel": special.key, "variant": special.name, "op": op,
                 "dtype": special.dtype, "bytes_per_element": counted, "target": target,
                 **vars(chosen), **vars(counters), "resident_warps": held,
                 "most_warps": LIMITS[target].warps}
            )  # fmt: skip
    return rows


def cuda_rows() -> list[Row]:
    """One row per kernel in csrc/cuda, its template arguments, and target."""
    from benchmarks import compiled

    rows = []
    for source in compiled.SOURCES:
        warps = compiled.threads_of(source) // 32
        elements = 32 * warps * compiled.ELEMENTS_OF_A_THREAD[source.stem]
        for arch in compiled.ARCHES:
            target = f"sm_{arch}"
            for name, counters in sorted(compiled.of_source(source, arch).items()):
                op = OPS_OF_CUDA[name.split("<")[0]]
                argument = re.search(r"<([\w ]+)", name)
                dtype = _DTYPES[argument.group(1)] if argument else "bool"
                width = int(getattr(torch, dtype).itemsize)
                held = compiled.resident_warps(counters, warps, target)
                rows.append(
                    {"language": "CUDA C++", "kernel": source.name, "variant": name, "op": op,
                     "dtype": dtype, "bytes_per_element": bytes_per_element(op, width),
                     "target": target, "elements": elements, "warps": warps, "ahead": 1,
                     "tiles": 1, **vars(counters), "resident_warps": held,
                     "most_warps": compiled.LIMITS[target].warps}
                )  # fmt: skip
    return rows


def reasons() -> dict[str, dict[str, str]]:
    """Why each kernel is cut as it is, and on which GPU that was timed."""
    from saliency_fast.kernels.configurations import TABLE

    from benchmarks.compiled import SOURCES

    found = {name: {"reason": c.reason, "timed": c.timed} for name, c in TABLE.items()}
    for source in SOURCES:
        comment = re.match(r"(?://.*\n)+", source.read_text())
        text = re.sub(r"\s*//\s*", " ", comment.group(0)).strip() if comment else ""
        found[source.name] = {"reason": text.partition(": ")[2].rstrip("."), "timed": ""}
    return found


def setting() -> dict[str, str]:
    """Which compilers the counters come from."""
    import triton

    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    return {
        "triton": triton.__version__,
        "nvcc": version.group(1) if version else said,
        "command": "python -m benchmarks.kernels",
    }


def summary(document: dict[str, Any], measured: dict[str, Any] | None = None) -> str:
    """One line per kernel, in float32; `measured` is what `benchmarks.ops` wrote of a GPU."""
    lines = [
        caption(document["setting"]),
        "",
        "| op | kernel | bytes an element | bandwidth | elements | warps | registers | spills "
        "| resident warps | why |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    shown = [
        row
        for row in document["rows"]
        if row["variant"] in _SHOWN_CUDA or (row["language"] == "Triton" and row["dtype"] in _SHOWN)
    ]
    chosen: dict[str, list[Row]] = {}
    for row in shown:
        # Of a kernel's variants, the first.
        name = row["kernel"] if row["language"] == "Triton" else row["variant"]
        if not chosen.get(name) or chosen[name][0]["variant"] == row["variant"]:
            chosen.setdefault(name, []).append(row)
    speeds = _speeds(measured, {row["op"] for row in shown if row["language"] == "CUDA C++"})
    for name, rows in chosen.items():
        one = rows[0]
        why = document["reasons"][one["kernel"]]
        cells = [
            f"`{one['op']}`",
            f"`{name}`, {one['language']}",
            f"{one['bytes_per_element']:.4g}",
            speeds.get((one["op"], one["language"]), NOT_MEASURED),
            _elements(rows),
            _each(rows, lambda row: row["warps"]),
            _each(rows, lambda row: row["registers"]),
            _each(rows, lambda row: sum(row["local"].values())),
            _each(rows, _resident),
            why["reason"] + (f" (timed on {why['timed']})" if why["timed"] else ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes()]) + "\n"


def full(document: dict[str, Any]) -> str:
    """Every kernel, type and target."""
    lines = [
        "| kernel | variant | type | bytes an element | elements | warps | registers | spills "
        "| shared bytes | resident warps | widest load, store |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by: dict[tuple[str, str], list[Row]] = {}
    for row in document["rows"]:
        by.setdefault((row["kernel"], row["variant"]), []).append(row)
    for (kernel, variant), rows in by.items():
        cells = [
            f"`{kernel}`",
            f"`{variant}`",
            rows[0]["dtype"],
            f"{rows[0]['bytes_per_element']:.4g}",
            _elements(rows),
            _each(rows, lambda row: row["warps"]),
            _each(rows, lambda row: row["registers"]),
            _each(rows, lambda row: sum(row["local"].values())),
            _each(rows, lambda row: row["shared"]),
            _each(rows, _resident),
            _each(rows, lambda row: f"{row['load']}, {row['store']}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def caption(about: dict[str, str]) -> str:
    return (
        f"Compiled, not timed: Triton {about['triton']} for sm_80, sm_90, sm_100 and gfx942, nvcc "
        f"{about['nvcc']} for sm_80 and sm_90; `{about['command']}`."
    )


def notes() -> list[str]:
    """What the columns mean."""
    return [
        "Numbers of several targets stand in their order where they differ. Bytes are what a "
        "perfect kernel moves in the benchmark's call, over the elements of its largest tensor; "
        "bandwidths and copies are those of `make bench-gpu`. Elements are those of a "
        "program's tile; rows have their loads in flight together. Spills are all that is kept "
        "outside of registers: bytes of stack and local memory, on AMD also spilled registers. "
        "Resident warps are the most that a multiprocessor can hold with these registers and this "
        "shared memory, of those it has places for."
    ]


def _elements(rows: list[Row]) -> str:
    found = _each(rows, lambda row: row["elements"])
    tiles, ahead = (_each(rows, lambda row, name=name: row[name]) for name in ("tiles", "ahead"))
    return found + (f"; {tiles} tiles" if tiles != "1" else "") + (
        f"; {ahead} rows" if ahead != "1" else "")  # fmt: skip


def _resident(row: Row) -> str:
    return f"{row['resident_warps'] / row['most_warps']:.0%}"


def _each(rows: list[Row], of: Any) -> str:
    """What the targets have, once where they agree."""
    found = [str(of(row)) for row in rows]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def _speeds(measured: dict[str, Any] | None, both: set[str]) -> dict[tuple[str, str], str]:
    """Bandwidth and share of a copy of an op's first size, by the language dispatched to."""
    if measured is None:
        return {}
    names = {"cuda": "CUDA C++", "triton": "Triton"}
    words = measured["setting"]["backends"]["cuda"].removesuffix(" kernels").split(" and ")
    found: dict[tuple[str, str], str] = {}
    for row in (one for one in measured["rows"] if not one.get("reason")):
        language = names.get(words[0] if row["op"] in both else words[-1])
        if language is not None:
            speed = f"{row['gigabytes_per_second']:.0f} GB/s, {row['share_of_copy']:.0%} of a copy"
            found.setdefault((row["op"], language), speed)
    return found


def tuned(document: dict[str, Any], *, brief: bool = False) -> str:
    """What was timed on a GPU: the candidates of each kernel, then Triton against CUDA C++.

    `brief` leaves out the candidates that are neither checked in nor to be.
    """
    from benchmarks.tuning import winner

    about = document["setting"]
    lines = [
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}; "
        f"`{about['command']}`. Medians of interleaved calls; the first candidate is checked in."
    ]
    for part, name, title in (("tune", "kernel", "configuration"), ("versus", "op", "version")):
        lines += [
            "",
            f"| {name} | bytes of an element | size | {title} | time | share of a copy | |",
            "|---|---:|---|---|---:|---:|---|",
        ]
        races: dict[tuple[str, int], list[Row]] = {}
        for row in document["rows"]:
            if row["part"] == part:
                races.setdefault((row[name], row["width"]), []).append(row)
        for (of, width), rows in races.items():
            best = winner(rows) if part == "tune" else max(rows, key=lambda row: row["fastest"])
            few = [row for row in rows if row is rows[0] or row is best]
            for row in few if brief and part == "tune" else rows:
                time, share = "-", "-"
                if row["seconds"] is not None:
                    time, share = f"{row['seconds'] * 1e6:.1f} us", f"{row['share_of_copy']:.0%}"
                kept = "to be kept" if row is best else ""
                cells = [f"`{of}`", str(width), row["size"], row["label"], time, share]
                lines.append("| " + " | ".join([*cells, row["refused"] or kept]) + " |")
    return "\n".join(lines) + "\n"


def save(document: dict[str, Any], text: str, stem: Path) -> None:
    """JSON, a row to a line, and Markdown."""
    head = {key: value for key, value in document.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row) for row in document["rows"])
    stem.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps(head, indent=1).removesuffix("\n}")
    stem.with_suffix(".json").write_text(f'{body},\n "rows": [\n{rows}\n]\n}}\n')
    stem.with_suffix(".md").write_text(text)


def tune_all(kernels: str) -> dict[str, Any]:
    """Rows of every kernel whose name holds `kernels`, and of such ops in two languages."""
    import triton
    from saliency_fast.kernels.configurations import target_of

    from benchmarks.specialisations import specialisations
    from benchmarks.timing import CudaTimer
    from benchmarks.tuning import VERSUS, tune, versus, winner

    device, timer = "cuda", CudaTimer()
    target = target_of(torch.device(device, torch.cuda.current_device()))
    rows: list[Row] = []
    pairs = dict.fromkeys((one.key, one.width) for one in specialisations())
    for kernel, width in (pair for pair in pairs if kernels in pair[0]):
        found = tune(kernel, width, target, device, timer)
        print(f"{kernel}, {width} bytes: {winner(found)['label']}", flush=True)
        rows += found
    for op, widths in VERSUS.items():
        if kernels in op:
            rows += [row for width in widths for row in versus(op, width, device, timer)]
    about = {"device": torch.cuda.get_device_name(), "target": target,
             "torch": torch.__version__, "triton": triton.__version__,
             "command": "python -m benchmarks.kernels --tune"}  # fmt: skip
    return {"setting": about, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time candidates on this GPU")
    parser.add_argument("--kernel", default="", help="with --tune: only names that hold this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    options = parser.parse_args()
    if options.tune:
        if not torch.cuda.is_available():
            parser.error("--tune times kernels on a GPU, and PyTorch sees none here "
                         "(torch.cuda.is_available() is False)")  # fmt: skip
        document = tune_all(options.kernel)
        save(document, tuned(document), options.out / "kernels-gpu")
        print(tuned(document))
        return
    document = {"setting": setting(), "reasons": reasons(), "rows": triton_rows() + cuda_rows()}
    text = summary(document) + "\nEvery type and variant:\n\n" + full(document)
    save(document, text, options.out / "kernels")
    print(summary(document))
    spilled = [row["variant"] for row in document["rows"] if any(row["local"].values())]
    if spilled:
        sys.exit(f"these spill: {', '.join(spilled)}")


if __name__ == "__main__":
    main()
