"""Tables in the terminal: metrics down, methods and controls across, split where they are wide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import StringIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.words import (
    BAD,
    GOOD,
    interval_text,
    told_as,
    unmeasured,
    verdicts,
)

WIDTH = 100
ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "": " "}
_CELL = 13
_STYLES = {GOOD: "green", BAD: "bold red"}


def show(report: Findings) -> None:
    """Prints the tables, at most as wide as the terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(report)


def text(report: Findings) -> str:
    """The tables as plain text, 100 columns wide at most."""
    console = Console(width=WIDTH, file=StringIO(), color_system=None, legacy_windows=False)
    console.print(report)
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def tables(report: Findings, width: int) -> Iterator[Table | Text | Group]:
    """All that is printed."""
    examples = len(report.inputs)
    share = f"{100.0 * report.confidence:g} %"
    yield Text(report.title, style="bold")
    yield Text(
        f"{examples} example{'' if examples == 1 else 's'}; means, below them their {share} "
        "bootstrap intervals; arrows point to better; * and bold: the best method",
        style="dim",
    )
    yield Text()
    first = max([8, *(len(told_as(name)) + 2 for name in report.metrics)])
    fitting = max(1, (width - first) // (_CELL + 2))
    blocks = math.ceil(len(report.names) / fitting)
    each = math.ceil(len(report.names) / blocks)
    for start in range(0, len(report.names), each):
        yield _table(report, report.names[start : start + each])
        yield Text()
    for kind, said in verdicts(report):
        yield Text(f"\N{BULLET} {said}", style=_STYLES.get(kind, ""))
    for what, why in unmeasured(report):
        yield Text(f"not measured: {what}: {why}", style="dim")
    for caveat in report.caveats:
        yield Text(f"note: {caveat}", style="yellow")


def _table(report: Findings, names: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        head = Text(_folded(name))
        if name in report.controls:
            head = Text(f"{_folded(name)}\n(control)", style="dim")
        table.add_column(head, justify="right", min_width=_CELL)
    for metric, one in report.metrics.items():
        better = one.better
        cells = [_cell(report, name, metric) for name in names]
        label = Text(f"{told_as(metric)} {ARROWS[better]}")
        table.add_row(label, *cells)
    return table


def _cell(report: Findings, name: str, metric: str) -> Text:
    interval = report.interval(name, metric)
    if interval is None:
        return Text("\N{EN DASH}", style="dim")
    mean, ends = interval_text(interval)
    best = report.best(metric) == name and len(report.methods) > 1
    cell = Text()
    passed = report.outcomes[name][metric].passed
    if passed is not None:
        control = name in report.controls
        expected = "dim" if control else "bold green"
        style = expected if passed != control else "bold red"
        cell.append("PASS " if passed else "FAIL ", style=style)
    cell.append(("*" if best else "") + mean, style="bold" if best else "")
    return cell.append(f"\n{ends}", style="dim")


def _folded(name: str) -> str:
    """A name in lines of about a cell's width, broken between its words."""
    lines = [""]
    for part in told_as(name).split():
        if lines[-1] and len(lines[-1]) + 1 + len(part) > _CELL:
            lines.append(part)
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)
