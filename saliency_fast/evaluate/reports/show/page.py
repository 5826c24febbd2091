"""Page: a report as what the page of an evaluation takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch

from saliency_fast.evaluate.reports.entries import GROUPS
from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.bands import plot_of
from saliency_fast.evaluate.reports.show.fields import meanings
from saliency_fast.evaluate.reports.show.figures import SHOWN, figures_of, pictured, slice_of
from saliency_fast.evaluate.reports.show.plain import plain
from saliency_fast.evaluate.reports.show.words import (
    interval_text,
    told_as,
    unmeasured,
    verdict_of,
    verdicts,
)
from saliency_fast.evaluate.reports.suite import entry_of
from saliency_fast.render.evaluation import (
    Cell,
    Described,
    Drawn,
    Evaluation,
    Line,
    Matrix,
    Option,
    Sample,
    Table,
    evaluation_html,
)
from saliency_fast.render.plots import CURE, Plot, have_plots, plot_png

NO_CURVES = f"This page has no curves: matplotlib is not installed. To have them, {CURE}."


def page(report: Findings, command: str = "") -> str:
    """The page as one HTML document. command: what makes it again."""
    plotted = have_plots()
    has_curves = any(one.curve for found in report.outcomes.values() for one in found.values())
    samples = range(min(SHOWN, len(report.inputs))) if pictured(report) else ()
    tables = [_means(report)]
    if len(report.methods) > 1:
        tables.append(_comparisons(report))
    return evaluation_html(
        Evaluation(
            title=report.title,
            lead=_lead(report),
            verdicts=tuple(verdicts(report)),
            tables=tuple(tables),
            samples=tuple(
                Sample(_example(report, row), figures_of(report, row)) for row in samples
            ),
            metrics=tuple(_described(report, metric, plotted) for metric in report.metrics),
            matrices=_matrices(report),
            unmeasured=tuple(unmeasured(report)),
            caveats=report.caveats,
            notes=(NO_CURVES,) if has_curves and not plotted else (),
            facts=_facts(report),
            command=command,
        )
    )


def _lead(report: Findings) -> str:
    count = len(report.inputs)
    methods, controls = len(report.methods), len(report.controls)
    beside = (
        f", beside {controls} control{_s(controls)} that never ask the model" if controls else ""
    )
    return (
        f"{methods} method{_s(methods)} judged by {len(report.metrics)} "
        f"metric{_s(len(report.metrics))} on {count} example{_s(count)} shown to the model "
        f"{report.provenance['model'].rpartition('.')[2]}{beside}."
    )


def _told(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(told_as(name) for name in names)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _means(report: Findings) -> Table:
    share = f"{100.0 * report.confidence:g} %"
    groups = []
    for group in GROUPS:
        lines = [
            Line(
                *(told_as(metric), one.better),
                tuple(_cell(report, name, metric) for name in report.names),
            )
            for metric, one in report.metrics.items()
            if entry_of(one, metric).group == group
        ]
        if lines:
            groups.append((f"{group.capitalize()}: {GROUPS[group]}", tuple(lines)))
    return Table(
        "Means",
        f"Means over examples; below them their {share} bootstrap intervals. Arrows point to "
        "better; a star marks the best method. Controls do not compete: a good map beats them.",
        (("methods", _told(report.methods)), ("controls", _told(report.controls))),
        tuple(groups),
    )


def _cell(report: Findings, name: str, metric: str) -> Cell:
    interval = report.interval(name, metric)
    if interval is None:
        why = [
            one.why
            for one in report.unmeasured
            if one.method == name and one.metric in (metric, "maps")
        ]
        return Cell("", why=why[0] if why else "not measured")
    mean, ends = interval_text(interval)
    passed = report.outcomes[name][metric].passed
    tag = "" if passed is None else "PASS" if passed else "FAIL"
    # A control should fail: that is no news, and the contrary is bad.
    control = name in report.controls
    kind = ("bad" if passed else "soft") if control else ("good" if passed else "bad")
    best = report.best(metric) == name and len(report.methods) > 1
    return Cell(mean, ends, tag, kind if tag else "", best)


def _comparisons(report: Findings) -> Table:
    first, gaps = report.methods[0], report.comparisons()
    lines = []
    for metric, one in report.metrics.items():
        cells = tuple(_gap(found.get(metric), one.better) for found in gaps.values())
        if any(metric in found for found in gaps.values()):
            lines.append(Line(told_as(metric), one.better, cells))
    count = sum(len(found) for found in gaps.values())
    chance = (1.0 - report.confidence) * count
    return Table(
        f"Against {told_as(first)}",
        f"How much larger the mean is than that of {told_as(first)} on the same examples, "
        f"with the {100.0 * report.confidence:g} % bootstrap interval of the paired differences. "
        f"Of these {count} comparisons about {chance:.2g} would exclude zero by chance alone.",
        (("methods", _told(gaps)),),
        (("", tuple(lines)),),
    )


def _gap(gap: Any, better: str) -> Cell:
    if gap is None:
        return Cell("", why="not measured for both")
    mean, ends = interval_text(gap)
    verdict = verdict_of(gap, better)
    kind = {"better": "good", "worse": "bad"}.get(verdict, "")
    mean = f"+{mean}" if gap.mean > 0 else mean
    return Cell(mean, ends, verdict if kind else "", kind)


def _described(report: Findings, metric: str, plotted: bool) -> Described:
    made = report.metrics[metric]
    entry = entry_of(made, metric)
    outcomes = {name: found[metric] for name, found in report.outcomes.items() if metric in found}
    told = meanings(type(made))
    options: dict[str, dict[str, str]] = {}
    caveats: dict[str, dict[str, str]] = {}
    for row, one in outcomes.items():
        for name, value in one.parameters.items():
            options.setdefault(name, {})[row] = _text(value)
        for caveat in one.caveats:
            if caveat not in report.caveats:
                caveats.setdefault(caveat, {})[row] = caveat
        if one.threshold is not None:
            options.setdefault("threshold of the verdict", {})[row] = f"{one.threshold:.4g}"
    plot = plot_of(report, metric) if plotted else None
    seconds = sum(found.get(metric, 0.0) for found in report.seconds.values())
    return Described(
        name=told_as(metric),
        better=made.better,
        group=entry.group,
        asks=entry.asks,
        paper=entry.paper,
        options=tuple(
            Option(name, _by_row(texts), told.get(name, "")) for name, texts in options.items()
        ),
        caveats=tuple(_of_rows(texts, len(outcomes)) for texts in caveats.values()),
        seconds=f"{seconds:.3g} s for {len(outcomes)} row{_s(len(outcomes))} of the table",
        drawn=None if plot is None else _drawn(plot, report.confidence),
    )


def _by_row(texts: dict[str, str]) -> str:
    """A value that all rows share, or each value with its rows."""
    rows: dict[str, list[str]] = {}
    for row, text in texts.items():
        rows.setdefault(text, []).append(told_as(row))
    if len(rows) == 1:
        return next(iter(rows))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in rows.items())


def _of_rows(texts: dict[str, str], count: int) -> str:
    """A caveat, with the rows that it is of where these are not all."""
    caveat = next(iter(texts.values()))
    whole = len(texts) == count
    return caveat if whole else f"{', '.join(told_as(row) for row in texts)}: {caveat}"


def _drawn(plot: Plot, confidence: float) -> Drawn:
    """Both pictures, and in words what they show."""
    ends = "; ".join(
        f"{told_as(band.name)} goes from {band.mean[0]:.3g} to {band.mean[-1]:.3g}, in the"
        f" middle {band.mean[len(band.mean) // 2]:.3g}"
        for band in plot.bands
    )
    alt = (
        f"{plot.title}: mean {plot.y_name} over {plot.x_name}, with {100.0 * confidence:g} % "
        f"bootstrap bands. {ends}."
    )
    return Drawn(plot_png(plot, "light"), plot_png(plot, "dark"), alt)


def _matrices(report: Findings) -> tuple[Matrix, ...]:
    """Every square table of numbers that the agreement tells."""
    if report.agreement is None:
        return ()
    told = plain(report.agreement)
    names = _told(told["names"])
    found = []
    for name, rows in told.items():
        square = isinstance(rows, list) and len(rows) == len(names)
        if square and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            values = tuple(tuple(math.nan if v is None else float(v) for v in row) for row in rows)
            if any(not math.isnan(value) for row in values for value in row):
                found.append(Matrix(told_as(name), names, values))
    return tuple(found)


def _example(report: Findings, row: int) -> str:
    found = f"Example {row}"
    if report.classes is not None and report.classes.dim() == 1:
        number = int(report.classes[row])
        found += f": {report.labels.get(number, f'class {number}')}"
    place = slice_of(report, row)
    if place is not None:
        found += f", slice {place + 1} of {report.inputs.shape[2]}, where the maps are strongest"
    return found


def _facts(report: Findings) -> tuple[tuple[str, str], ...]:
    past = report.provenance
    names = {
        "model": "model",
        "weights_sha256": "weights SHA-256",
        "inputs_sha256": "inputs SHA-256",
        "shape": "inputs",
        "target": "target",
        "baseline": "baseline",
    }
    facts = [(told, _text(past[name])) for name, told in names.items() if past[name] is not None]
    facts.append(("arithmetic", f"{past['dtype']} on {past['device']}"))
    for name, about in past["methods"].items():
        facts.append((told_as(name), _made(about)))
    total = sum(sum(found.values()) for found in report.seconds.values())
    explained = sum(found.get("maps", 0.0) for found in report.seconds.values())
    facts.append(("took", f"{total:.3g} s, of which explaining {explained:.3g} s"))
    facts.append(
        (
            "intervals",
            f"{100.0 * report.confidence:g} %, percentiles of {past['resamples']} bootstrap "
            f"resamples of the examples (Efron, 1979), seed {report.seed}",
        )
    )
    versions = ", ".join(f"{name} {version}" for name, version in past["versions"].items())
    return (*facts, ("versions", versions))


def _made(about: dict[str, Any]) -> str:
    """How maps were made, in words."""
    if about["kind"] == "control":
        return "a control, which never asks the model"
    if about["kind"] != "method":
        return "maps as they were given" if about["kind"] == "maps" else "a function"
    fields = ", ".join(
        f"{name}={_text(value)}" for name, value in about["parameters"].items() if value is not None
    )
    return f"{about['method']}({fields}), estimated error up to {about['error']:.2g}"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)}"
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(plain(value), ensure_ascii=False).replace('"', "")
