"""Option values: methods, targets and baselines from text."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch

from saliency_fast.cli.inputs import ARRAYS, SEPARATOR, read_tensors
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError
from saliency_fast.methods import make_method


def read_methods(names: Sequence[str], fields: Sequence[str]) -> list[Method]:
    """Methods from `--method` and `--method-arg`; NAME.field=value picks one of several."""
    given = read_fields("--method-arg", names, fields)
    return [make_method(name, given.get(name, {})) for name in dict.fromkeys(names)]


def read_fields(
    option: str, names: Sequence[str], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Fields by the name that they are for; field=value alone where there is one name."""
    given: dict[str, dict[str, Any]] = {}
    single = len(set(names)) == 1
    for text in fields:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{option} must be field=value: got {text!r}")
        owner, dot, name = key.rpartition(".")
        if dot and owner not in names:
            what = option.removeprefix("--").removesuffix("-arg")
            raise InputError(
                f"{option} {text!r} is for a {what} that is not asked for: expected one of "
                f"{', '.join(dict.fromkeys(names))}"
            )
        if not dot and not single:
            raise InputError(
                f"{option} {text!r} does not say for which of "
                f"{', '.join(dict.fromkeys(names))}: write {names[0]}.{text}"
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
    if text.lower() == "none":
        return None
    if text.lower() == "predicted":
        return "predicted"
    value = literal(text.strip())
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, tuple) and value:
        if text.strip().startswith("("):
            return value
        if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            return list(value)
    raise InputError(
        f"--target must be none, predicted, a class such as 3, classes such as 3,5 (a map each), "
        f"or a tuple such as '(1,)' into a structured output: got {text!r}"
    )


def read_one_target(text: str, count: int) -> Any:
    """A target with one class per example: as `read_target`, or a file of `count` classes."""
    if text.partition(SEPARATOR)[0].lower().endswith(ARRAYS):
        classes = _one_tensor("--target", text)
        if classes.is_floating_point() or classes.shape != (count,):
            raise InputError(
                f"--target {text} must hold {count} whole numbers, a class for each example: got "
                f"{classes.dtype} {list(classes.shape)}"
            )
        return classes.long()
    found = read_target(text)
    if isinstance(found, list):
        raise InputError(
            "--target must be one class here, since one map of each example is judged: got "
            f"{text!r}"
        )
    return found


def read_baseline(text: str, device: str = "cpu") -> Any:
    """none, a number, a name, an .npy or .safetensors file, or a comma list of these."""
    parts = [_baseline(part.strip(), device) for part in text.split(",")]
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
    if not text.partition(SEPARATOR)[0].lower().endswith(ARRAYS):
        return text
    return _one_tensor("--features", text).to(device)


def _one_tensor(option: str, text: str) -> torch.Tensor:
    found = read_tensors(text)
    if len(found) > 1:
        raise InputError(f"{option} {text} holds {len(found)} tensors: name one, {found[0][1]}")
    return found[0][2]


def _baseline(text: str, device: str) -> Any:
    if text.lower() == "none":
        return None
    if text.partition(SEPARATOR)[0].lower().endswith(ARRAYS):
        return _one_tensor("--baseline", text).to(device)
    try:
        return float(text)
    except ValueError:
        # A name: the library knows which are valid.
        return text
