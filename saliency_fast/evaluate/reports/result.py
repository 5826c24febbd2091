"""The result of `report`: outcomes and comparisons as sentences, tables, JSON, a page and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import (
    FAITHFULNESS,
    GROUPS,
    LOCALISATION,
    SANITY,
    Metric,
    entry_of,
    field_meanings,
)
from saliency_fast.evaluate.metrics.agreement import COMPARISONS, Agreement
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, mean_ends, plain, plain_fields
from saliency_fast.render.frames import encode, frames, grey, make_folder, picture
from saliency_fast.render.pages import Figure, legends, render
from saliency_fast.render.plots import CURE, Band, Plot, have_plots, plot_png

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

SCHEMA = 1
"""Of the JSON."""
MOST = 4096
"""Elements up to which a tensor among details is written out."""
FEW = 20
"""Examples below which a bootstrap interval is clearly too narrow."""
MAPS = "maps"
"""Stands for a metric where a method's maps could not be made."""
SHOWN = 4
"""Examples on the page."""
PERCENTILE, OPACITY = 99.0, 0.85
"""Of the maps over the inputs."""
NO_SPREAD = 1e-9
"""An interval that is narrower, relative to its mean, holds only rounding errors."""
WIDTH = 100
_CELL = 13
"""Columns of the terminal's tables, and of a cell in them."""


