"""What the commands print: tables, and paths one per line."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saliency_fast import ops
from saliency_fast.methods import METHODS
from saliency_fast.render.pages import (
    Entry,
    MapMeasurements,
    memory_text,
    number_text,
    percent_text,
)

_PIPED, _PROSE = 160, 100
"""Columns of a table where the output is a file or a pipe: of numbers, and of sentences."""


def _print(heads: Sequence[str], rows: Iterable[Sequence[str]], piped: int = _PIPED) -> int:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        # Short notes fold, so that sentences beside them have room.
        table.add_column(head, overflow="fold", max_width=12 if head == "needs" else None)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    (console if console.is_terminal else Console(width=piped)).print(table)
    return 0


def methods(*_: object) -> int:
    rows = []
    for name, kind in METHODS.items():
        fields = [
            f"{one.name}={one.default!r}"
            for one in dataclasses.fields(kind)
            if one.default is not dataclasses.MISSING
        ]
        summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
        rows.append((name, " ".join(summary.split()), ", ".join(fields) or "none"))
    return _print(("method", "what it is", "fields"), rows)


def metrics(*_: object) -> int:
    # Evaluation is imported only where it is needed.
    from saliency_fast.evaluate.metric import ENTRIES, METRICS, fields_of

    words = {"masks": "boxes", "method": "to explain again"}
    rows = []
    for name, entry in ENTRIES.items():
        kind = METRICS[name]
        fields = [
            f"{one}={value:.4g}" if isinstance(value, float) else f"{one}={value!r}"
            for one, value in {**fields_of(kind), **entry.fields}.items()
        ]
        needs = ", ".join(words.get(one, one) for one in kind.needs) or "maps alone"
        rows.append((name, entry.asks, needs, ", ".join(fields) or "none"))
    return _print(("metric", "what it asks", "needs", "fields"), rows, _PROSE)


def backends(*_: object) -> int:
    return _print(("where", "what runs"), ops.backends().items())


def show_entries(entries: Sequence[Entry]) -> None:
    """One row for each map, and the summaries that were requested."""
    boxed = any(view.numbers.inside for entry in entries for view in entry.maps)
    heads = ["input", "predicted", "method", "explains"]
    heads += ["score", "delta", "error", "time", "memory"]
    rows = []
    for entry in entries:
        predicted = "\N{EN DASH}"
        if entry.ranking:
            label, probability = entry.ranking[0]
            predicted = f"{label} {percent_text(probability)}"
            if entry.truth not in (None, label):
                predicted += f" (truly {entry.truth})"
        for view in entry.maps:
            explains = view.explains.removeprefix("explains ")
            cells = _cells(view.numbers)
            rows.append((entry.name, predicted, view.method, explains, *cells))
    _print([*heads, *(["in the box (its area)"] if boxed else [])], rows)
    for entry in entries:
        for view in entry.maps:
            if view.words:
                print(f"{entry.name}, {view.method}: {view.words}\n")


def _cells(numbers: MapMeasurements) -> list[str]:
    delta = "none" if numbers.delta is None else number_text(numbers.delta)
    if numbers.delta is not None and numbers.gain:
        delta += f" ({percent_text(abs(numbers.delta / numbers.gain))})"
    cells = [
        number_text(numbers.score),
        delta,
        "unknown" if math.isnan(numbers.error) else percent_text(numbers.error),
        f"{numbers.seconds:.3g} s",
        memory_text(numbers),
    ]
    if numbers.inside:
        share, area = numbers.inside.share, numbers.inside.area
        cells.append(f"{percent_text(share)} ({percent_text(area)})")
    return cells


def show_paths(paths: Iterable[Path]) -> None:
    """Plain lines, so that they can be piped on."""
    print("written:", *paths, sep="\n")
