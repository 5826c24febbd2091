"""Sixty networks written by others, against Captum: `python -m benchmarks.real_models`.

    pip install -e ".[benchmark,real-models]"       what it needs
    python -m benchmarks.real_models                about forty minutes on two cores
    python -m benchmarks.real_models --only timm    networks whose name matches a pattern

IG-32 of every network of `benchmarks.real_networks`, each contender in an interpreter that fails
alone: first and later calls, peak memory, and maps against Captum's at equal nodes and, in
float64, against a loop of plain autograd. Then, where `IntegratedGradients(rule="adaptive")`
exists, the time that a map as good as Captum's takes.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.first_call import interval, options_of, summarised
from benchmarks.fresh import CAPTUM, OURS, ContenderError, Fresh, Shown, Work, compare
from benchmarks.real_networks import NETWORKS
from benchmarks.reference import relative_error
from benchmarks.tables import aligned, bytes_text, caption, error_text, time_text, times_text

FEW = f"{CAPTUM}, 4 at a time"
NAMES = (OURS, FEW, CAPTUM)
STEPS, EXACT_STEPS, MANY = 32, 3, 512
ADAPTIVE_STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tried one after the other until the map is as good as Captum's."""
LIBRARIES = ("torchvision", "timm", "transformers", "monai", "segmentation-models-pytorch")
RATIOS = {
    "steady, 4 at a time": (FEW, "steady", 1.5, 0.95),
    "steady, as documented": (CAPTUM, "steady", 1.5, 0.95),
    "equal map error": ("equal_error", "times", 2.5, 0.9),
    "first call, 4 at a time": (FEW, "first", 1.0, 0.8),
    "first call, as documented": (CAPTUM, "first", 1.0, 0.8),
    "peak memory, 4 at a time": (FEW, "peak_bytes", 1.0, 1.0),
    "peak memory, as documented": (CAPTUM, "peak_bytes", 1.0, 1.0),
}
"""Of Captum's seconds or bytes over ours: the contender, the measure, and what the geometric mean
and every network should reach."""
TOLERANCES = {"map_error": 2e-2, "float64_error": 1e-8}
"""From which a map is listed as wrong; float32 rounding moves kinks of random networks."""


