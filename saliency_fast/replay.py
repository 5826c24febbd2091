"""Replay: compute a record again and say whether it agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saliency_fast import record
from saliency_fast._types import Inputs
from saliency_fast.api import Engine
from saliency_fast.attribution import REGION_MASK, Attribution, load, relative_l2
from saliency_fast.errors import InputError, RecordError
from saliency_fast.methods import make_method
from saliency_fast.specs import restore_baseline, restore_features, restore_target

TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative L2 distance within which two runs agree, by the model's type: rounding, amplified by a
model's kinks. A precision may move a map as far as it was found to."""
OF_WHOLE = TOLERANCE["float32"]
"""The same of inputs that are whole numbers, whatever the model's type."""


@dataclass(frozen=True)
class Replay:
    """Whether a record agrees with the attribution computed again, and if not, why.

    error: relative L2 distance of the maps. input_matches, weights_match: by SHA-256; None where
    the record holds no hash.
    """

    agrees: bool
    error: float
    tolerance: float
    input_matches: bool | None
    weights_match: bool | None
    again: Attribution

    def __bool__(self) -> bool:
        return self.agrees

    def __str__(self) -> str:
        lines = [
            f"{'agrees' if self.agrees else 'DISAGREES'}: relative L2 distance {self.error:.2e}, "
            f"tolerance {self.tolerance:.0e}"
        ]
        for what, same in (("input", self.input_matches), ("weights", self.weights_match)):
            word = {True: "the same", False: "NOT the same", None: "not recorded"}[same]
            lines.append(f"{what}: {word}")
        return "\n".join(lines)


def replay(
    recorded: Attribution | str | Path,
    model: Callable[..., Any],
    inputs: Tensor | Inputs,
    *,
    target: Any = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    memory_budget: int | str | None = None,
) -> Replay:
    """Computes a record's attribution again with `model` on `inputs` and compares.

    target: only for records whose target was a function, which a record cannot hold. It agrees
    when inputs and weights are the recorded ones and the maps differ by rounding alone.
    """
    old = recorded if isinstance(recorded, Attribution) else load(recorded)
    past = old.provenance
    device = (inputs if isinstance(inputs, Tensor) else inputs[0]).device
    try:
        if target is None:
            target = restore_target(past.target, old.classes, old.many, old.kept)
        method = make_method(past.method, _parameters(past.parameters))
        baseline = restore_baseline(past.baseline, old.kept, device)
        features = restore_features(old.kept, device)
    except RecordError:
        raise
    except Exception as broken:
        raise RecordError(
            f"the record's call cannot be made again: {broken}; read it with the version of "
            f"saliency_fast that wrote it, {past.versions.get('saliency_fast', 'which it lacks')}"
        ) from broken
    engine = Engine(
        model,
        method,
        precision=past.precision,
        memory_budget=memory_budget,
        lean=past.lean,
        at=past.at,
        layer_input=past.layer_input,
        rows=past.rows,
        layout=None if past.layout is None else tuple(past.layout),
    )
    region: Any = old.kept.get(REGION_MASK)
    if region is None and past.region is not None:
        region = [(start, stop) for start, stop in past.region]
    again = engine(
        inputs,
        target,
        baseline,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
        region=region,
        features=features,
    )
    mine, theirs = ([list(one.shape) for one in att._parts()] for att in (again, old))
    if mine != theirs:
        raise InputError(
            f"the inputs are not those of the record: got maps {mine}, it has {theirs}"
        )
    same_input = _same(past.input_sha256, again.provenance.input_sha256)
    same_weights = _same(past.weights_sha256, record.weights_sha256(model))
    error, tolerance = relative_l2(again, old), TOLERANCE.get(past.dtype, OF_WHOLE)
    if old.precision_error is not None:
        tolerance = max(tolerance, float(old.precision_error.max()))
    agrees = error <= tolerance and same_input is not False and same_weights is not False
    return Replay(agrees, error, tolerance, same_input, same_weights, again)


def _parameters(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A method's fields: JSON has lists for tuples."""
    pairs = recorded.items()
    return {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}


def _same(recorded: object, found: object) -> bool | None:
    return None if recorded is None else recorded == found
