"""Replay: compute a record again and compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast import record
from saliency_fast._types import Inputs
from saliency_fast.api import Engine
from saliency_fast.attribution import REGION_MASK, Attribution, load, maps_of
from saliency_fast.engine.recipe import with_fixed_nodes
from saliency_fast.errors import InputError, RecordError
from saliency_fast.methods import make_method

TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative L2 distance within which two runs agree, by the inputs' dtype: rounding, amplified by
the kinks of a model. A half precision may move a map as far as it was measured to."""
INTEGER_TOLERANCE = TOLERANCE["float32"]
"""The same for integer inputs, whatever the model's dtype."""
_OPTIONS = ("precision", "lean", "at", "layer_input", "rows")
"""Fields of a provenance that are options of an engine."""


@dataclass(frozen=True)
class Replay:
    """Whether a record agrees with the attribution computed again, and if not, why.

    It is true where it agrees, and prints as lines of text.

    Attributes:
        agrees: Whether inputs and weights are the recorded ones and the maps equal to rounding.
        error: Relative L2 distance of the maps.
        tolerance: The largest distance that counts as rounding.
        input_matches: Whether the inputs have the recorded SHA-256; None where none is recorded.
        weights_match: The same for the weights.
        again: The attribution computed again.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> print(sf.replay(sf.explain(model, x, target=1), model, x))
        agrees: relative L2 distance 0.00e+00, tolerance 1e-04
        input: the same
        weights: the same
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
        words = {True: "the same", False: "NOT the same", None: "not recorded"}
        return (
            f"{'agrees' if self.agrees else 'DISAGREES'}: relative L2 distance {self.error:.2e}, "
            f"tolerance {self.tolerance:.0e}\ninput: {words[self.input_matches]}\n"
            f"weights: {words[self.weights_match]}"
        )


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
    """Computes a recorded attribution again and compares.

    Args:
        recorded: An attribution, or the path of its record.
        model: The model that was explained.
        inputs: The inputs that were explained, as for `explain`.
        target: The target, only where it was a function, which a record cannot hold.
        forward_args: As for `explain`.
        forward_kwargs: As for `explain`.
        memory_budget: As for `explain`.

    Returns:
        Whether they agree, and why not.

    Raises:
        RecordError: The record is broken, or its target was a function and none is given.
        InputError: The maps of `inputs` have other shapes than the recorded ones.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> bool(sf.replay(sf.explain(model, x, target=1), model, x + 1))
        False
    """
    old = recorded if isinstance(recorded, Attribution) else load(recorded)
    past = old.provenance
    device = (inputs if isinstance(inputs, Tensor) else inputs[0]).device
    features = [name for name in old.kept if name.startswith("features.")]
    try:
        if target is None:
            target = record.restore_target(past.target, old.classes, old.many, old.kept)
        # Records name the rule; older ones leave it open where it was a fixed one.
        method = with_fixed_nodes(make_method(past.method, past.parameters))
        baseline = record.restore_baseline(past.baseline, old.kept, device)
    except RecordError:
        raise
    except Exception as error:
        raise RecordError(
            f"the record's call cannot be made again: {error}; read it with the version of "
            f"saliency_fast that wrote it, {past.versions.get('saliency_fast', 'which it lacks')}"
        ) from error
    options = {name: getattr(past, name) for name in _OPTIONS}
    layout = None if past.layout is None else tuple(past.layout)
    engine = Engine(model, method, memory_budget=memory_budget, layout=layout, **options)
    region: Any = old.kept.get(REGION_MASK, past.region)
    again = engine(
        inputs,
        target,
        baseline,
        forward_args=forward_args,
        forward_kwargs=forward_kwargs,
        region=region,
        features=tuple(old.kept[f"features.{n}"].to(device) for n in range(len(features))) or None,
    )
    return _compared(old, again, record.weights_sha256(model))


def _compared(old: Attribution, again: Attribution, weights_sha256: str | None) -> Replay:
    mine, theirs = ([list(one.shape) for one in maps_of(found)] for found in (again, old))
    if mine != theirs:
        raise InputError(
            f"the inputs are not those of the record: got maps {mine}, it has {theirs}"
        )
    past, new = old.provenance, again.provenance
    same_input = None if past.input_sha256 is None else past.input_sha256 == new.input_sha256
    same_weights = None if past.weights_sha256 is None else past.weights_sha256 == weights_sha256
    error, tolerance = _relative_l2(again, old), TOLERANCE.get(past.dtype, INTEGER_TOLERANCE)
    if old.precision_error is not None:
        tolerance = max(tolerance, float(old.precision_error.max()))
    agrees = error <= tolerance and same_input is not False and same_weights is not False
    return Replay(agrees, error, tolerance, same_input, same_weights, again)


def _relative_l2(found: Attribution, expected: Attribution) -> float:
    """Relative L2 distance of two attributions' maps over all inputs."""
    own, recorded = (
        torch.cat([one.detach().double().cpu().flatten() for one in maps_of(several)])
        for several in (found, expected)
    )
    norm = float(recorded.norm())
    return float((own - recorded).norm()) / (norm or 1.0)