def measure(
    *,
    only: str = "",
    limit: int | None = None,
    rounds: int = 1,
    threads: int | None = None,
    equal_error: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The document of a run: a row per network."""
    from benchmarks.end_to_end import machine

    threads = threads or os.cpu_count() or 1
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    for name in [name for name in NETWORKS if re.search(only, name)][:limit]:
        rows.append(_row(name, rounds, threads, equal_error=equal_error and adaptive()))
        say(f"{time.perf_counter() - begun:5.0f} s  {_brief(rows[-1])}")
    about = machine("cpu") | {"threads": threads, "rounds": rounds, "libraries": {}}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            about["libraries"][library] = version(library)
    about["seconds_taken"] = round(time.perf_counter() - begun)
    return {"setting": about, "rows": rows}


def adaptive() -> bool:
    """Whether Integrated Gradients can place their nodes where the integrand changes."""
    import saliency_fast as sf
    from saliency_fast.errors import SaliencyError

    try:
        sf.IntegratedGradients(steps=8, rule="adaptive")
    except SaliencyError:
        return False
    return True


def _row(name: str, rounds: int, threads: int, *, equal_error: bool) -> dict[str, Any]:
    """Every measurement of a network."""
    method = "integrated_gradients"
    work = Work(name, method=method, points=STEPS, source="benchmarks.real_networks")
    row: dict[str, Any] = {"network": name, "shape": list(NETWORKS[name].shape)}
    found: dict[str, list[Shown]] = {one: [] for one in NAMES}

    def after(runners: Mapping[str, Fresh]) -> None:
        """Once per network, in processes that have been timed."""
        if "float64_error" in row:
            return
        row["float64_error"] = None
        # In a process where ours has not run, so that nothing is known of the network.
        runner = runners.get(FEW) or runners.get(CAPTUM)
        try:
            row["float64_error"] = runner and runner.ask("exactness", EXACT_STEPS)
        except ContenderError as failed:
            row["float64_reason"] = str(failed)
        if equal_error and OURS in runners and FEW in runners:
            row["equal_error"] = _equal_error(runners)

    for number in range(rounds):
        turn = number % len(NAMES)
        shown = compare(work, NAMES[turn:] + NAMES[:turn], threads, after=after)
        for one, several in found.items():
            several.append(shown[one])
    reference = next((one.values for one in found[FEW] if one.values is not None), None)
    about = None if reference is None else torch.from_numpy(reference)
    row["contenders"] = {one: summarised(several, about) for one, several in found.items()}
    row["map_error"] = row["contenders"][OURS]["error"]
    row["strategy"] = row["contenders"][OURS]["strategy"]
    return row


def _equal_error(runners: Mapping[str, Fresh]) -> dict[str, Any]:
    """Steps and seconds of the adaptive rule for a map as good as Captum's of 32 steps."""
    try:
        found = runners[OURS].ask("integrate", MANY, "midpoint")
        reference = torch.from_numpy(found[0])
        captum = runners[FEW].ask("first")
        captum_error = relative_error(torch.from_numpy(captum.values), reference)
        for steps in ADAPTIVE_STEPS:
            values, seconds = runners[OURS].ask("integrate", steps, "adaptive")
            error = relative_error(torch.from_numpy(values), reference)
            if error <= captum_error:
                break
        theirs = min(runners[FEW].ask("repeat", 3, 3.0))
    except ContenderError as failed:
        return {"reason": str(failed)}
    about = {"steps": steps, "seconds": seconds, "error": error, "captum_error": captum_error}
    return about | {"times": theirs / seconds if error <= captum_error else None}


def _times(row: dict[str, Any], against: str, key: str) -> float | None:
    """Captum's measure over ours."""
    if against == "equal_error":
        found: float | None = row.get("equal_error", {}).get("times")
        return found
    ours, theirs = row["contenders"][OURS][key], row["contenders"][against][key]
    return theirs / ours if ours and theirs else None


def _brief(row: dict[str, Any]) -> str:
    """One line for whoever waits."""
    times = [times_text(_times(row, *of[:2])) for of in RATIOS.values()]
    errors = [error_text(row[name]) for name in TOLERANCES]
    reasons = [f"{name}: {one}" for name, one in _reasons(row)]
    return "; ".join([row["network"], " ".join(times), " ".join(errors), row["strategy"], *reasons])


def _reasons(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(contender, why it has no numbers)."""
    failed = [(name, one["reason"]) for name, one in row["contenders"].items() if one["reason"]]
    exact = row.get("float64_reason")
    return failed + ([("float64", exact)] if exact else [])


def summary(document: dict[str, Any]) -> str:
    """Geometric means and minima of every ratio, and the networks that are behind."""
    cells = []
    for name, (against, key, mean, least) in RATIOS.items():
        found = {row["network"]: _times(row, against, key) for row in document["rows"]}
        ratios = {network: ratio for network, ratio in found.items() if ratio}
        if not ratios:
            continue
        worst = sorted(ratios, key=lambda network: ratios[network])
        under = [f"{one} {ratios[one]:.2f}" for one in worst if ratios[one] < least]
        center, low, high = interval(list(ratios.values()))
        text = f"{center:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low else "")
        cells.append(
            [
                name, str(len(ratios)), text, f"{mean:g}", f"{ratios[worst[0]]:.2f}", f"{least:g}",
                str(sum(ratio < 0.95 for ratio in ratios.values())),
                str(sum(ratio < 0.8 for ratio in ratios.values())), ", ".join(under) or "-",
            ]
        )  # fmt: skip
    header = (
        "Captum over ours:, networks, geometric mean, goal, least, goal, under 0.95, under 0.8, "
        "under the goal:"
    )
    lines = [
        caption(document["setting"]),
        "",
        *aligned(header, cells),
        "",
        *(f"- {line}" for line in _failures(document["rows"])),
        "",
        f"IG-{STEPS} of one example, random weights, fresh processes that take turns; intervals "
        "are over networks. Equal map error: the fewest steps of the adaptive rule whose map is as "
        f"near to {MANY} points as Captum's of {STEPS} steps.",
    ]
    return "\n".join(lines) + "\n"


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Calls that gave nothing, and maps that are wrong."""
    found = [f"{row['network']}, {name}: {why}" for row in rows for name, why in _reasons(row)]
    for name, most in TOLERANCES.items():
        for row in rows:
            error = row[name]
            if error is not None and (error > most or math.isnan(error)):
                found.append(f"{row['network']}: {name.replace('_', ' ')} {error:.1e}")
    return found or ["Every call gave a map, and no map is wrong."]


def table(document: dict[str, Any]) -> str:
    """The summary, and a line per network."""
    cells = []
    for row in document["rows"]:
        ours = row["contenders"][OURS]
        cells.append(
            [
                f"{row['network']} {'x'.join(map(str, row['shape']))}",
                ours["reason"] or time_text(ours["steady"]), time_text(ours["first"]),
                bytes_text(ours["peak_bytes"]), bytes_text(ours["resident_bytes"]),
                *(times_text(_times(row, *of[:2])) for of in RATIOS.values()),
                error_text(row["map_error"]), error_text(row["float64_error"]), row["strategy"],
            ]
        )  # fmt: skip
    header = ", ".join(
        ["network:, steady, first, peak memory, resident after"]
        + [name.replace(", ", " ") for name in RATIOS]
        + ["error to Captum, error in float64, strategy:"]
    )
    lines = [
        summary(document),
        *aligned(header, cells),
        "",
        "Errors are relative L2: of the float32 map to Captum's at equal nodes, and in float64 of "
        f"two examples and {EXACT_STEPS} steps to a loop of plain autograd.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    from benchmarks.end_to_end import RESULTS, save

    parser = options_of(__doc__, "two networks, to see that it works")
    parser.add_argument("--limit", type=int, help="the first so many networks")
    parser.add_argument("--no-equal-error", action="store_true", help="leave out the adaptive rule")
    options = parser.parse_args()
    limit = 2 if options.quick else options.limit
    document = measure(
        only=options.only,
        limit=limit,
        rounds=options.rounds or 1,
        threads=options.threads,
        equal_error=not options.no_equal_error,
        say=lambda line: print(line, flush=True),
    )
    out = options.out or (None if options.only or limit else RESULTS)
    if out is not None:
        save(document, table(document), out, "real-models-cpu")
    print(table(document))


if __name__ == "__main__":
    main()