@dataclass(frozen=True)
class Missing:
    """A cell that was not measured, and why; metric is "maps" where a method gave no maps."""

    method: str
    metric: str
    why: str


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The outcomes of metrics for methods and controls, shown and saved; see `report`.

    Args:
        title: The page's title.
        outcomes: By method and metric, controls behind the methods.
        metrics: By name, in the order of the tables.
        controls: The names of rows that do not depend on the model.
        unmeasured: What could not be measured, and why.
        caveats: Sentences that a reader must know.
        seconds: By method and metric, "maps" for explaining.
        provenance: All that the outcomes depend on.
        inputs: [B, C, *spatial] or [B, F].
        maps: [B, *spatial] by method.
        classes: The explained classes, int64 [B], where the target is a class.
        boxes: Masks of the objects, bool [B, *spatial], where they are given.
        labels: Names of classes.
        agreement: Between the maps, where there are several.
        confidence: The intervals' level.
        seed: The bootstrap's seed.
    """

    title: str
    outcomes: Mapping[str, Mapping[str, Outcome]]
    metrics: Mapping[str, Metric]
    controls: tuple[str, ...]
    unmeasured: tuple[Missing, ...]
    caveats: tuple[str, ...]
    seconds: Mapping[str, Mapping[str, float]]
    provenance: Mapping[str, Any]
    inputs: Tensor
    maps: Mapping[str, Tensor]
    classes: Tensor | None
    boxes: Tensor | None
    labels: Mapping[int, str]
    agreement: Agreement | None
    confidence: float
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Methods and then controls."""
        return tuple(self.outcomes)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the rows that are no controls."""
        return tuple(name for name in self.outcomes if name not in self.controls)

    @property
    def passed(self) -> bool | None:
        """Whether all checks that give a verdict passed for all methods; None without one."""
        outcomes = (one for name in self.methods for one in self.outcomes[name].values())
        verdicts = [one.passed for one in outcomes if one.passed is not None]
        return all(verdicts) if verdicts else None

    @cached_property
    def intervals(self) -> dict[tuple[str, str], Interval]:
        """By method and metric, of what was measured."""
        return {
            (method, metric): outcome.mean(self.confidence, seed=self.seed)
            for method, by_metric in self.outcomes.items()
            for metric, outcome in by_metric.items()
        }

    def interval(self, method: str, metric: str) -> Interval | None:
        """The mean with its bootstrap interval; None where it was not measured."""
        self._check_names(method, metric)
        return self.intervals.get((method, metric))

    def best(self, metric: str) -> str | None:
        """The method (no control) with the best mean; None where several share it."""
        self._check_names(None, metric)
        better = self.metrics[metric].better
        means = {
            name: one.mean
            for name in self.methods
            if (one := self.intervals.get((name, metric))) is not None and one.count
        }
        if not better or not means:
            return None
        top = (max if better == "higher" else min)(means.values())
        # Means of the same values may differ by rounding.
        first = [name for name, mean in means.items() if math.isclose(mean, top)]
        return first[0] if len(first) == 1 else None

    def gap(self, method: str, other: str, metric: str) -> Interval | None:
        """The mean paired difference from another method; None where either was not measured."""
        self._check_names(method, metric)
        self._check_names(other, metric)
        one, two = self.outcomes[method].get(metric), self.outcomes[other].get(metric)
        if one is None or two is None:
            return None
        interval = one.over(two, self.confidence, seed=self.seed)
        return interval if interval.count else None

    def comparisons(self, reference: str | None = None) -> dict[str, dict[str, Interval]]:
        """The gaps of every method to one of them (the first), by method and metric."""
        first = self.methods[0] if reference is None else reference
        self._check_names(first, None)
        return {
            name: {
                metric: gap
                for metric in self.metrics
                if (gap := self.gap(name, first, metric)) is not None
            }
            for name in self.methods
            if name != first
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method and metric that was measured, for data frames."""
        parts = ("mean", "low", "high", "count")
        return [
            {
                "method": method,
                "control": method in self.controls,
                "metric": metric,
                "better": outcome.better,
                **{part: getattr(interval, part) for part in parts},
                "passed": outcome.passed,
                "best": self.best(metric) == method,
                "seconds": self.seconds[method][metric],
            }
            for (method, metric), interval in self.intervals.items()
            for outcome in (self.outcomes[method][metric],)
        ]

    def _check_names(self, method: str | None, metric: str | None) -> None:
        for what, name, valid in (("method", method, self.names), ("metric", metric, self.metrics)):
            if name is not None and name not in valid:
                raise InputError(f"{what} must be one of {', '.join(valid)}: got {name!r}")

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
            "verdicts": [sentence for _, sentence in verdicts(self)],
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
        plots = ((metric, plot_of(self, metric)) for metric in self.metrics)
        drawn = {metric: plot_png(plot) for metric, plot in plots if plot is not None}
        written = []
        for metric, data in drawn.items():
            name = "".join(one if one.isalnum() or one in "._-" else "_" for one in metric)
            written.append(make_folder(folder) / f"{name}.png")
            written[-1].write_bytes(data)
        return written

    def save(self, folder: str | Path) -> list[Path]:
        """Writes index.html, report.json and curves/*.png; without matplotlib no curves."""
        return save(self, Path(folder))

    def show(self) -> None:
        """Prints the tables, at most as wide as the terminal."""
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=WIDTH)).print(self)

    def __str__(self) -> str:
        from rich.console import Console

        file = StringIO()
        Console(width=WIDTH, file=file, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __repr__(self) -> str:
        return f"<Report {', '.join(self.names)}: {', '.join(self.metrics)}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _tables(self, options.max_width)


def save(report: Report, folder: Path, command: str = "") -> list[Path]:
    """`Report.save`, with the command that makes the page again."""
    make_folder(folder)
    html, numbers = folder / "index.html", folder / "report.json"
    html.write_text(page(report, command), encoding="utf-8")
    numbers.write_text(report.json(), encoding="utf-8")
    return [html, numbers, *(report.curves(folder / "curves") if have_plots() else [])]


# --- Sentences and numbers --------------------------------------------------------------------

GOOD, BAD, PLAIN = "good", "bad", "plain"
Verdict = tuple[str, str]
"""GOOD, BAD or PLAIN, and a sentence."""
ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "": " "}
_STYLES = {GOOD: "green", BAD: "bold red"}
_TAGS = {GOOD: "bold green", BAD: "bold red", "soft": "dim"}
_SPELLED = {
    "road": "ROAD",
    "top_k_iou": "top-k IoU",
    "sensitivity_n": "sensitivity-n",
    "max_sensitivity": "max-sensitivity",
    "sanity_independent": "sanity layer by layer",
    "smoothgrad": "SmoothGrad",
    "vargrad": "VarGrad",
    "deeplift": "DeepLIFT",
    "lime": "LIME",
    "rise": "RISE",
    "lrp": "LRP",
}
"""Names that are more than words with underscores between them."""
_SANE = ": the maps depend on what the model has learned"
_INSANE = ": maps of a model that has learned nothing look much the same"


