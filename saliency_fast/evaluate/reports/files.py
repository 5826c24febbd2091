"""A report as files: JSON, the evaluation page of `render`, and plots of its curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import GROUPS, entry_of, field_meanings
from saliency_fast.evaluate.metrics.agreement import COMPARISONS
from saliency_fast.evaluate.outcome import Curve, Interval, mean_ends, plain, plain_fields
from saliency_fast.evaluate.reports import text
from saliency_fast.evaluate.reports.data import MAPS, ReportData
from saliency_fast.evaluate.reports.text import interval_text, plural, spelled
from saliency_fast.render import pages as view
from saliency_fast.render.files import encode
from saliency_fast.render.frames import frames, grey, picture
from saliency_fast.render.html import Figure
from saliency_fast.render.pages import Cell, Table, TableRow
from saliency_fast.render.plots import CURE, Band, Plot, have_plots, plot_png

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1
"""Of the JSON."""
MOST = 4096
"""Elements up to which a tensor among details is written out."""
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


@dataclass(frozen=True, eq=False, repr=False)
class Report(ReportData):
    """The outcomes of metrics for methods and controls, shown and saved; see `report`."""

    def to_dict(self) -> dict[str, Any]:
        """All of it except the maps, as JSON holds it; NaN becomes None."""
        fields = ("title", "controls", "agreement", "unmeasured", "caveats", "seconds")
        outcomes: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for (method, metric), interval in self.intervals.items():
            outcome = self.outcomes[method][metric]
            further = {"mean": plain(interval), "details": plain(outcome.details, MOST)}
            outcomes[method][metric] = plain_fields(outcome, "details") | further
        return {
            "schema": SCHEMA,
            **{name: plain(getattr(self, name)) for name in (*fields, "confidence", "seed")},
            "names": list(self.names),
            "metrics": list(self.metrics),
            "passed": self.passed,
            "verdicts": [sentence for _, sentence in text.verdicts(self)],
            "best": {metric: self.best(metric) for metric in self.metrics},
            "outcomes": outcomes,
            "comparisons": plain(self.comparisons()),
            "provenance": plain(self.provenance, MOST),
        }

    def json(self, indent: int | None = 1) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def html(self) -> str:
        """One self-contained page; without matplotlib it has no curves and says so."""
        return page(self)

    def curves(self, folder: str | Path) -> list[Path]:
        """Writes a PNG for each metric with a curve and returns the paths; needs matplotlib."""
        written = []
        for metric in self.metrics:
            plot = plot_of(self, metric)
            if plot is not None:
                drawn = plot_png(plot)
                _make_folder(Path(folder))
                name = "".join(one if one.isalnum() or one in "._-" else "_" for one in metric)
                written.append(Path(folder) / f"{name}.png")
                written[-1].write_bytes(drawn)
        return written

    def save(self, folder: str | Path) -> list[Path]:
        """Writes index.html, report.json and curves/*.png; without matplotlib no curves."""
        return save(self, Path(folder))

    def show(self) -> None:
        """Prints the tables, at most as wide as the terminal."""
        text.show(self)

    def __str__(self) -> str:
        return text.as_text(self)

    def __repr__(self) -> str:
        return f"<Report {', '.join(self.names)}: {', '.join(self.metrics)}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from text.tables(self, options.max_width)


def save(report: Report, folder: Path, command: str = "") -> list[Path]:
    """`Report.save`, with the command that makes the page again."""
    _make_folder(folder)
    html, numbers = folder / "index.html", folder / "report.json"
    html.write_text(page(report, command), encoding="utf-8")
    numbers.write_text(report.json(), encoding="utf-8")
    return [html, numbers, *(report.curves(folder / "curves") if have_plots() else [])]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error


def plot_of(report: ReportData, metric: str) -> Plot | None:
    """The mean curves of every method by a metric, with intervals; None where it has none."""
    found = {name: one[metric].curve for name, one in report.outcomes.items() if metric in one}
    curves = {name: one for name, one in found.items() if one is not None}
    bands = [_band(report, name, curve) for name, curve in curves.items()]
    defined = tuple(band for band in bands if band is not None)
    if not defined:
        return None
    first = next(iter(curves.values()))
    return Plot(spelled(metric), first.x_name, first.y_name, defined)


def _band(report: ReportData, name: str, curve: Curve) -> Band | None:
    """The mean of the finite curves, with its interval at every x."""
    y = curve.y.detach().double().cpu()
    y = y[y.isfinite().all(1)]
    if not len(y):
        return None
    low, high = mean_ends(y, report.confidence, report.seed)
    x, mean, low, high = (tuple(row.tolist()) for row in (curve.x, y.mean(0), low, high))
    return Band(spelled(name), x, mean, low, high, name in report.controls)


def page(report: ReportData, command: str = "") -> str:
    """The page as one HTML document. command: what makes it again."""
    plotted = have_plots()
    has_curves = any(one.curve for found in report.outcomes.values() for one in found.values())
    pictured = report.inputs.dim() in (4, 5) and bool(report.maps)
    samples = range(min(SHOWN, len(report.inputs))) if pictured else ()
    tables = (_means(report), *([_comparisons(report)] if len(report.methods) > 1 else ()))
    controls = len(report.controls)
    beside = f", beside {plural(controls, 'control')} that ignore the model" if controls else ""
    lead = (
        f"{plural(len(report.methods), 'method')} evaluated by "
        f"{plural(len(report.metrics), 'metric')} on {plural(len(report.inputs), 'example')} shown "
        f"to the model {report.provenance['model'].rpartition('.')[2]}{beside}."
    )
    return view.evaluation_html(
        view.Evaluation(
            title=report.title,
            lead=lead,
            verdicts=tuple(text.verdicts(report)),
            tables=tables,
            samples=tuple(_example(report, row) for row in samples),
            metrics=tuple(_described(report, metric, plotted) for metric in report.metrics),
            matrices=_matrices(report),
            unmeasured=tuple(text.unmeasured(report)),
            caveats=report.caveats,
            notes=(NO_CURVES,) if has_curves and not plotted else (),
            facts=_facts(report),
            command=command,
        )
    )


def _all_spelled(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(spelled(name) for name in names)


def _means(report: ReportData) -> Table:
    groups = []
    for group, question in GROUPS.items():
        lines = tuple(
            TableRow(
                *(spelled(metric), one.better),
                tuple(text.cell(report, name, metric) for name in report.names),
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
    verdict = text.verdict_of(gap, better)
    kind = {"better": "good", "worse": "bad"}.get(verdict, "")
    return Cell(f"+{mean}" if gap.mean > 0 else mean, ends, verdict if kind else "", kind)


def _described(report: ReportData, metric: str, plotted: bool) -> view.MetricSection:
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
    stated = {
        name: "; ".join(
            value if len(rows) == 1 else f"{value} ({', '.join(names)})"
            for value, names in rows.items()
        )
        for name, rows in options.items()
    }
    plot = plot_of(report, metric) if plotted else None
    seconds = sum(found.get(metric, 0.0) for found in report.seconds.values())
    return view.MetricSection(
        name=spelled(metric),
        better=made.better,
        group=entry.group,
        asks=entry.asks,
        paper=entry.paper,
        parameters=tuple((name, value, meanings.get(name, "")) for name, value in stated.items()),
        caveats=tuple(
            caveat if len(rows) == len(outcomes) else f"{', '.join(rows)}: {caveat}"
            for caveat, rows in caveats.items()
        ),
        seconds=f"{seconds:.3g} s for {plural(len(outcomes), 'row')} of the table",
        plot=None if plot is None else _drawn(plot, report.confidence),
    )


def _drawn(plot: Plot, confidence: float) -> view.ThemedPlot:
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
    return view.ThemedPlot(plot_png(plot, "light"), plot_png(plot, "dark"), alt)


def _matrices(report: ReportData) -> tuple[view.Matrix, ...]:
    """The mean similarities of the maps, where they are defined."""
    if report.agreement is None:
        return ()
    names = _all_spelled(report.agreement.names)
    means = ((name, report.agreement.mean(name)) for name in COMPARISONS)
    return tuple(
        view.Matrix(spelled(name), names, tuple(map(tuple, mean.tolist())))
        for name, mean in means
        if not bool(mean.isnan().all())
    )


def slice_of(report: ReportData, row: int) -> int | None:
    """Of a volume, the slice along its first axis (of a clip: the frame) with the most magnitude,
    to which each method contributes equally; None for pictures.
    """
    if report.inputs.dim() != 5:
        return None
    names = [name for name in report.methods if name in report.maps] or list(report.maps)
    maps = torch.stack([report.maps[name][row].detach().double().cpu().abs() for name in names])
    sums = maps.flatten(2).sum(2)
    return int((sums / sums.sum(1, keepdim=True).clamp_min(1e-300)).sum(0).argmax())


def _example(report: ReportData, row: int) -> tuple[str, tuple[Figure, ...]]:
    """An input and every map over it; of a volume one slice, on the scale of all of it."""
    x, at = report.inputs[row : row + 1].detach().float().cpu(), slice_of(report, row)
    title, box = f"Example {row}", _box(report, row, at)
    if report.classes is not None and report.classes.dim() == 1:
        number = int(report.classes[row])
        title += f": {report.labels.get(number, f'class {number}')}"
    if at is not None:
        title += f", slice {at + 1} of {report.inputs.shape[2]}, where the maps are strongest"

    def figure(drawn: Tensor, alt: str, caption: str) -> Figure:
        drawn = drawn if at is None else drawn[at]
        return Figure(encode(drawn, ".png"), "image/png", drawn.shape[1], alt, caption, box)

    figures = [figure(picture(x)[0], f"input {row}", "input")]
    for name, maps in report.maps.items():
        shown = maps[row : row + 1].detach().float().cpu()
        drawn = frames(grey(x), shown, "signed", PERCENTILE, OPACITY)[0]
        figures.append(figure(drawn, f"map by {spelled(name)} over input {row}", spelled(name)))
    return title, tuple(figures)


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
