"""Tables of a page: means with intervals, and matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Cell:
    """text: in large; below: in small. kind: "", "good" or "bad". best: in bold, with a mark.
    why: why there is nothing.
    """

    text: str
    below: str = ""
    tag: str = ""
    kind: str = ""
    best: bool = False
    why: str = ""


@dataclass(frozen=True)
class Line:
    """A row: its name, a mark of the better direction ("higher", "lower", ""), and cells."""

    name: str
    better: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """heads: (title of a group of columns, their names). groups: (title, rows)."""

    title: str
    caption: str
    heads: tuple[tuple[str, tuple[str, ...]], ...]
    groups: tuple[tuple[str, tuple[Line, ...]], ...]


@dataclass(frozen=True)
class Matrix:
    """Values between pairs, as rows; NaN where there are none."""

    title: str
    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


_ARROWS = {
    "higher": ("\N{UPWARDS ARROW}", "higher is better"),
    "lower": ("\N{DOWNWARDS ARROW}", "lower is better"),
}


def table_html(table: Table) -> str:
    """A table that scrolls by itself where the page is narrow."""
    heads = [(title, names) for title, names in table.heads if names]
    columns = 1 + sum(len(names) for _, names in heads)
    first = "".join(
        f'<th scope="colgroup" colspan="{len(names)}">{escape(title)}</th>'
        for title, names in heads
    )
    second = "".join(f'<th scope="col">{_words(name)}</th>' for _, names in heads for name in names)
    bodies = "".join(_group(title, rows, columns) for title, rows in table.groups)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f'<table class="means"><caption>{escape(table.caption)}</caption><thead>'
        f'<tr><th rowspan="2" scope="col">metric</th>{first}</tr><tr>{second}</tr></thead>'
        f"{bodies}</table></div>"
    )


def matrix_html(matrix: Matrix) -> str:
    """A matrix whose cells are the darker the larger their value."""
    heads = "".join(f'<th scope="col">{_words(name)}</th>' for name in matrix.names)
    rows = []
    for name, row in zip(matrix.names, matrix.values, strict=True):
        cells = "".join(_shaded(value) for value in row)
        rows.append(f'<tr><th scope="row">{_words(name)}</th>{cells}</tr>')
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(matrix.title)}">'
        f'<table class="matrix"><caption>{escape(matrix.title)}</caption><thead><tr>'
        f"<td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _group(title: str, rows: Sequence[Line], columns: int) -> str:
    head = (
        f'<tr><th class="group" scope="rowgroup" colspan="{columns}">{escape(title)}</th></tr>'
        if title
        else ""
    )
    return f"<tbody>{head}{''.join(_line(row) for row in rows)}</tbody>"


def _line(row: Line) -> str:
    arrow = ""
    if row.better:
        mark, words = _ARROWS[row.better]
        arrow = (
            f' <span aria-hidden="true" title="{words}">{mark}</span>'
            f'<span class="unseen">, {words}</span>'
        )
    cells = "".join(_cell(cell) for cell in row.cells)
    return f'<tr><th scope="row">{_words(row.name)}{arrow}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    if cell.why:
        return (
            f'<td class="soft" title="{escape(cell.why)}"><span aria-hidden="true">\N{EN DASH}'
            '</span><span class="unseen">not measured</span></td>'
        )
    kind = f' class="{cell.kind}"' if cell.kind else ""
    tag = f"<strong{kind}>{escape(cell.tag)}</strong> " if cell.tag else ""
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    best = (
        ' <span class="star" aria-hidden="true">\N{BLACK STAR}</span>'
        '<span class="unseen">best method</span>'
        if cell.best
        else ""
    )
    below = f'<span class="below">{escape(cell.below)}</span>' if cell.below else ""
    return f"<td>{tag}{text}{best}{below}</td>"


def _shaded(value: float) -> str:
    if math.isnan(value):
        return '<td class="soft">\N{EN DASH}</td>'
    share = 100.0 * min(1.0, abs(value))
    color = "--for" if value >= 0 else "--against"
    shown = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")
    return (
        f'<td style="background:color-mix(in srgb, var({color}) {0.55 * share:.0f}%, transparent)">'
        f"{shown}</td>"
    )


def _words(name: str) -> str:
    """A name that may be broken where it has underscores."""
    return escape(name).replace("_", " ")
