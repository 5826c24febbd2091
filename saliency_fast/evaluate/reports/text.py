"""A report as text: sentences about its outcomes, numbers, and the terminal's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from io import StringIO
from textwrap import fill
from typing import TYPE_CHECKING

from saliency_fast.evaluate.metric import FAITHFULNESS, LOCALISATION, SANITY, entry_of
from saliency_fast.evaluate.outcome import Interval
from saliency_fast.evaluate.reports.data import FEW, MAPS, ReportData
from saliency_fast.render.pages import Cell

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

GOOD, BAD, PLAIN = "good", "bad", "plain"
Verdict = tuple[str, str]
"""GOOD, BAD or PLAIN, and a sentence."""
WIDTH = 100
ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "": " "}
_CELL = 13
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
NO_SPREAD = 1e-9
"""An interval that is narrower, relative to its mean, holds only rounding errors."""


def verdicts(report: ReportData) -> list[Verdict]:
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


def unmeasured(report: ReportData) -> list[tuple[str, str]]:
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


def _checks(report: ReportData) -> Iterator[Verdict]:
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


def _against_controls(report: ReportData) -> list[Verdict]:
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


def _differences(report: ReportData) -> Iterator[Verdict]:
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
    words = [spelled(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def spelled(name: str) -> str:
    """A name as sentences spell it."""
    return _SPELLED.get(name, name.replace("_", " "))


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


def show(report: ReportData) -> None:
    """Prints the tables, at most as wide as the terminal."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(report)


def as_text(report: ReportData) -> str:
    """The tables as plain text, at most 100 columns wide."""
    from rich.console import Console

    file = StringIO()
    Console(width=WIDTH, file=file, color_system=None, legacy_windows=False).print(report)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def tables(report: ReportData, width: int) -> Iterator[Table | Text]:
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


def cell(report: ReportData, name: str, metric: str) -> Cell:
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


def _table(report: ReportData, names: tuple[str, ...]) -> Table:
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
            found, shown = cell(report, name, metric), Text()
            if found.tag:
                shown.append(f"{found.tag} ", style=_TAGS[found.kind])
            shown.append(("*" if found.best else "") + found.text, "bold" if found.best else "")
            shown.append(f"\n{found.below}", style="dim")
            row.append(Text("\N{EN DASH}", style="dim") if found.why else shown)
        table.add_row(*row)
    return table
