"""Parts that pages share: the document itself, figures, lists of facts, numbers as text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from saliency_fast.render.frames import colors
from saliency_fast.render.style import CSS

# Pictures narrower than this are enlarged with their pixels left sharp.
_SMALL = 160
_MINUS = "\N{MINUS SIGN}"
_LEGENDS = {
    "signed": (
        *("Signed", "signed"),
        ("against the class", "no influence", "for the class"),
        "blue to red",
    ),
    "heat": ("Heat", "heat", ("no influence", "", "strongest, for or against"), "dark to pale"),
}


@dataclass(frozen=True)
class Figure:
    """A picture: `data` are the bytes of a `media` type; `width` in pixels.

    box: (left, top, width, height) as shares of the picture, drawn as a dashed frame.
    """

    data: bytes
    media: str
    width: int
    alt: str
    caption: str
    box: tuple[float, float, float, float] | None = None


def document(title: str, body: str) -> str:
    """A whole HTML document: no script, nothing loaded from elsewhere."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<div class="page">
{body}
</div>
</body>
</html>
"""


def number_text(value: float) -> str:
    """Three significant digits, with a typographic minus."""
    return f"{value:.3g}".replace("-", _MINUS)


def percent_text(share: float) -> str:
    """A share as per cent, with the digits that it deserves."""
    percent = 100.0 * share
    if percent < 0.01:
        return "under 0.01 %" if percent else "0 %"
    return f"{percent:.2f} %" if percent < 1 else f"{percent:.1f} %"


def figure_html(figure: Figure) -> str:
    """A picture inside of the page, with its frame and caption."""
    kind = ' class="pixels"' if figure.width < _SMALL else ""
    data = b64encode(figure.data).decode("ascii")
    box = ""
    if figure.box:
        sides = zip(("left", "top", "width", "height"), figure.box, strict=True)
        place = ";".join(f"{side}:{100.0 * share:.3f}%" for side, share in sides)
        box = f'<div class="box" style="{place}"></div>'
    return (
        f'<figure><div class="frame"><img{kind} src="data:{figure.media};base64,{data}" '
        f'alt="{escape(figure.alt)}">{box}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def pairs_html(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    rows = rows.replace(".safetensors", "<wbr>.safetensors")
    return f"<dl>{rows}</dl>"


def legends(*styles: str) -> str:
    """The colour ramps of overlays: of these styles, or of all."""
    shown = "".join(_legend(*_LEGENDS[style]) for style in styles or _LEGENDS)
    return f"""<section class="legends" aria-label="Colour legend">{shown}</section>"""


def _legend(title: str, style: str, ends: tuple[str, str, str], alt: str) -> str:
    """A colour ramp as the overlay draws it: the weaker, the more of the picture shows through."""
    stops = []
    table = colors(style).tolist()
    for number in range(0, 256, 15):
        red, green, blue = table[number]
        place = number / 255.0
        alpha = abs(2.0 * place - 1.0) if style == "signed" else place
        stops.append(f"rgba({red},{green},{blue},{alpha:.2f}) {100.0 * place:.1f}%")
    words = "".join(f"<span>{escape(end)}</span>" for end in ends)
    return (
        f'<div><h3 class="small">{escape(title)}</h3><div class="ramp" role="img" '
        f'aria-label="colours from {escape(alt)}" style="background-image:linear-gradient(90deg,'
        f'{",".join(stops)})"></div><div class="ends">{words}</div></div>'
    )