def verdicts(report: Report) -> list[Verdict]:
    """The sentences that a reader should see first."""
    found = [*_checks(report), *_against_controls(report)]
    if len(report.methods) > 1:
        won: dict[str, list[str]] = {}
        for metric in report.metrics:
            name = report.best(metric)
            if name is not None:
                won.setdefault(name, []).append(metric)
        best = "; ".join(f"{spelled(name)} by {_and(metrics)}" for name, metrics in won.items())
        found += [(PLAIN, f"Best mean: {best}.")] if best else []
        found += _differences(report)
    count = len(report.unmeasured)
    if count:
        found.append((PLAIN, f"{count} of the table's cells could not be measured; see below why."))
    return [(kind, text[:1].upper() + text[1:]) for kind, text in found]


def unmeasured(report: Report) -> list[tuple[str, str]]:
    """What was not measured, and why; methods with the same reason share a row."""
    names: dict[tuple[str, str], list[str]] = {}
    for one in report.unmeasured:
        names.setdefault((one.metric, one.why), []).append(one.method)
    return [
        (f"{spelled(metric)} of {'all' if len(of) == len(report.names) else _and(of)}", why)
        for (metric, why), of in names.items()
    ]


def verdict_of(gap: Interval, better: str) -> str:
    """Whether a difference of means is "better", "worse" or, within its interval, "unclear"."""
    if not better or not (gap.low > 0.0 or gap.high < 0.0):
        return "unclear"
    return "better" if (gap.low > 0.0) == (better == "higher") else "worse"


def _checks(report: Report) -> Iterator[Verdict]:
    for metric, one in report.metrics.items():
        sanity = entry_of(one, metric).group == SANITY
        for passed, control, kind, text, meaning in (
            (True, False, GOOD, "passes for {}", _SANE),
            (False, False, BAD, "FAILS for {}", _INSANE),
            (False, True, PLAIN, "fails for {}, as it should", ""),
            (True, True, BAD, "passes for {} too, which never asked the model: beware", ""),
        ):
            names = [
                name
                for name, found in report.outcomes.items()
                if metric in found and found[metric].passed is passed
                if (name in report.controls) == control
            ]
            if names:
                sentence = f"{spelled(metric)} {text.format(_and(names))}"
                yield kind, f"{sentence}{meaning if sanity else ''}."


def _against_controls(report: Report) -> list[Verdict]:
    """Of metrics by which a map that ignores the model should be bad."""
    ranked = [
        name
        for name, metric in report.metrics.items()
        if entry_of(metric, name).group in (FAITHFULNESS, LOCALISATION) and metric.better
    ]
    several = len(report.controls) > 1
    # Methods with the same sentence share it.
    shared: dict[Verdict, list[str]] = {}
    for method in report.methods:
        ahead: list[str] = []
        level: dict[tuple[str, ...], list[str]] = {}
        for metric in ranked:
            compared = {
                control: verdict_of(gap, report.metrics[metric].better)
                for control in report.controls
                if (gap := report.gap(method, control, metric)) is not None
            }
            unbeaten = tuple(control for control, one in compared.items() if one != "better")
            if unbeaten:
                level.setdefault(unbeaten, []).append(metric)
            elif compared:
                ahead.append(metric)
        if ahead:
            few = len(report.inputs) < FEW
            how = "better, on these few examples," if few else "clearly better"
            text = f"{how} than {'every' if several else 'the'} control by {_and(ahead)}."
            shared.setdefault((GOOD, text), []).append(method)
        if level:
            every = f"{'any' if several else 'the'} control"
            parts = [
                f"than {every if one == report.controls else _and(one)} by {_and(metrics)}"
                for one, metrics in level.items()
            ]
            text = f"not clearly better {', nor '.join(parts)}."
            shared.setdefault((BAD, text), []).append(method)
    return [
        (kind, f"{_and(names)} {'is' if len(names) == 1 else 'are'} {text}")
        for (kind, text), names in shared.items()
    ]


