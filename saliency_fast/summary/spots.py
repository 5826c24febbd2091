"""Spots: where a part of an image, a signal or a volume lies, in words."""

from __future__ import annotations

from collections.abc import Sequence

WHOLE, EDGE = 2.0 / 3.0, 1.0 / 6.0
"""Shares of an axis: what is longer has no side, and what ends before lies at the edge."""
MOST, FIRST, MIDDLE, LAST, START, END = "most", "first", "middle", "last", "start", "end"
KINDS = {1: "signal", 2: "image", 3: "volume"}
"""What an input is called, by its spatial axes."""


def spot(
    start: Sequence[int], stop: Sequence[int], centre: Sequence[float], size: Sequence[int]
) -> str:
    """Words for a box from `start` to `stop` (half-open) with its `centre`, in places, in a space
    of `size`: "upper left", "middle", "left edge", "late part", "front, lower part", or "most".
    """
    sides = [_side(*one) for one in zip(start, stop, centre, size, strict=True)]
    if len(sides) == 1:
        return _LINE[sides[0]]
    if len(sides) == 2:
        return _plane(sides[0], sides[1])
    if len(sides) == 3:
        depth, plane = _DEPTH[sides[0]], _plane(sides[1], sides[2])
        return ", ".join(one for one in (depth, plane) if one != MOST) or MOST
    return "places around (" + ", ".join(f"{one:.0f}" for one in centre) + ")"


def at(words: str) -> str:
    """The words of a spot with what comes before them: "in the upper left", "at the end"."""
    if words == MOST:
        return "across most"
    if words.startswith("places"):
        return f"at {words}"
    return f"at the {words}" if words.endswith(("edge", "start", "end")) else f"in the {words}"


def _side(start: int, stop: int, centre: float, size: int) -> str:
    if stop - start > WHOLE * size:
        return MOST
    if stop <= EDGE * size:
        return START
    if start >= (1.0 - EDGE) * size:
        return END
    middle = (centre + 0.5) / size
    return FIRST if middle < 1.0 / 3.0 else LAST if middle > 2.0 / 3.0 else MIDDLE


_LINE = {
    MOST: MOST,
    FIRST: "early part",
    MIDDLE: "middle",
    LAST: "late part",
    START: "start",
    END: "end",
}
_DEPTH = {
    MOST: MOST,
    FIRST: "front",
    MIDDLE: "middle depth",
    LAST: "back",
    START: "front",
    END: "back",
}
_ROW = {FIRST: "upper", LAST: "lower", START: "upper", END: "lower"}
_COLUMN = {FIRST: "left", LAST: "right", START: "left", END: "right"}
_ENDS = (START, END)


def _plane(row: str, column: str) -> str:
    """Words for a side of the rows and one of the columns."""
    up, across = _ROW.get(row, ""), _COLUMN.get(column, "")
    if row in _ENDS and column in _ENDS:
        return f"{up} {across} corner"
    if row in _ENDS:
        return "top edge" if row == START else "bottom edge"
    if column in _ENDS:
        return f"{across} edge"
    if row == MOST and column == MOST:
        return MOST
    if up and across:
        return f"{up} {across}"
    if not up and not across:
        return MIDDLE
    if MOST in (row, column):
        return f"{up or across} part"
    return f"{up} middle" if up else f"middle {across}"
