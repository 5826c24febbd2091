"""Values of options: methods, targets, baselines, layers, features and boxes."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast.cli.inputs import ARRAYS, SEPARATOR, names_array, read_tensor
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError
from saliency_fast.methods import make_method

BOXES = (
    "an .npy or .safetensors file of whole numbers [B, 2 D] or bool masks [B, *spatial], a .json "
    "list of boxes or mapping from names of inputs to boxes, or a .csv with a box in each line "
    "and, if wanted, a name before it; a box is top,left,bottom,right, half-open, in pixels"
)


def read_methods(names: Sequence[str], fields: Sequence[str]) -> list[Method]:
    """Methods from `--method` and `--method-arg`."""
    given = read_fields("--method-arg", names, fields)
    return [make_method(name, given.get(name, {})) for name in dict.fromkeys(names)]


def read_fields(
    option: str, names: Sequence[str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The fields of each name, from NAME.FIELD=VALUE, or FIELD=VALUE where there is one name."""
    given: dict[str, dict[str, Any]] = {}
    every = ", ".join(dict.fromkeys(names))
    for text in fields:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{option} must be field=value: got {text!r}")
        owner, dot, name = key.rpartition(".")
        if dot and owner not in names:
            what = option.removeprefix("--").removesuffix("-arg")
            raise InputError(
                f"{option} {text!r} is for a {what} that is not asked for: expected one of {every}"
            )
        if not dot and len(set(names)) > 1:
            raise InputError(
                f"{option} {text!r} does not say for which of {every}: write {names[0]}.{text}"
            )
        given.setdefault(owner or names[0], {})[name] = literal(value)
    return given


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_target(text: str) -> Any:
    """none, predicted, a class, classes 3,5 (a map each; returned as a list), or a tuple "(1,)"."""
    if text.lower() in ("none", "predicted"):
        return None if text.lower() == "none" else "predicted"
    value = literal(text.strip())
    if type(value) is int:
        return value
    if isinstance(value, tuple) and value:
        if text.strip().startswith("("):
            return value
        if all(type(one) is int for one in value):
            return list(value)
    raise InputError(
        f"--target must be none, predicted, a class such as 3, classes such as 3,5 (a map each), "
        f"or a tuple such as '(1,)' into a structured output: got {text!r}"
    )


def read_one_target(text: str, count: int) -> Any:
    """A target with one class per example: as `read_target`, or a file of `count` classes."""
    if names_array(text):
        classes = read_tensor("--target", text)
        if classes.is_floating_point() or classes.shape != (count,):
            raise InputError(
                f"--target {text} must hold {count} whole numbers, a class for each example: got "
                f"{classes.dtype} {list(classes.shape)}"
            )
        return classes.long()
    found = read_target(text)
    if isinstance(found, list):
        raise InputError(
            "--target must be one class here, since one map of each example is evaluated: got "
            f"{text!r}"
        )
    return found


def read_baseline(text: str, device: str = "cpu") -> Any:
    """none, a number, a name, an .npy or .safetensors file, or a comma list of these."""

    def one(part: str) -> Any:
        if part.lower() == "none":
            return None
        if names_array(part):
            return read_tensor("--baseline", part).to(device)
        try:
            return float(part)
        except ValueError:
            # A name: the library knows which are valid.
            return part

    parts = [one(part.strip()) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else parts


def read_at(text: str | None) -> Any:
    """A layer's name, several, or None."""
    if text is None:
        return None
    names = [one.strip() for one in text.split(",")]
    if not all(names):
        raise InputError(f"--at must be names of layers with commas between them: got {text!r}")
    return names[0] if len(names) == 1 else names


def read_features(text: str, device: str = "cpu") -> Any:
    """none, a name such as grid:8, or an .npy or .safetensors file of whole numbers."""
    if text.lower() == "none":
        return None
    return read_tensor("--features", text).to(device) if names_array(text) else text


def read_boxes(text: str, names: Sequence[str]) -> Tensor:
    """Boxes of the examples called `names`, int64 [B, 2 D], or masks bool [B, *spatial]."""
    path = Path(text.partition(SEPARATOR)[0])
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        boxes = read_tensor("--boxes", text)
        return boxes if boxes.dtype == torch.bool else _whole_numbers(text, boxes)
    if not path.is_file():
        raise InputError(f"--boxes {text} does not exist or is not a file: expected {BOXES}")
    if suffix not in (".json", ".csv"):
        raise InputError(f"--boxes {text} is of no known kind: expected {BOXES}")
    try:
        rows = _rows(path)
    except (ValueError, OSError) as error:
        raise InputError(f"--boxes {text} cannot be read: {error}; expected {BOXES}") from error
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
        raise InputError(f"--boxes {text} holds no boxes: expected {BOXES}") from error
    return _whole_numbers(text, boxes)


def _whole_numbers(text: str, boxes: Tensor) -> Tensor:
    if boxes.is_floating_point() and not bool((boxes == boxes.round()).all()):
        raise InputError(f"--boxes {text} must hold whole numbers: expected {BOXES}")
    return boxes.long()


def _rows(path: Path) -> Any:
    """Boxes in order, or by name where a .csv has a first column of names; headers are skipped."""
    if path.suffix.lower() == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, (list, dict)):
            raise ValueError(f"got {type(found).__name__}")
        return found
    with path.open(encoding="utf-8", newline="") as opened:
        rows = [[cell.strip() for cell in row] for row in csv.reader(opened) if row]
    if rows and not rows[0][-1].lstrip("-").isdigit():
        rows = rows[1:]
    if rows and len(rows[0]) % 2:
        return {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    return [[int(cell) for cell in row] for row in rows]