def _differences(report: Report) -> Iterator[Verdict]:
    for name, gaps in report.comparisons().items():
        parts = []
        for word in ("better", "worse"):
            by = [
                metric
                for metric, gap in gaps.items()
                if verdict_of(gap, report.metrics[metric].better) == word
            ]
            parts += [f"{word} by {_and(by)}"] if by else []
        text = ", ".join(parts) or "neither better nor worse beyond chance"
        pair = f"{spelled(name)} against {spelled(report.methods[0])}"
        yield PLAIN, f"{pair}, example by example: {text}."


def _and(names: Iterable[str]) -> str:
    words = _spelled(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def spelled(name: str) -> str:
    """A name as sentences spell it."""
    return _SPELLED.get(name, name.replace("_", " "))


def _spelled(names: Iterable[str]) -> list[str]:
    return [spelled(name) for name in names]


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def interval_text(interval: Interval) -> tuple[str, str]:
    """A mean and the ends of its interval, with as many digits as the interval's width allows."""
    if interval.count == 0:
        return "\N{EN DASH}", ""
    width = interval.high - interval.low
    if width <= NO_SPREAD * abs(interval.mean):
        width = 0.0
    digits = _digits(width if width > 0 else abs(interval.mean), 2 if width > 0 else 3)
    form = ".2e" if digits is None else f".{digits}f"
    mean, low, high = (f"{one:{form}}" for one in (interval.mean, interval.low, interval.high))
    if width <= 0:
        return _minus(mean), "no spread" if interval.count > 1 else "one example"
    return _minus(mean), _minus(f"{low} \N{HORIZONTAL ELLIPSIS} {high}")


def _digits(scale: float, significant: int) -> int | None:
    """Decimals that show the significant digits of a number; None where they would be too many."""
    if scale == 0:
        return 0
    digits = significant - 1 - math.floor(math.log10(scale))
    return max(0, digits) if -4 < digits <= 5 else None


def _minus(text: str) -> str:
    """With a typographic minus, and none before a zero."""
    parts = text.split(" ")
    zeros = [part.lstrip("-") if not part.strip("-0.") else part for part in parts]
    return " ".join(zeros).replace("-", "\N{MINUS SIGN}")


def _tables(report: Report, width: int) -> Iterator[Table | Text]:
    """All that is printed: metrics down, methods and controls across, split where they are wide."""
    from rich.text import Text

    yield Text(report.title, style="bold")
    yield Text(
        f"{plural(len(report.inputs), 'example')}; means, below them their "
        f"{100.0 * report.confidence:g} % bootstrap intervals; arrows point to better; "
        "* and bold: the best method",
        style="dim",
    )
    yield Text()
    first = max([8, *(len(spelled(name)) + 2 for name in report.metrics)])
    fitting = max(1, (width - first) // (_CELL + 2))
    each = math.ceil(len(report.names) / math.ceil(len(report.names) / fitting))
    for start in range(0, len(report.names), each):
        yield _table(report, report.names[start : start + each])
        yield Text()
    for kind, sentence in verdicts(report):
        yield Text(f"\N{BULLET} {sentence}", style=_STYLES.get(kind, ""))
    for what, why in unmeasured(report):
        yield Text(f"not measured: {what}: {why}", style="dim")
    for caveat in report.caveats:
        yield Text(f"note: {caveat}", style="yellow")


class Cell(NamedTuple):
    """A cell of a table: a tag of a `kind` ("good", "bad", "soft"), text, and small print below."""

    text: str
    below: str = ""
    tag: str = ""
    kind: str = ""
    best: bool = False
    why: str = ""


def _cell(report: Report, name: str, metric: str) -> Cell:
    """A cell of the table of means."""
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
    good = "soft" if name in report.controls else GOOD
    kind = good if passed != (name in report.controls) else BAD
    return Cell(mean, ends, "PASS" if passed else "FAIL", kind, best)


def _table(report: Report, names: tuple[str, ...]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        lines = fill(spelled(name), _CELL, break_long_words=False, break_on_hyphens=False)
        control = name in report.controls
        head = Text(f"{lines}\n(control)", style="dim") if control else Text(lines)
        table.add_column(head, justify="right", min_width=_CELL)
    for metric, one in report.metrics.items():
        row = [Text(f"{spelled(metric)} {ARROWS[one.better]}")]
        for name in names:
            found, shown = _cell(report, name, metric), Text()
            if found.tag:
                shown.append(f"{found.tag} ", style=_TAGS[found.kind])
            shown.append(("*" if found.best else "") + found.text, "bold" if found.best else "")
            shown.append(f"\n{found.below}", style="dim")
            row.append(Text("\N{EN DASH}", style="dim") if found.why else shown)
        table.add_row(*row)
    return table


# --- The page and its plots -------------------------------------------------------------------

_FACTS = {
    "model": "model",
    "weights_sha256": "weights SHA-256",
    "inputs_sha256": "inputs SHA-256",
    "shape": "inputs",
    "target": "target",
    "baseline": "baseline",
}


def plot_of(report: Report, metric: str) -> Plot | None:
    """The mean curves of every method by a metric, with intervals; None where it has none."""
    found = {name: one[metric].curve for name, one in report.outcomes.items() if metric in one}
    curves = {name: one for name, one in found.items() if one is not None}
    bands = [_band(report, name, curve) for name, curve in curves.items()]
    defined = tuple(band for band in bands if band is not None)
    if not defined:
        return None
    first = next(iter(curves.values()))
    return Plot(spelled(metric), first.x_name, first.y_name, defined)


def _band(report: Report, name: str, curve: Curve) -> Band | None:
    """The mean of the finite curves, with its interval at every x."""
    y = curve.y.detach().double().cpu()
    y = y[y.isfinite().all(1)]
    if not len(y):
        return None
    low, high = mean_ends(y, report.confidence, report.seed)
    x, mean, low, high = (tuple(row.tolist()) for row in (curve.x, y.mean(0), low, high))
    return Band(spelled(name), x, mean, low, high, name in report.controls)


def page(report: Report, command: str = "") -> str:
    """The page as one HTML document. command: what makes it again."""
    plotted = have_plots()
    has_curves = any(one.curve for found in report.outcomes.values() for one in found.values())
    pictured = report.inputs.dim() in (4, 5) and bool(report.maps)
    samples = range(min(SHOWN, len(report.inputs))) if pictured else ()
    return render(
        "evaluation.html.jinja",
        page={"title": report.title, "facts": _facts(report), "command": command},
        report=report,
        verdicts=verdicts(report),
        means=_means(report),
        gaps=_gaps(report),
        samples=[_example(report, row) for row in samples],
        metrics=[_section(report, metric, plotted) for metric in report.metrics],
        matrices=_matrices(report),
        unmeasured=unmeasured(report),
        cure=CURE if has_curves and not plotted else "",
        styles=legends("signed"),
        spelled=spelled,
        plural=plural,
    )


Rows = list[tuple[str, str, list[Cell]]]
"""Rows of a table: a metric, its better direction, and the cells."""


def _means(report: Report) -> dict[str, Rows]:
    """The rows of the table of means by the question of their group."""
    groups: dict[str, Rows] = {group: [] for group in GROUPS}
    for metric, one in report.metrics.items():
        cells = [_cell(report, name, metric) for name in report.names]
        groups[entry_of(one, metric).group].append((metric, one.better, cells))
    titles = {group: f"{group.capitalize()}: {question}" for group, question in GROUPS.items()}
    return {titles[group]: rows for group, rows in groups.items() if rows}


def _gaps(report: Report) -> Rows:
    """The rows of the table of differences from the first method."""
    gaps = report.comparisons().values()
    return [
        (metric, one.better, [_gap(by.get(metric), one.better) for by in gaps])
        for metric, one in report.metrics.items()
        if any(metric in by for by in gaps)
    ]


def _gap(gap: Interval | None, better: str) -> Cell:
    if gap is None:
        return Cell("", why="not measured for both")
    mean, ends = interval_text(gap)
    verdict = verdict_of(gap, better)
    kind = {"better": "good", "worse": "bad"}.get(verdict, "")
    return Cell(f"+{mean}" if gap.mean > 0 else mean, ends, verdict if kind else "", kind)


def _section(report: Report, metric: str, plotted: bool) -> dict[str, Any]:
    """The section of a metric: the question that it answers, its curves and its protocol."""
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
    seconds = sum(found.get(metric, 0.0) for found in report.seconds.values())
    took = f"{seconds:.3g} s for {plural(len(outcomes), 'row')} of the table"
    plot = plot_of(report, metric) if plotted else None
    return {
        "name": spelled(metric),
        "better": made.better,
        "group": entry.group,
        "asks": entry.asks,
        "parameters": [
            (name, _by_row(stated), meanings.get(name, "")) for name, stated in options.items()
        ],
        "caveats": [
            caveat if len(rows) == len(outcomes) else f"{', '.join(rows)}: {caveat}"
            for caveat, rows in caveats.items()
        ],
        "facts": [*([("paper", entry.paper)] if entry.paper else []), ("took", took)],
        "plot": None if plot is None else _drawn(plot, report.confidence),
    }


def _by_row(stated: Mapping[str, list[str]]) -> str:
    """The value of an option, or its values with the rows that have them."""
    several = len(stated) > 1
    return "; ".join(f"{one} ({', '.join(of)})" if several else one for one, of in stated.items())


def _drawn(plot: Plot, confidence: float) -> dict[str, Any]:
    """The plot as PNG for light and for dark pages, and its description."""
    ends = "; ".join(
        f"{spelled(band.name)} goes from {band.mean[0]:.3g} to {band.mean[-1]:.3g}, in the"
        f" middle {band.mean[len(band.mean) // 2]:.3g}"
        for band in plot.bands
    )
    alt = (
        f"{plot.title}: mean {plot.y_name} over {plot.x_name}, with {100.0 * confidence:g} % "
        f"bootstrap bands. {ends}."
    )
    return {"light": plot_png(plot, "light"), "dark": plot_png(plot, "dark"), "alt": alt}


def _matrices(report: Report) -> list[tuple[str, list[str], list[list[float]]]]:
    """The mean similarities of the maps, where they are defined: a title, names and rows."""
    found = report.agreement
    means = {} if found is None else {name: found.mean(name) for name in COMPARISONS}
    return [
        (spelled(name), _spelled(found.names), mean.tolist())
        for name, mean in means.items()
        if found is not None and not bool(mean.isnan().all())
    ]


def slice_of(report: Report, row: int) -> int | None:
    """The slice of a volume (the frame of a clip) in which the maps are strongest."""
    if report.inputs.dim() != 5:
        return None
    names = [name for name in report.methods if name in report.maps] or list(report.maps)
    maps = torch.stack([report.maps[name][row].detach().double().cpu().abs() for name in names])
    sums = maps.flatten(2).sum(2)
    return int((sums / sums.sum(1, keepdim=True).clamp_min(1e-300)).sum(0).argmax())


def _example(report: Report, row: int) -> tuple[str, list[Figure]]:
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
    return title, figures


def _box(report: Report, row: int, at: int | None) -> tuple[float, float, float, float] | None:
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


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
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
