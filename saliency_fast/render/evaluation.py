"""The page of an evaluation: verdicts, tables with intervals, curves, maps and the protocol."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from saliency_fast.render.parts import Figure, document, figure_html, legends, pairs_html
from saliency_fast.render.tables import Matrix, Table, matrix_html, table_html

_MARKS = {
    "good": ("good", "\N{CHECK MARK}", "Good: "),
    "bad": ("bad", "\N{MULTIPLICATION X}", "Bad: "),
    "plain": ("soft", "\N{BULLET}", ""),
}


@dataclass(frozen=True)
class Drawn:
    """A plot: PNG for light and for dark pages."""

    light: bytes
    dark: bytes
    alt: str


@dataclass(frozen=True)
class Option:
    """A parameter of a metric: its value, and what it is."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Described:
    """A metric: what it asks, its curves, and the whole protocol."""

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
    """An example: its name, the input, and every map over it."""

    name: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Evaluation:
    """The whole page. verdicts: (good, bad or plain; sentence). notes: what is missing from the
    page itself. facts: (name, value) pairs of the footer; command: makes the page again.
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
    """The page as one HTML document: no script, nothing loaded from elsewhere."""
    parts = [
        f'<header>\n<h1>{escape(page.title)}</h1>\n<p class="lead">{escape(page.lead)}</p>'
        "\n</header>\n<main>",
        _notes(page.notes),
        _verdicts(page.verdicts),
        *(_card(one.title, table_html(one)) for one in page.tables),
        _caveats(page),
        _samples(page.samples),
        *(_metric(one) for one in page.metrics),
        _agreement(page.matrices),
        "</main>",
        _footer(page),
    ]
    return document(page.title, "\n".join(part for part in parts if part))


def _card(title: str, body: str, beside: str = "") -> str:
    return (
        f'<section class="card"><div class="head"><h2>{escape(title)}</h2>{beside}</div>\n{body}\n'
        "</section>"
    )


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="notice">{escape(one)}</p>' for one in notes)


def _verdicts(verdicts: Sequence[tuple[str, str]]) -> str:
    rows = []
    for kind, text in verdicts:
        name, mark, word = _MARKS[kind]
        rows.append(
            f'<li class="{name}"><span class="mark" aria-hidden="true">{mark}</span><span>'
            f'<span class="unseen">{word}</span>{escape(text)}</span></li>'
        )
    return _card("In short", f'<ul class="verdicts">{"".join(rows)}</ul>') if rows else ""


def _caveats(page: Evaluation) -> str:
    if not page.caveats and not page.unmeasured:
        return ""
    body = ""
    if page.caveats:
        items = "".join(f"<li>{escape(one)}</li>" for one in page.caveats)
        body += f'<ul class="plain">{items}</ul>'
    if page.unmeasured:
        body += f"<h3>Not measured</h3>{pairs_html(page.unmeasured)}"
    return _card("What to keep in mind", body)


def _samples(samples: Sequence[Sample]) -> str:
    rows = []
    for one in samples:
        figures = "".join(figure_html(figure) for figure in one.figures)
        rows.append(f'<h3>{escape(one.name)}</h3><div class="strip">{figures}</div>')
    if not rows:
        return ""
    told = "The first examples, in order and not chosen."
    if any(figure.box for one in samples for figure in one.figures):
        told += " The dashed frame is where the object is; no method is told."
    return _card("The maps", f'<p class="soft">{told}</p>{legends("signed")}{"".join(rows)}')


def _metric(metric: Described) -> str:
    better = f"{metric.better} is better" if metric.better else "neither direction is better"
    body = [f"<p>{escape(metric.asks)}</p>"]
    if metric.drawn is not None:
        body.append(_picture(metric.drawn))
    body += [f'<p class="small soft">Note: {escape(one)}</p>' for one in metric.caveats]
    rows = "".join(
        f'<tr><th scope="row">{escape(one.name)}</th><td>{escape(one.value)}</td>'
        f"<td>{escape(one.meaning)}</td></tr>"
        for one in metric.options
    )
    if rows:
        body.append(
            '<details open><summary>Protocol</summary><div class="wide"><table class="options">'
            '<thead><tr><th scope="col">parameter</th><th scope="col">value</th>'
            f'<th scope="col">what it is</th></tr></thead><tbody>{rows}</tbody></table></div>'
            "</details>"
        )
    facts = [("paper", metric.paper)] if metric.paper else []
    body.append(pairs_html([*facts, ("took", metric.seconds)]))
    beside = f'<div class="verdict soft">{escape(metric.group)} · {better}</div>'
    return _card(metric.name, "\n".join(body), beside)


def _picture(drawn: Drawn) -> str:
    light, dark = (b64encode(one).decode("ascii") for one in (drawn.light, drawn.dark))
    return (
        '<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img class="plot" '
        f'src="data:image/png;base64,{light}" alt="{escape(drawn.alt)}"></picture>'
    )


def _agreement(matrices: Sequence[Matrix]) -> str:
    if not matrices:
        return ""
    told = (
        "How alike the maps of two methods are on the same examples, averaged. Agreement is no "
        "proof: methods can be wrong together."
    )
    tables = "".join(f"<div>{matrix_html(one)}</div>" for one in matrices)
    return _card(
        "Agreement between methods", f'<p class="soft">{told}</p><div class="pairs">{tables}</div>'
    )


def _footer(page: Evaluation) -> str:
    again = ""
    if page.command:
        again = f"<h3>Make this page again</h3>\n<pre><code>{escape(page.command)}</code></pre>\n"
    return f"<footer>\n{again}<h3>What it rests on</h3>\n{pairs_html(page.facts)}\n</footer>"
