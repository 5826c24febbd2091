"""A report as the evaluation page of `render`: tables, curves, maps and protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast.evaluate.metric import GROUPS, entry_of, field_meanings
from saliency_fast.evaluate.outcome import Interval
from saliency_fast.evaluate.reports.data import MAPS, ReportData
from saliency_fast.evaluate.reports.export import as_json, make_folder, plain, plot_of, write_curves
from saliency_fast.evaluate.reports.text import (
    interval_text,
    plural,
    spelled,
    unmeasured,
    verdict_of,
    verdicts,
)
from saliency_fast.render.files import encode
from saliency_fast.render.frames import frames, grey, picture
from saliency_fast.render.html import Figure
from saliency_fast.render.pages import (
    Cell,
    Evaluation,
    Matrix,
    MetricSection,
    Table,
    TableRow,
    ThemedPlot,
    evaluation_html,
)
from saliency_fast.render.plots import CURE, Plot, have_plots, plot_png

NO_CURVES = f"This page has no curves: matplotlib is not installed. To have them, {CURE}."
SHOWN = 4
"""Examples on the page."""
PERCENTILE, OPACITY = 99.0, 0.85
"""Of the maps over the inputs."""
_FACTS = {
    "model": "model",
    "weights_sha256": "weights SHA-256",
    "inputs_sha256": "inputs SHA-256",
    "shape": "inputs",
    "target": "target",
    "baseline": "baseline",
}


def page(report: ReportData, command: str = "") -> str:
    """The page as one HTML document. command: what makes it again."""
    plotted = have_plots()
    has_curves = any(one.curve for found in report.outcomes.values() for one in found.values())
    pictured = report.inputs.dim() in (4, 5) and bool(report.maps)
    samples = range(min(SHOWN, len(report.inputs))) if pictured else ()
    tables = [_means(report)]
    if len(report.methods) > 1:
        tables.append(_comparisons(report))
    controls = len(report.controls)
    beside = f", beside {plural(controls, 'control')} that ignore the model" if controls else ""
    lead = (
        f"{plural(len(report.methods), 'method')} evaluated by "
        f"{plural(len(report.metrics), 'metric')} on {plural(len(report.inputs), 'example')} shown "
        f"to the model {report.provenance['model'].rpartition('.')[2]}{beside}."
    )
    return evaluation_html(
        Evaluation(
            title=report.title,
            lead=lead,
            verdicts=tuple(verdicts(report)),
            tables=tuple(tables),
            samples=tuple((_example(report, row), _figures(report, row)) for row in samples),
            metrics=tuple(_described(report, metric, plotted) for metric in report.metrics),
            matrices=_matrices(report),
            unmeasured=tuple(unmeasured(report)),
            caveats=report.caveats,
            notes=(NO_CURVES,) if has_curves and not plotted else (),
            facts=_facts(report),
            command=command,
        )
    )


def save(report: ReportData, folder: Path, command: str = "") -> list[Path]:
    """Writes index.html, report.json and, with matplotlib, curves/*.png; returns the paths."""
    make_folder(folder)
    html, numbers = folder / "index.html", folder / "report.json"
    html.write_text(page(report, command), encoding="utf-8")
    numbers.write_text(as_json(report), encoding="utf-8")
    curves = write_curves(report, folder / "curves") if have_plots() else []
    return [html, numbers, *curves]


def _all_spelled(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(spelled(name) for name in names)


def _means(report: ReportData) -> Table:
    groups = []
    for group, question in GROUPS.items():
        lines = tuple(
            TableRow(
                *(spelled(metric), one.better),
                tuple(_cell(report, name, metric) for name in report.names),
            )
            for metric, one in report.metrics.items()
            if entry_of(one, metric).group == group
        )
        if lines:
            groups.append((f"{group.capitalize()}: {question}", lines))
    return Table(
        "Means",
        f"Means over examples; below them their {100.0 * report.confidence:g} % bootstrap "
        "intervals. Arrows point to better; a star marks the best method. Controls do not "
        "compete: a good map beats them.",
        (("methods", _all_spelled(report.methods)), ("controls", _all_spelled(report.controls))),
        tuple(groups),
    )


def _cell(report: ReportData, name: str, metric: str) -> Cell:
    interval = report.interval(name, metric)
    if interval is None:
        why = [
            one.why
            for one in report.unmeasured
            if one.method == name and one.metric in (metric, MAPS)
        ]
        return Cell("", why=why[0] if why else "not measured")
    mean, ends = interval_text(interval)
    best = report.best(metric) == name and len(report.methods) > 1
    passed = report.outcomes[name][metric].passed
    if passed is None:
        return Cell(mean, ends, best=best)
    # A control is expected to fail.
    good = "soft" if name in report.controls else "good"
    kind = good if passed != (name in report.controls) else "bad"
    return Cell(mean, ends, "PASS" if passed else "FAIL", kind, best)


def _comparisons(report: ReportData) -> Table:
    first, gaps = report.methods[0], report.comparisons()
    lines = tuple(
        TableRow(
            *(spelled(metric), one.better),
            tuple(_gap(found.get(metric), one.better) for found in gaps.values()),
        )
        for metric, one in report.metrics.items()
        if any(metric in found for found in gaps.values())
    )
    count = sum(len(found) for found in gaps.values())
    chance = (1.0 - report.confidence) * count
    return Table(
        f"Against {spelled(first)}",
        f"How much larger the mean is than that of {spelled(first)} on the same examples, "
        f"with the {100.0 * report.confidence:g} % bootstrap interval of the paired differences. "
        f"Of these {count} comparisons about {chance:.2g} would exclude zero by chance alone.",
        (("methods", _all_spelled(gaps)),),
        (("", lines),),
    )


def _gap(gap: Interval | None, better: str) -> Cell:
    if gap is None:
        return Cell("", why="not measured for both")
    mean, ends = interval_text(gap)
    verdict = verdict_of(gap, better)
    kind = {"better": "good", "worse": "bad"}.get(verdict, "")
    return Cell(f"+{mean}" if gap.mean > 0 else mean, ends, verdict if kind else "", kind)


def _described(report: ReportData, metric: str, plotted: bool) -> MetricSection:
    made = report.metrics[metric]
    entry, meanings = entry_of(made, metric), field_meanings(type(made))
    outcomes = {name: found[metric] for name, found in report.outcomes.items() if metric in found}
    options: dict[str, dict[str, list[str]]] = {}
    caveats: dict[str, list[str]] = {}
    for row, one in outcomes.items():
        values = {name: _text(value) for name, value in one.parameters.items()}
        if one.threshold is not None:
            values["threshold of the verdict"] = f"{one.threshold:.4g}"
        for name, value in values.items():
            options.setdefault(name, {}).setdefault(value, []).append(spelled(row))
        for caveat in one.caveats:
            if caveat not in report.caveats:
                caveats.setdefault(caveat, []).append(spelled(row))
    plot = plot_of(report, metric) if plotted else None
    seconds = sum(found.get(metric, 0.0) for found in report.seconds.values())
    return MetricSection(
        name=spelled(metric),
        better=made.better,
        group=entry.group,
        asks=entry.asks,
        paper=entry.paper,
        parameters=tuple(
            (name, _by_row(rows), meanings.get(name, "")) for name, rows in options.items()
        ),
        caveats=tuple(
            caveat if len(rows) == len(outcomes) else f"{', '.join(rows)}: {caveat}"
            for caveat, rows in caveats.items()
        ),
        seconds=f"{seconds:.3g} s for {plural(len(outcomes), 'row')} of the table",
        plot=None if plot is None else _drawn(plot, report.confidence),
    )


def _by_row(rows: dict[str, list[str]]) -> str:
    """A value that all rows share, or each value with its rows."""
    if len(rows) == 1:
        return next(iter(rows))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in rows.items())


def _drawn(plot: Plot, confidence: float) -> ThemedPlot:
    """The plot for light and dark pages, and its description."""
    ends = "; ".join(
        f"{spelled(band.name)} goes from {band.mean[0]:.3g} to {band.mean[-1]:.3g}, in the"
        f" middle {band.mean[len(band.mean) // 2]:.3g}"
        for band in plot.bands
    )
    alt = (
        f"{plot.title}: mean {plot.y_name} over {plot.x_name}, with {100.0 * confidence:g} % "
        f"bootstrap bands. {ends}."
    )
    return ThemedPlot(plot_png(plot, "light"), plot_png(plot, "dark"), alt)


def _matrices(report: ReportData) -> tuple[Matrix, ...]:
    """The square matrices of the agreement that hold a number."""
    if report.agreement is None:
        return ()
    found = plain(report.agreement)
    names = _all_spelled(found["names"])
    matrices = []
    for name, rows in found.items():
        square = isinstance(rows, list) and len(rows) == len(names)
        if square and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            values = tuple(tuple(math.nan if v is None else float(v) for v in row) for row in rows)
            if any(not math.isnan(value) for row in values for value in row):
                matrices.append(Matrix(spelled(name), names, values))
    return tuple(matrices)


def _example(report: ReportData, row: int) -> str:
    title = f"Example {row}"
    if report.classes is not None and report.classes.dim() == 1:
        number = int(report.classes[row])
        title += f": {report.labels.get(number, f'class {number}')}"
    at = slice_of(report, row)
    if at is not None:
        title += f", slice {at + 1} of {report.inputs.shape[2]}, where the maps are strongest"
    return title


def slice_of(report: ReportData, row: int) -> int | None:
    """Of a volume, the slice along its first axis (of a clip: the frame) with the most magnitude,
    to which each method contributes equally; None for pictures.
    """
    if report.inputs.dim() != 5:
        return None
    names = [name for name in report.methods if name in report.maps] or list(report.maps)
    held = [
        report.maps[name][row].detach().double().cpu().abs().flatten(1).sum(1) for name in names
    ]
    shares = [one / one.sum().clamp_min(1e-300) for one in held]
    return int(torch.stack(shares).sum(0).argmax())


def _figures(report: ReportData, row: int) -> tuple[Figure, ...]:
    """An input and every map over it; of a volume one slice, on the scale of all of it."""
    x = report.inputs[row : row + 1].detach().float().cpu()
    at = slice_of(report, row)
    box = _box(report, row, at)

    def figure(drawn: Tensor, alt: str, caption: str) -> Figure:
        drawn = drawn if at is None else drawn[at]
        return Figure(encode(drawn, ".png"), "image/png", drawn.shape[1], alt, caption, box)

    figures = [figure(picture(x)[0], f"input {row}", "input")]
    for name, maps in report.maps.items():
        shown = maps[row : row + 1].detach().float().cpu()
        drawn = frames(grey(x), shown, "signed", PERCENTILE, OPACITY)[0]
        figures.append(figure(drawn, f"map by {spelled(name)} over input {row}", spelled(name)))
    return tuple(figures)


def _box(report: ReportData, row: int, at: int | None) -> tuple[float, float, float, float] | None:
    """The corners of the object's mask, as shares of the picture; None in slices without it."""
    if report.boxes is None:
        return None
    mask = report.boxes[row] if at is None else report.boxes[row][at]
    inside = mask.nonzero()
    if not len(inside):
        return None
    height, width = mask.shape
    (top, left), (bottom, right) = inside.amin(0).tolist(), (inside.amax(0) + 1).tolist()
    return left / width, top / height, (right - left) / width, (bottom - top) / height


def _facts(report: ReportData) -> tuple[tuple[str, str], ...]:
    past = report.provenance
    total = sum(sum(found.values()) for found in report.seconds.values())
    explained = sum(found.get(MAPS, 0.0) for found in report.seconds.values())
    return (
        *((text, _text(past[name])) for name, text in _FACTS.items() if past[name] is not None),
        ("arithmetic", f"{past['dtype']} on {past['device']}"),
        *((spelled(name), _made(about)) for name, about in past["methods"].items()),
        ("took", f"{total:.3g} s, of which explaining {explained:.3g} s"),
        (
            "intervals",
            f"{100.0 * report.confidence:g} %, percentiles of {past['resamples']} bootstrap "
            f"resamples of the examples (Efron, 1979), seed {report.seed}",
        ),
        ("versions", ", ".join(f"{name} {one}" for name, one in past["versions"].items())),
    )


def _made(about: dict[str, Any]) -> str:
    """How maps were made, in words."""
    if about["kind"] == "control":
        return "a control, which ignores the model"
    if about["kind"] != "method":
        return "maps as they were given" if about["kind"] == "maps" else "a function"
    fields = ", ".join(
        f"{name}={_text(value)}" for name, value in about["parameters"].items() if value is not None
    )
    return f"{about['method']}({fields}), estimated error up to {about['error']:.2g}"


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(plain(value), ensure_ascii=False).replace('"', "")
