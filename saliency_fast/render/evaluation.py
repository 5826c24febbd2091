"""The page of an evaluation: verdicts, tables with intervals, curves, maps and the protocol."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.render.html import Figure, legends, render


@dataclass(frozen=True)
class Cell:
    """A cell of a table of means.

    text: in normal size; below: in small print. tag: a word before the text. kind: the colour of
    the tag, "", "soft", "good" or "bad". best: whether the cell is bold and has a star. why: the
    reason for an empty cell.
    """

    text: str
    below: str = ""
    tag: str = ""
    kind: str = ""
    best: bool = False
    why: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table. better: the better direction, "higher", "lower" or ""."""

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
    """Values of pairs, as rows; NaN where there is none. Larger values get darker cells."""

    title: str
    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Drawn:
    """A plot as PNG for light and for dark pages."""

    light: bytes
    dark: bytes
    alt: str


@dataclass(frozen=True)
class Option:
    """A parameter of a metric."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Described:
    """A metric: the question it answers, its curves and its whole protocol."""

    name: str
    better: str
    group: str
    asks: str
    paper: str
    options: tuple[Option, ...]
    caveats: tuple[str, ...]
    seconds: str
    drawn: Drawn | None = None


@dataclass(frozen=True)
class Sample:
    """An example: its name, the input and every map over it."""

    name: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Evaluation:
    """The whole page.

    verdicts: (good, bad or plain; sentence). notes: parts that this page lacks. unmeasured: (metric
    and method, reason). facts: (name, value) pairs of the footer. command: reproduces the page.
    """

    title: str
    lead: str
    verdicts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    samples: tuple[Sample, ...]
    metrics: tuple[Described, ...]
    matrices: tuple[Matrix, ...]
    unmeasured: tuple[tuple[str, str], ...]
    caveats: tuple[str, ...]
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    command: str


def evaluation_html(page: Evaluation) -> str:
    """The page as one HTML document without scripts or external resources."""
    has_boxes = any(figure.box for one in page.samples for figure in one.figures)
    return render("evaluation.html.jinja", page=page, styles=legends("signed"), has_boxes=has_boxes)
