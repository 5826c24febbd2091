"""The schema of attribution records: what every field and tensor of one must be.

A record's hash tells that nothing was altered by accident, and not that what was written makes
sense. So every field is checked against one table when a record is read, and tensors against each
other: what passes can be shown, mapped and replayed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saliency_fast.errors import RecordError
from saliency_fast.graph.passes.half import PRECISIONS
from saliency_fast.model.layout import LETTERS, Axes

_SHA256 = re.compile("[0-9a-f]{64}")
_KINDS = ("scalar", "classes", "predicted", "next_token", "places", "index", "function")
ROWS = ("alone", "together")


class Is(NamedTuple):
    """What a field of JSON must be: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


def _number(value: Any, kind: type, least: float) -> bool:
    return type(value) is kind and bool(least <= value < math.inf)  # type: ignore[operator]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _named(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(test, value.values()))


def _listed(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and value != [] and all(map(test, value))


def _or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _span(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2
    return whole and all(_number(one, int, 0) for one in value) and value[0] < value[1]


def _layout(value: Any) -> bool:
    letters = isinstance(value, str) and value[:1] == "B" and set(value) <= set(LETTERS)
    return value is None or (letters and len(set(value)) == len(value) > 1)


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _index(value: Any) -> bool:
    if isinstance(value, dict):
        ends = value.get("slice")
        optional = _or_none(lambda one: type(one) is int)
        return (
            len(value) == 1
            and isinstance(ends, list)
            and len(ends) == 3
            and all(map(optional, ends))
        )
    return type(value) is int or value == "..."


def _target(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("kind") not in _KINDS:
        return False
    more = {"index": _list_of_indices, "function": _text}
    name = {"index": "index", "function": "name"}.get(value["kind"])
    known = {"kind", name} - {None}
    return set(value) == known and (name is None or more[value["kind"]](value[name]))


def _list_of_indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_index, value))


def _baseline(value: Any) -> bool:
    if isinstance(value, dict):
        ((kind, inner),) = value.items() if len(value) == 1 else (("", None),)
        if kind == "tensor":
            return _text(inner)
        return kind in ("tuple", "list") and _listed(inner, _baseline)
    number = type(value) in (int, float) and math.isfinite(value)
    return value is None or number or _text(value)


_BOOL = Is("true or false", lambda value: isinstance(value, bool))
_ANY_TEXT = Is("text", lambda value: isinstance(value, str))
_TEXT = Is("text that is not empty", _text)
_NAMES = Is("names and values", lambda value: isinstance(value, dict))
REQUIRED: dict[str, Is] = {
    "method": _TEXT,
    "parameters": _NAMES,
    "target": Is(f"a kind, one of {', '.join(_KINDS)}, and what belongs to it", _target),
    "baseline": Is("null, a number, a name, or a tuple, list or tensor of these", _baseline),
    "precision": Is(
        f"one of {', '.join(PRECISIONS)}", lambda v: isinstance(v, str) and v in PRECISIONS
    ),
    "dtype": Is("the name of a dtype", _dtype),
    "device": _TEXT,
    "backend": _TEXT,
    "versions": Is("names and texts", lambda value: _named(value, _text)),
    "input_sha256": Is("null or SHA-256s", _or_none(lambda value: _listed(value, _sha256))),
    "weights_sha256": Is("null or a SHA-256", _or_none(_sha256)),
    "trained_mode": _BOOL,
    "seconds": Is("a number, 0 or more", lambda v: _number(v, float, 0) or _number(v, int, 0)),
    "peak_bytes": Is("a whole number, 0 or more", lambda value: _number(value, int, 0)),
    "peak_measured": _BOOL,
    "points_per_launch": Is("a whole number, 1 or more", lambda value: _number(value, int, 1)),
    "halvings": Is("a whole number, 0 or more", lambda value: _number(value, int, 0)),
}
OPTIONAL: dict[str, Is] = {
    "lean": _BOOL,
    "way": _ANY_TEXT,
    "region": Is("null, or a start and a stop per axis", _or_none(lambda v: _listed(v, _span))),
    "at": Is(
        "null, or names of layers", _or_none(lambda v: _listed(v, lambda n: isinstance(n, str)))
    ),
    "layer_input": _BOOL,
    "rows": Is(f"one of {', '.join(ROWS)}", lambda value: value in ROWS),
    "layout": Is(
        "null, or a letter per axis of each input", _or_none(lambda v: _listed(v, _layout))
    ),
    "notes": _NAMES,
}
FLOATS, WHOLE, TRUTH = (torch.float32, torch.float64), (torch.int64,), (torch.bool,)


class Holds(NamedTuple):
    """What a tensor must be: dtypes, whether its shape is that of the scores or [B], whether it
    must be there, whether its numbers must be finite, and the least of them.
    """

    dtypes: tuple[torch.dtype, ...]
    like: str = "scores"
    required: bool = False
    finite: bool = True
    least: float = -math.inf


TENSORS: dict[str, Holds] = {
    "scores": Holds((torch.float64,), required=True),
    "baseline_scores": Holds((torch.float64,)),
    "delta": Holds((torch.float64,)),
    "error": Holds((torch.float64,), required=True, finite=False, least=0),
    "classes": Holds(WHOLE, least=0),
    "points": Holds(WHOLE, "examples", required=True, least=0),
    "converged": Holds(TRUTH, "examples"),
    "precision_error": Holds((torch.float64,), finite=False, least=0),
    "tie_share": Holds((torch.float64,), "examples", finite=False, least=0),
}


def check(path: object, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Raises RecordError where a record of that path holds what no attribution does."""
    try:
        _check_fields(metadata)
        _check_tensors(tensors, metadata)
        _check_references(tensors, metadata["provenance"])
    except _BrokenError as error:
        raise RecordError(f"record {path} is not as its schema wants it: {error}") from error


class _BrokenError(Exception):
    """What is wrong with a record."""


def _need(right: bool, what: str, got: Any, expected: str) -> None:
    if not right:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise _BrokenError(f"{what}: got {shown}, expected {expected}")


def _check_fields(metadata: Mapping[str, Any]) -> None:
    known = {"schema", "tuple", "provenance"}
    _need(set(metadata) == known, "its fields", sorted(metadata), f"{sorted(known)}")
    _need(isinstance(metadata["tuple"], bool), "tuple", metadata["tuple"], "true or false")
    provenance = metadata["provenance"]
    _need(isinstance(provenance, dict), "provenance", provenance, "names and values")
    missing = [name for name in REQUIRED if name not in provenance]
    _need(not missing, "provenance lacks", missing, "all of its fields")
    for name, value in provenance.items():
        field = REQUIRED.get(name) or OPTIONAL.get(name)
        _need(field is not None, "provenance", name, "no such field")
        assert field is not None
        _need(field.test(value), name, value, field.words)


def _check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    names = [name for name in tensors if name.startswith("values.")]
    expected = [f"values.{number}" for number in range(len(names))]
    _need(sorted(names) == sorted(expected) and names != [], "its maps", names, "values.0 and on")
    several = metadata["tuple"] or len(names) == 1
    _need(several, "tuple", metadata["tuple"], f"true for {len(names)} maps")
    others = [n for n in tensors if not n.startswith(("values.", "kept.", "extras."))]
    _need(set(others) <= set(TENSORS), "its tensors", others, f"of {', '.join(TENSORS)}")
    for name, holds in TENSORS.items():
        _need(not holds.required or name in tensors, "a tensor is missing", name, "to be there")
    scores = tensors["scores"]
    shape = scores.shape
    _need(scores.dim() in (1, 2) and scores.numel() > 0, "scores", list(shape), "[B] or [B, K]")
    for name in others:
        holds = TENSORS[name]
        like = shape if holds.like == "scores" else shape[:1]
        _need_numbers(name, tensors[name], holds)
        _need(tensors[name].shape == like, name, list(tensors[name].shape), f"{list(like)}")
    double = metadata["provenance"]["dtype"] == "float64"
    for name in expected:
        one = tensors[name]
        _need_numbers(name, one, Holds(FLOATS))
        right = one.shape[: len(shape)] == shape and one.numel() > 0
        _need(right, name, list(one.shape), f"{list(shape)} and more axes")
        right = (one.dtype == torch.float64) == double or not double
        _need(right, name, one.dtype, "float64 for float64 inputs")
    for name in (one for one in tensors if one.startswith("extras.")):
        right = tensors[name].shape[:1] == shape[:1]
        _need(right, name, list(tensors[name].shape), f"{shape[0]} examples")


def _need_numbers(name: str, tensor: Tensor, holds: Holds) -> None:
    _need(tensor.dtype in holds.dtypes, name, tensor.dtype, f"{', '.join(map(str, holds.dtypes))}")
    if holds.finite and tensor.is_floating_point():
        _need(bool(tensor.isfinite().all()), name, "NaN or infinity", "finite numbers")
    if holds.least > -math.inf:
        # NaN is not known, and no number.
        _need(not bool((tensor < holds.least).any()), name, "less than 0", "0 or more")


def _check_references(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    kind, shape = provenance["target"]["kind"], tensors["scores"].shape
    if kind in ("classes", "predicted", "next_token"):
        _need("classes" in tensors, f"target {kind}", "no classes", "the tensor classes")
    if kind == "next_token":
        _check_position(tensors, shape[0])
    if kind == "places":
        places = tensors.get("kept.target.places")
        right = places is not None and places.dtype == torch.int64 and places.dim() == 2
        right = right and len(places) == shape[0] and places.numel() > 0  # type: ignore[arg-type,union-attr]
        _need(right, "target places", "other tensors", "kept.target.places, int64 [B, D]")
    for name in _tensors_of(provenance["baseline"]):
        _need(f"kept.{name}" in tensors, "baseline", name, "the name of a kept tensor")
    features = [name for name in tensors if name.startswith("kept.features.")]
    expected = [f"kept.features.{number}" for number in range(len(features))]
    _need(sorted(features) == sorted(expected), "its features", features, f"{expected}")
    whole = all(tensors[name].dtype == torch.int64 for name in features)
    _need(whole, "its features", "other dtypes", "torch.int64")
    _check_places(tensors, provenance)


def _check_position(tensors: Mapping[str, Tensor], batch: int) -> None:
    """Where the next tokens of texts stand, and which places of these are no padding."""
    position, real = tensors.get("kept.target.position"), tensors.get("kept.target.real")
    right = position is not None and position.dtype == torch.int64 and position.shape == (batch,)
    _need(right, "target next_token", "other tensors", "kept.target.position, int64 [B]")
    right = real is None or (real.dtype == torch.bool and real.dim() == 2 and len(real) == batch)
    _need(right, "target next_token", "another mask", "kept.target.real, bool [B, T]")


def _check_places(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Layouts, regions and their masks against the maps."""
    lead = tensors["scores"].dim()
    layouts = provenance.get("layout")
    maps = [tensors[f"values.{n}"] for n in range(sum(n.startswith("values.") for n in tensors))]
    axes = [1 + one.dim() - lead for one in maps]
    if layouts is not None:
        lengths = [None if one is None else len(one) for one in layouts]
        right = len(axes) == len(lengths)
        right = right and all(a in (b, None) for a, b in zip(lengths, axes, strict=True))
        _need(right, "layout", layouts, f"{axes} letters")
    region, mask = provenance.get("region"), tensors.get("kept.region.mask")
    letters = layouts[0] if layouts else None
    sizes = list(maps[0].shape[lead:])
    if letters is not None:
        sizes = [sizes[axis - 1] for axis in Axes(letters).places]
    if region is not None:
        sizes = sizes[-len(region) :]
        inside = len(sizes) == len(region)
        inside = inside and all(b <= n for (_, b), n in zip(region, sizes, strict=True))
        _need(inside, "region", region, f"within {sizes}")
    if mask is not None:
        right = mask.dtype == torch.bool and region is not None and list(mask.shape) == sizes
        _need(right, "kept.region.mask", list(mask.shape), f"bool {sizes}, with a region")


def _tensors_of(baseline: Any) -> list[str]:
    if not isinstance(baseline, dict):
        return []
    if "tensor" in baseline:
        return [baseline["tensor"]]
    return [name for part in next(iter(baseline.values())) for name in _tensors_of(part)]
