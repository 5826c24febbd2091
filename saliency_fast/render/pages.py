"""Pages: what the page of explanations and the page of an evaluation show, and both as HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saliency_fast.engine.memory import bytes_text
from saliency_fast.render.html import Figure, legends, number_text, percent_text, render

Pairs = tuple[tuple[str, str], ...]
"""(name, value) pairs."""


@dataclass(frozen=True)
class BoxEvidence:
    """The share of a map's positive evidence in a box, and the box's share of the picture."""

    share: float
    area: float


@dataclass(frozen=True)
class MapMeasurements:
    """Measured properties of a map. gain: score - baseline score. batch: examples of the call."""

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
    inside: BoxEvidence | None = None


@dataclass(frozen=True)
class MapView:
    """One map: method, explained output, pictures, the file of its record, and its summary."""

    method: str
    parameters: str
    explains: str
    figures: tuple[Figure, ...]
    numbers: MapMeasurements
    record: str
    words: str = ""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(name, value) pairs under the map."""
        numbers = self.numbers
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
        return [*facts, ("settings", self.parameters or "none"), ("record", self.record)]


@dataclass(frozen=True)
class Entry:
    """One input. ranking: classes and probabilities, empty where the model does not classify."""

    name: str
    source: str
    shape: str
    sha256: str | None
    figure: Figure | None
    ranking: tuple[tuple[str, float], ...]
    truth: str | None
    maps: tuple[MapView, ...]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """(name, value) pairs under the input."""
        facts = [("shape", self.shape), ("read from", self.source)]
        return [*facts, ("SHA-256", self.sha256)] if self.sha256 else facts


@dataclass(frozen=True)
class Page:
    """The whole page. facts: (name, value) pairs of the footer; command: reproduces the page."""

    title: str
    lead: str
    entries: tuple[Entry, ...]
    facts: Pairs
    command: str


def page_html(page: Page) -> str:
    """The page as one HTML document without scripts or external resources."""
    pictured = any(view.figures for one in page.entries for view in one.maps)
    return render("page.html.jinja", page=page, styles=legends() if pictured else {})


def delta_text(numbers: MapMeasurements) -> str:
    """The completeness delta and its share of the score's gain."""
    if numbers.delta is None:
        return "none: this method has no completeness"
    text = number_text(numbers.delta)
    if numbers.gain:
        text += f" ({percent_text(abs(numbers.delta / numbers.gain))} of the score's gain)"
    return text


def error_text(numbers: MapMeasurements) -> str:
    """The map's estimated relative L2 error."""
    if math.isnan(numbers.error):
        return "unknown"
    if numbers.error == 0 and numbers.points == 1:
        return "none: one gradient, not an average"
    text = f"{percent_text(numbers.error)} of the map (relative L2)"
    if numbers.converged is not None:
        text += ", within the tolerance" if numbers.converged else ", NOT within the tolerance"
    return text


def memory_text(numbers: MapMeasurements) -> str:
    how = "measured" if numbers.peak_measured else "planned"
    return f"{bytes_text(numbers.peak_bytes)} ({how})"
