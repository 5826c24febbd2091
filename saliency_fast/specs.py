"""Targets, baselines and features as a record keeps them: plain ones as JSON, tensors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import RecordError
from saliency_fast.model.targets import NextToken, Targets


def describe_target(targets: Targets) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON, tensors) from which `restore_target` makes the same target again."""
    kept: dict[str, Tensor] = {}
    if targets.function is not None:
        name = getattr(targets.function, "__qualname__", type(targets.function).__name__)
        return {"kind": "function", "name": name}, kept
    if targets.position is not None:
        kept["target.position"] = targets.position
        if targets.padding.real is not None:
            kept["target.real"] = targets.padding.real
        return {"kind": "next_token"}, kept
    if targets.classes is not None or targets.predicted:
        return {"kind": "predicted" if targets.predicted else "classes"}, kept
    if targets.places is not None:
        kept["target.places"] = targets.places
        return {"kind": "places"}, kept
    if targets.index is None:
        return {"kind": "scalar"}, kept
    if targets.mask is not None:
        kept["target.mask"] = targets.mask
    return {"kind": "index", "index": [_part(one) for one in targets.index]}, kept


def restore_target(
    spec: Mapping[str, Any], classes: Tensor | None, many: bool, kept: Mapping[str, Tensor]
) -> Any:
    """The target of a record; raises RecordError for a function, which no record can hold."""
    kind = spec["kind"]
    if kind == "function":
        raise RecordError(
            f"the record's target is the function {spec['name']!r}, which a record cannot hold; "
            "pass it as target=..."
        )
    if kind in ("classes", "predicted"):
        assert classes is not None
        return classes if many else classes.flatten()
    if kind == "next_token":
        assert classes is not None
        token = classes if many else classes.flatten()
        return NextToken(token, kept["target.position"], kept.get("target.real"))
    if kind == "places":
        return [tuple(row) for row in kept["target.places"].tolist()]
    if kind == "index":
        index = tuple(_restored(one) for one in spec["index"])
        return (*index, kept["target.mask"]) if "target.mask" in kept else index
    return None


def _part(one: Any) -> Any:
    if isinstance(one, slice):
        return {"slice": [one.start, one.stop, one.step]}
    return "..." if one is Ellipsis else one


def _restored(one: Any) -> Any:
    if isinstance(one, dict):
        return slice(*one["slice"])
    return ... if one == "..." else one


def describe_baseline(baseline: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors) of a baseline as the user gave it."""
    kept: dict[str, Tensor] = {}

    def walk(one: Any) -> Any:
        if isinstance(one, Tensor):
            name = f"baseline.{len(kept)}"
            # A copy, since the user may write to the tensor later.
            kept[name] = one.detach().clone()
            return {"tensor": name}
        if isinstance(one, (tuple, list)):
            return {type(one).__name__: [walk(part) for part in one]}
        return one

    return walk(baseline), kept


def describe_features(features: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors of features, numbered per input."""
    return {f"features.{number}": one for number, one in enumerate(features)}


def restore_features(kept: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, ...] | None:
    """The features of a record, on `device`; None where it had none."""
    count = sum(name.startswith("features.") for name in kept)
    return tuple(kept[f"features.{number}"].to(device) for number in range(count)) or None


def restore_baseline(spec: Any, kept: Mapping[str, Tensor], device: torch.device) -> Any:
    """The baseline of a record, with its tensors on `device`."""
    if not isinstance(spec, dict):
        return spec
    if "tensor" in spec:
        return kept[spec["tensor"]].to(device)
    kind = "tuple" if "tuple" in spec else "list"
    parts = [restore_baseline(one, kept, device) for one in spec[kind]]
    return tuple(parts) if kind == "tuple" else parts
