"""Words with their attributions as HTML, under Captum's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy.typing as npt
from torch import Tensor

from saliency_fast.errors import ContractError

_TITLES = (
    "True Label",
    "Predicted Label",
    "Attribution Label",
    "Attribution Score",
    "Word Importance",
)
_KEY = ((-1, "Negative"), (0, "Neutral"), (1, "Positive"))


@dataclass(slots=True, eq=False, repr=False)
class VisualizationDataRecord:
    """One row of `visualize_text`: a text's words, what each of them adds, and the classes."""

    word_attributions: Tensor
    pred_prob: float
    pred_class: int
    true_class: int
    attr_class: int
    attr_score: float
    raw_input_ids: list[str]
    convergence_score: float


def format_classname(classname: object) -> str:
    """A class as a cell of the table."""
    return f'<td><text style="padding-right:2em"><b>{_plain(classname)}</b></text></td>'


def format_special_tokens(token: str) -> str:
    """`<pad>` as `#pad`; other tokens as they are."""
    if token.startswith("<") and token.endswith(">"):
        return "#" + token.strip("<>")
    return token


def format_tooltip(item: str, text: str) -> str:
    """An item that shows a text when pointed at."""
    return f'<div class="tooltip">{item}<span class="tooltiptext">{text}</span></div>'


def format_word_importances(
    words: Sequence[str], importances: Sequence[float] | Tensor | npt.NDArray[Any] | None
) -> str:
    """Words as a cell of the table, each on a colour: green for, red against."""
    if importances is None or len(importances) == 0:
        return "<td></td>"
    if len(shape := getattr(importances, "shape", (0,))) != 1:
        raise ContractError(
            f"Expected 1D array, got {shape}; add the attributions of a word up first"
        )
    if len(words) > len(importances):
        raise ContractError(
            f"words are more than their importances: got {len(words)} words and "
            f"{len(importances)} importances; pass one for each word"
        )
    marks = [
        f'<mark style="background-color: {_colour(float(importance))}; opacity:1.0; '
        f'line-height:1.75"><font color="black"> {_plain(format_special_tokens(word))} '
        "</font></mark>"
        for word, importance in zip(words, importances[: len(words)], strict=True)
    ]
    return f"<td>{''.join(marks)}</td>"


def visualize_text(datarecords: Iterable[VisualizationDataRecord], legend: bool = True) -> Any:
    """Shows a table of texts in a notebook, and returns it as IPython's HTML."""
    try:
        from IPython.display import HTML, display
    except ImportError as error:
        raise ContractError(
            "IPython must be available to visualize text: got no module of that name; run "
            "'pip install ipython'"
        ) from error
    titles = "".join(f"<th>{title}</th>" for title in _TITLES)
    rows = "".join(f"<tr>{_cells(one)}</tr>" for one in datarecords)
    table = f'<table style="width: 100%"><tr>{titles}</tr>{rows}</table>'
    html = HTML((_legend() if legend else "") + table)
    display(html)
    return html


def _cells(record: VisualizationDataRecord) -> str:
    predicted = f"{record.pred_class} ({record.pred_prob:.2f})"
    classes = (record.true_class, predicted, record.attr_class, f"{record.attr_score:.2f}")
    words = format_word_importances(record.raw_input_ids, record.word_attributions)
    return "".join(map(format_classname, classes)) + words


def _legend() -> str:
    square = "display: inline-block; width: 10px; height: 10px; border: 1px solid"
    keys = "".join(
        f'<span style="{square}; background-color: {_colour(value)}"></span> {label}  '
        for value, label in _KEY
    )
    frame = "border-top: 1px solid; margin-top: 5px; padding-top: 5px; display: inline-block"
    return f'<div style="{frame}"><b>Legend: </b>{keys}</div>'


def _colour(importance: float) -> str:
    """White at 0, green up to 1, red down to -1."""
    clipped = max(-1.0, min(1.0, importance))
    if clipped > 0:
        return f"hsl(120, 75%, {100 - int(50 * clipped)}%)"
    return f"hsl(0, 75%, {100 - int(-40 * clipped)}%)"


def _plain(text: object) -> str:
    """Text that a page shows as it is."""
    return escape(str(text), quote=False)
