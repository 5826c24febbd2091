"""Locations: where a part of an image, a signal or a volume lies, in words."""

from __future__ import annotations

from collections.abc import Sequence

LONG, EDGE = 2.0 / 3.0, 1.0 / 6.0
"""Shares of an axis: a longer part has no side, and a part within the last share is at the edge."""
MOST, FIRST, MIDDLE, LAST, START, END = "most", "first", "middle", "last", "start", "end"
KINDS = {1: "signal", 2: "image", 3: "volume"}
"""The name of an input by its number of spatial axes."""
_SIGNAL = {FIRST: "early part", LAST: "late part"}
_DEPTH = {FIRST: "front", MIDDLE: "middle depth", LAST: "back", START: "front", END: "back"}
_ROW = {FIRST: "upper", LAST: "lower", START: "upper", END: "lower"}
_COLUMN = {FIRST: "left", LAST: "right", START: "left", END: "right"}
_ENDS = (START, END)


def location(
    start: Sequence[int], stop: Sequence[int], centre: Sequence[float], size: Sequence[int]
) -> str:
    """Words for the half-open box from `start` to `stop` around `centre` in a space of `size`.

    Such as "upper left", "middle", "left edge", "late part", "front, lower part", or "most".
    """
    sides = [_side(*one) for one in zip(start, stop, centre, size, strict=True)]
    if len(sides) == 1:
        return _SIGNAL.get(sides[0], sides[0])
    if len(sides) == 2:
        return _in_plane(sides[0], sides[1])
    if len(sides) == 3:
        words = [_DEPTH.get(sides[0], MOST), _in_plane(sides[1], sides[2])]
        return ", ".join(one for one in words if one != MOST) or MOST
    return "places around (" + ", ".join(f"{one:.0f}" for one in centre) + ")"


def with_preposition(words: str) -> str:
    """A location with its preposition: "in the upper left", "at the end"."""
    if words == MOST:
        return "across most"
    if words.startswith("places"):
        return f"at {words}"
    return f"at the {words}" if words.endswith(("edge", "start", "end")) else f"in the {words}"


def _side(start: int, stop: int, centre: float, size: int) -> str:
    if stop - start > LONG * size:
        return MOST
    if stop <= EDGE * size:
        return START
    if start >= (1.0 - EDGE) * size:
        return END
    middle = (centre + 0.5) / size
    return FIRST if middle < 1.0 / 3.0 else LAST if middle > 2.0 / 3.0 else MIDDLE


def _in_plane(row: str, column: str) -> str:
    """Words for a side of the rows and a side of the columns."""
    vertical, horizontal = _ROW.get(row, ""), _COLUMN.get(column, "")
    if row in _ENDS and column in _ENDS:
        return f"{vertical} {horizontal} corner"
    if row in _ENDS:
        return "top edge" if row == START else "bottom edge"
    if column in _ENDS:
        return f"{horizontal} edge"
    if row == column == MOST:
        return MOST
    if vertical and horizontal:
        return f"{vertical} {horizontal}"
    if not vertical and not horizontal:
        return MIDDLE
    if MOST in (row, column):
        return f"{vertical or horizontal} part"
    return f"{vertical} middle" if vertical else f"middle {horizontal}"
