"""One self-contained HTML page that shows inputs, their maps and what is known of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from saliency_fast.render.parts import (
    Figure,
    document,
    figure_html,
    legends,
    number_text,
    pairs_html,
    percent_text,
)


@dataclass(frozen=True)
class Inside:
    """Share of the map's positive evidence in a box, and the box's share of the picture."""

    share: float
    area: float


@dataclass(frozen=True)
class Numbers:
    """What is known of one map.

    delta: None for a method without completeness; gain: score - baseline score, which makes it
    relative. error: relative L2, 0 for exact methods, NaN where unknown. batch: the examples that
    share `seconds` and `peak_bytes`.
    """

    score: float
    gain: float | None
    delta: float | None
    error: float
    converged: bool | None
    points: int
    seconds: float
    peak_bytes: int
    peak_measured: bool
    batch: int = 1
    inside: Inside | None = None


@dataclass(frozen=True)
class MapView:
    """One map: its method, what it explains, its pictures, the record that holds it, and words."""

    method: str
    parameters: str
    explains: str
    figures: tuple[Figure, ...]
    numbers: Numbers
    record: str
    words: str = ""


@dataclass(frozen=True)
class Ranked:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Entry:
    """One input. ranking: the prediction first; empty where the model does not classify."""

    name: str
    source: str
    shape: str
    sha256: str | None
    figure: Figure | None
    ranking: tuple[Ranked, ...]
    truth: str | None
    maps: tuple[MapView, ...]


@dataclass(frozen=True)
class Page:
    """The whole page. facts: (name, value) pairs of the footer; command: reproduces the page."""

    title: str
    lead: str
    entries: tuple[Entry, ...]
    facts: tuple[tuple[str, str], ...]
    command: str


def page_html(page: Page) -> str:
    """The page as one HTML document: no script, nothing loaded from elsewhere."""
    entries = "\n".join(_entry(one) for one in page.entries)
    pictured = any(view.figures for one in page.entries for view in one.maps)
    body = f"""<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
</header>
{legends() if pictured else ""}
<main>
{entries}
</main>
<footer>
<h3>Reproduce this page</h3>
<pre><code>{escape(page.command)}</code></pre>
<h3>What it rests on</h3>
{pairs_html(page.facts)}
</footer>"""
    return document(page.title, body)


def delta_text(numbers: Numbers) -> str:
    """The completeness delta and its share of the score's gain."""
    if numbers.delta is None:
        return "none: this method has no completeness"
    text = number_text(numbers.delta)
    if numbers.gain:
        text += f" ({percent_text(abs(numbers.delta / numbers.gain))} of the score's gain)"
    return text


def error_text(numbers: Numbers) -> str:
    """The map's estimated relative L2 error."""
    if math.isnan(numbers.error):
        return "unknown"
    if numbers.error == 0 and numbers.points == 1:
        return "none: one gradient, not an average"
    text = f"{percent_text(numbers.error)} of the map (relative L2)"
    if numbers.converged is not None:
        text += ", within the tolerance" if numbers.converged else ", NOT within the tolerance"
    return text


def memory_text(numbers: Numbers) -> str:
    """Peak memory, and whether it was measured."""
    count, unit = float(numbers.peak_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    how = "measured" if numbers.peak_measured else "planned"
    return f"{count:.0f} {unit} ({how})" if unit == "B" else f"{count:.1f} {unit} ({how})"


def _entry(entry: Entry) -> str:
    maps = "\n".join(_map(view) for view in entry.maps)
    picture = figure_html(entry.figure) if entry.figure else '<p class="soft">No picture.</p>'
    facts = [("shape", entry.shape), ("read from", entry.source)]
    if entry.sha256:
        facts.append(("SHA-256", entry.sha256))
    return f"""<article class="card">
<div class="head"><h2>{escape(entry.name)}</h2>{_verdict(entry)}</div>
<div class="columns">
<div class="input">
{picture}
{_ranking(entry.ranking)}
</div>
<div class="maps">
{maps}
</div>
</div>
{pairs_html(facts)}
</article>"""


def _verdict(entry: Entry) -> str:
    if not entry.ranking:
        return ""
    best = entry.ranking[0]
    said = f"predicted <strong>{escape(best.label)}</strong>, {percent_text(best.probability)}"
    if entry.truth is not None:
        right = entry.truth == best.label
        word = "right" if right else "wrong"
        said += f' · truly {escape(entry.truth)}: <span class="{word}">{word}</span>'
    return f'<div class="verdict">{said}</div>'


def _ranking(ranking: tuple[Ranked, ...]) -> str:
    rows = []
    for number, one in enumerate(ranking):
        kind = ' class="first"' if number == 0 else ""
        width = f"{100.0 * min(max(one.probability, 0.0), 1.0):.2f}%"
        rows.append(
            f'<li{kind}><div class="row"><span class="name">{escape(one.label)}</span>'
            f"<span>{percent_text(one.probability)}</span></div>"
            f'<div class="track"><div class="fill" style="width:{width}"></div></div></li>'
        )
    return f'<ol class="ranking">{"".join(rows)}</ol>' if rows else ""


def _map(view: MapView) -> str:
    figures = "\n".join(figure_html(one) for one in view.figures)
    pictures = f'<div class="pair">{figures}</div>' if figures else ""
    if view.words:
        pictures += f'\n<p class="small">{escape(view.words)}</p>'
    return f"""<section class="method">
<h3>{escape(view.method)}</h3>
<p class="small soft">{escape(view.explains)}</p>
{pictures}
{pairs_html(_facts(view))}
</section>"""


def _facts(view: MapView) -> list[tuple[str, str]]:
    numbers = view.numbers
    shared = f", for {numbers.batch} examples together" if numbers.batch > 1 else ""
    facts = [
        ("score explained", number_text(numbers.score)),
        ("completeness delta", delta_text(numbers)),
        ("estimated error", error_text(numbers)),
        ("points", f"{numbers.points} gradients"),
        ("wall time", f"{numbers.seconds:.3g} s{shared}"),
        ("peak memory", memory_text(numbers) + shared),
    ]
    if numbers.inside:
        share, area = percent_text(numbers.inside.share), percent_text(numbers.inside.area)
        facts.append(("evidence in the box", f"{share}; the box covers {area} of the picture"))
    return [*facts, ("settings", view.parameters or "none"), ("record", view.record)]
