"""Pages: the templates' environment, what pages share, and the page of explanations."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from saliency_fast.engine.memory import bytes_text
from saliency_fast.render.frames import STYLES, colors

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.environment import TemplateModule

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """An encoded picture. box: (left, top, width, height) of a frame, as shares of the picture."""

    data: bytes
    media: str
    width: int
    alt: str
    caption: str
    box: tuple[float, float, float, float] | None = None


def render(template: str, **context: Any) -> str:
    """Renders one of `templates/`; in HTML every value of the context is escaped."""
    return _environment().get_template(template).render(context)


def macros(template: str, **context: Any) -> TemplateModule:
    """The macros of one of `templates/` as functions."""
    return _environment().get_template(template).make_module(context)


@cache
def _environment() -> Environment:
    # Importing jinja2 takes as long as a small explanation, and most processes write no page.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("saliency_fast.render"),
        autoescape=lambda name: not (name or "").endswith(".txt.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": percent_text, "number": number_text, "data_uri": data_uri}
    environment.filters |= {"delta": delta_text, "error": error_text, "memory": memory_text}
    return environment


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{b64encode(data).decode('ascii')}"


def number_text(value: float) -> str:
    """Three significant digits with a typographic minus sign."""
    return f"{value:.3g}".replace("-", _MINUS)


def percent_text(share: float) -> str:
    """A share in per cent, with two decimals below 1 % and one above."""
    percent = 100.0 * share
    if percent < 0.01:
        return "under 0.01 %" if percent else "0 %"
    return f"{percent:.2f} %" if percent < 1 else f"{percent:.1f} %"


def legends(*styles: str) -> dict[str, str]:
    """The colour ramps of these overlay styles for the template, or of all of them."""
    return {style: _stops(style) for style in styles or STYLES}


def _stops(style: str) -> str:
    """A CSS gradient with the transparency of overlays: weak values let the picture show."""
    stops, table = [], colors(style).tolist()
    for number in range(0, 256, 15):
        red, green, blue = table[number]
        position = number / 255.0
        alpha = abs(2.0 * position - 1.0) if style == "signed" else position
        stops.append(f"rgba({red},{green},{blue},{alpha:.2f}) {100.0 * position:.1f}%")
    return ",".join(stops)


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
