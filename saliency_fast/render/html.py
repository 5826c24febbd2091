"""Templates: the Jinja environment, and the figures, numbers and legends that pages share."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

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
    environment.filters |= {"percent": percent_text, "data_uri": data_uri}
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
