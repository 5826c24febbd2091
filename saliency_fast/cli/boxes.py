"""Boxes from files: where the object is in each input."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast.cli.inputs import ARRAYS, SEPARATOR, read_tensors
from saliency_fast.errors import InputError

EXPECTED = (
    "an .npy or .safetensors file of whole numbers [B, 2 D] or bool masks [B, *spatial], a .json "
    "list of boxes or mapping from names of inputs to boxes, or a .csv with a box in each line "
    "and, if wanted, a name before it; a box is top,left,bottom,right, half-open, in pixels"
)


def read_boxes(text: str, names: Sequence[str]) -> Tensor:
    """Boxes of the examples called `names`, int64 [B, 2 D], or masks bool [B, *spatial]."""
    path = Path(text.partition(SEPARATOR)[0])
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        found = read_tensors(text)
        if len(found) > 1:
            raise InputError(f"--boxes {text} holds {len(found)} tensors: name one, {found[0][1]}")
        tensor = found[0][2]
        return tensor if tensor.dtype == torch.bool else _whole(text, tensor)
    if not path.is_file():
        raise InputError(f"--boxes {text} does not exist or is not a file: expected {EXPECTED}")
    if suffix not in (".json", ".csv"):
        raise InputError(f"--boxes {text} is of no known kind: expected {EXPECTED}")
    try:
        rows = _json(path) if suffix == ".json" else _csv(path)
    except (ValueError, OSError) as error:
        raise InputError(f"--boxes {text} cannot be read: {error}; expected {EXPECTED}") from error
    if isinstance(rows, Mapping):
        missing = [name for name in names if name not in rows]
        if missing:
            raise InputError(
                f"--boxes {text} has no box for {', '.join(missing[:4])}: it names "
                f"{', '.join(list(rows)[:4])}"
            )
        rows = [rows[name] for name in names]
    if len(rows) != len(names):
        raise InputError(
            f"--boxes {text} must hold a box for each example: got {len(rows)} for {len(names)}"
        )
    try:
        boxes = torch.tensor(rows)
    except (TypeError, ValueError) as error:
        raise InputError(f"--boxes {text} holds no boxes: expected {EXPECTED}") from error
    return _whole(text, boxes)


def _whole(text: str, boxes: Tensor) -> Tensor:
    if boxes.is_floating_point() and not bool((boxes == boxes.round()).all()):
        raise InputError(f"--boxes {text} must hold whole numbers: expected {EXPECTED}")
    return boxes.long()


def _json(path: Path) -> Any:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, (list, dict)):
        raise ValueError(f"got {type(found).__name__}")
    return found


def _csv(path: Path) -> Any:
    """Rows of numbers, or by name where the first column is one; a head is passed over."""
    with path.open(encoding="utf-8", newline="") as opened:
        rows = [[cell.strip() for cell in row] for row in csv.reader(opened) if row]
    if rows and not _number(rows[0][-1]):
        rows = rows[1:]
    if rows and len(rows[0]) % 2:
        return {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    return [[int(cell) for cell in row] for row in rows]


def _number(text: str) -> bool:
    return text.lstrip("-").isdigit()
