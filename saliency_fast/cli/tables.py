"""What the commands print: tables for people, and paths one per line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saliency_fast.methods import METHODS
from saliency_fast.ops import backends
from saliency_fast.render.page import Entry, Numbers, memory_text
from saliency_fast.render.parts import number_text, percent_text

# Wide enough for whole rows where the output is a file or a pipe.
_PIPED = 160
# Sentences read well in less; what they need beside them folds.
_PROSE, _NEEDS = 100, 12


def show_methods() -> int:
    """saliency-fast methods: every method, its fields and defaults."""
    table = _table("method", "what it is", "fields")
    for name, kind in METHODS.items():
        fields = [
            f"{one.name}={one.default!r}"
            for one in dataclasses.fields(kind)
            if one.default is not dataclasses.MISSING
        ]
        what = (kind.__doc__ or "").split(".\n")[0].replace("\n", " ")
        table.add_row(Text(name), Text(" ".join(what.split())), Text(", ".join(fields) or "none"))
    _print(table)
    return 0


def show_metrics() -> int:
    """saliency-fast metrics: every metric of a report, its fields and defaults."""
    # The library's evaluation is imported only where it is asked for.
    from saliency_fast.evaluate.metric import ENTRIES, METRICS, fields_of

    needs = {"masks": "boxes", "method": "to explain again"}
    table = _table("metric", "what it asks", "needs", "fields")
    table.columns[2].max_width = _NEEDS
    for name, entry in ENTRIES.items():
        kind = METRICS[name]
        given = {**fields_of(kind), **entry.fields}
        fields = [f"{one}={_short(value)}" for one, value in given.items()]
        needed = [needs.get(one, one) for one in kind.needs]
        table.add_row(
            Text(name),
            Text(entry.asks),
            Text(", ".join(needed) or "maps alone"),
            Text(", ".join(fields) or "none"),
        )
    _print(table, _PROSE)
    return 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def show_backends() -> int:
    """saliency-fast backends: which version of the ops runs where."""
    table = _table("where", "what runs")
    for name, text in backends().items():
        table.add_row(Text(name), Text(text))
    _print(table)
    return 0


def show_entries(entries: Iterable[Entry]) -> None:
    """One row for each map."""
    entries = list(entries)
    boxed = any(view.numbers.inside for entry in entries for view in entry.maps)
    heads = [
        "input",
        "predicted",
        "method",
        "explains",
        "score",
        "delta",
        "error",
        "time",
        "memory",
    ]
    table = _table(*heads, *(["in the box (its area)"] if boxed else []))
    for entry in entries:
        best = entry.ranking[0] if entry.ranking else None
        said = f"{best.label} {percent_text(best.probability)}" if best else "\N{EN DASH}"
        if best and entry.truth is not None and entry.truth != best.label:
            said += f" (truly {entry.truth})"
        for view in entry.maps:
            cells = [entry.name, said, view.method, view.explains.removeprefix("explains ")]
            table.add_row(*(Text(one) for one in cells + _cells(view.numbers, boxed)))
    _print(table)


def show_words(entries: Iterable[Entry]) -> None:
    """What each map says, where it was asked for."""
    for entry in entries:
        for view in entry.maps:
            if view.words:
                print(f"{entry.name}, {view.method}: {view.words}\n")


def show_paths(paths: Sequence[Path]) -> None:
    """Plain lines, so that they can be piped on."""
    print("written:")
    for path in paths:
        print(path)


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair per line."""
    for name, value in pairs:
        print(f"{name:<12} {value}")


def _cells(numbers: Numbers, boxed: bool) -> list[str]:
    delta = "none" if numbers.delta is None else number_text(numbers.delta)
    if numbers.delta is not None and numbers.gain:
        delta += f" ({percent_text(abs(numbers.delta / numbers.gain))})"
    error = "unknown" if numbers.error != numbers.error else percent_text(numbers.error)
    cells = [
        number_text(numbers.score),
        delta,
        error,
        f"{numbers.seconds:.3g} s",
        memory_text(numbers),
    ]
    if boxed and numbers.inside:
        share, area = numbers.inside.share, numbers.inside.area
        cells.append(f"{percent_text(share)} ({percent_text(area)})")
    return cells


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _print(table: Table, piped: int = _PIPED) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=piped)).print(table)
