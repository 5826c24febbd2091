"""Tokens side by side: as plain text, and as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Row = tuple[str, bool, Mapping[str, float]]
"""(token, whether special, its number in each column)."""
TITLES = {
    "attribution": "attribution",
    "attention": "attention",
    "rollout": "rollout",
    "gradient_attention": "grad. attention",
}
AGREES = "rank correlation with |attribution|"
NOTE = "Attention says where the model looked, attribution what its answer rests on."
_WARM, _COOL = "214, 69, 45", "45, 108, 214"


def table(rows: Sequence[Row], facts: str, ranks: Mapping[str, float]) -> str:
    """One text: a line per token, special ones in brackets, and how far attention agrees."""
    names = list(rows[0][2])
    labels = [f"({token})" if special else token for token, special, _ in rows]
    width = max(len(one) for one in (*labels, "token"))
    head = "token".ljust(width) + "".join(f"  {TITLES[name]:>15}" for name in names)
    lines = [facts, head, "-" * len(head)]
    for label, (_, _, numbers) in zip(labels, rows, strict=True):
        lines.append(label.ljust(width) + "".join(f"  {numbers[name]:>15.3g}" for name in names))
    if ranks:
        shown = ", ".join(f"{TITLES[name]} {_number(value)}" for name, value in ranks.items())
        lines.append(f"{AGREES}: {shown}")
    return "\n".join(lines)


def html(texts: Sequence[tuple[Sequence[Row], str, Mapping[str, float]]]) -> str:
    """All texts: a line of shaded tokens per column; warm is for the score, cool against it."""
    parts = [_text(*one) for one in texts]
    return f'<div class="tokens">{"".join(parts)}<p><small>{escape(NOTE)}</small></p></div>'


def _text(rows: Sequence[Row], facts: str, ranks: Mapping[str, float]) -> str:
    lines = []
    for name in rows[0][2]:
        # Special tokens draw most of the attention: they would leave no shade for the others.
        own = [abs(numbers[name]) for _, special, numbers in rows if not special]
        top = max((one for one in own if math.isfinite(one)), default=0.0)
        spans = "".join(
            _span(token, special, numbers[name], top) for token, special, numbers in rows
        )
        agrees = f" title={_quoted(f'{AGREES}: {_number(ranks[name])}')}" if name in ranks else ""
        lines.append(f"<tr><th align='left'{agrees}>{TITLES[name]}</th><td>{spans}</td></tr>")
    shown = [f"{TITLES[name]} {_number(value)}" for name, value in ranks.items()]
    agreement = f"<p><small>{AGREES}: {', '.join(shown)}</small></p>" if shown else ""
    return f"<p><small>{escape(facts)}</small></p><table>{''.join(lines)}</table>{agreement}"


def _span(token: str, special: bool, value: float, top: float) -> str:
    share = min(abs(value) / top, 1.0) if top and math.isfinite(value) and not special else 0.0
    color = f"rgba({_WARM if value > 0 else _COOL}, {0.75 * share:.3f})"
    style = f"background: {color}; padding: 1px 3px; margin: 1px; border-radius: 3px"
    style += "; opacity: .5" if special else ""
    return f"<span style={_quoted(style)} title={_quoted(f'{value:.4g}')}>{escape(token)}</span> "


def _quoted(value: str) -> str:
    return f'"{escape(value, quote=True)}"'


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:+.2f}"
