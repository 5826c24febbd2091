"""Whether the rows of a launch can meet inside a recorded model: whether a call reduces, orders or
mixes along the axis that counts the rows. Shapes do not show whether scores depend on such a call,
so it only makes a model suspect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from saliency_fast.graph.program import PerRow, Program, Ref, Step, Value, leaves_in, refs_in


@dataclass(frozen=True)
class Suspicion:
    """The `reason` why rows may meet in a model.

    Attributes:
        proof: Whether a proof in every launch is enough; otherwise rows are kept apart.
        vmap: Whether rows can be kept apart by `torch.func.vmap`, under which hooks do not run.
        arguments: Whether Python reads numbers of further arguments, so that the other examples of
            a launch may change which branch the model takes.
    """

    reason: str
    proof: bool = True
    vmap: bool = True
    arguments: bool = False


def suspicion(program: Program) -> Suspicion | None:
    """The first call through which rows may meet; None where there is none."""
    for step in program.steps:
        counts = any(isinstance(one, PerRow) for one in leaves_in((step.args, step.kwargs)))
        if counts and not step.info.takes_sizes:
            return Suspicion(f"{step.name} takes the number of rows for a number", proof=False)
        if step.varying and not step.info.blank and _meets(step, program.values):
            return Suspicion(f"{step.name} works along the rows", proof=False)
    return None


def _meets(step: Step, values: Mapping[int, Value]) -> bool:
    taken = [values[one.number] for one in refs_in((step.args, step.kwargs))]
    if not any(one.varying and _axes(one) for one in taken):
        # Rows that meet here met before; a value that no longer counts rows tells nothing.
        return False
    if any(len(_axes(values[number])) != 1 for number in step.made):
        return True
    if step.name == "einsum":
        return _contracts(step, values)
    first = step.args[0] if step.args else None
    if not isinstance(first, Ref) or not (axes := _axes(values[first.number])):
        return False
    return _mixes(step, axes[0], len(values[first.number].shape), values)


def _mixes(step: Step, axis: int, rank: int, values: Mapping[int, Value]) -> bool:
    """Whether a call on a tensor that counts rows on `axis` mixes along it."""
    name = step.name.strip("_")
    if step.info.rows == "along":
        return axis in _dims(step, rank)
    if name == "batch_norm":
        # Statistics of the batch.
        names = ["input", "running_mean", "running_var", "weight", "bias", "training"]
        if step.func is torch.batch_norm:
            names[1:5] = names[3:5] + names[1:3]
        given = dict(zip(names, step.args, strict=False)) | dict(step.kwargs)
        return axis != 0 or given.get("running_mean") is None or given.get("training") is True
    if step.info.rows == "first":
        return axis != 0
    if name == "scaled_dot_product_attention":
        return axis >= rank - 2
    if name == "multi_head_attention_forward":
        return axis != 1 or rank == 2
    if name == "layer_norm":
        shape = step.args[1] if len(step.args) > 1 else step.kwargs.get("normalized_shape", ())
        return axis >= rank - (len(shape) if isinstance(shape, (tuple, list)) else 1)
    if name == "linear":
        return axis == rank - 1
    return name == "getitem" and _picks(step.args[1], axis, values)


def _dims(step: Step, rank: int) -> Iterator[int]:
    """The axes that a call is along; all of them where it names none and has no default."""
    found: Any = next((step.kwargs[n] for n in ("dim", "dims", "axis") if n in step.kwargs), None)
    position, default = step.info.axis
    if found is None:
        # flip(x, 0, 1) and flip(x, (0, 1)) are the same call.
        several = step.name == "flip"
        found = step.args[1:] if several else (*step.args, *[None] * 3)[position]
    if found is None:
        found = range(rank) if default is None else default
    for one in found if isinstance(found, (tuple, list, range)) else (found,):
        for dim in one if isinstance(one, (tuple, list)) else (one,):
            if isinstance(dim, int):
                yield dim % rank


def _picks(index: Any, axis: int, values: Mapping[int, Value]) -> bool:
    """Whether an index takes other than all rows, in their order."""
    parts = [one for one in (index if isinstance(index, tuple) else (index,)) if one is not None]
    if axis >= len(parts) or any(one is ... for one in parts[: axis + 1]):
        return False
    part = parts[axis]
    if isinstance(part, Ref):
        return values[part.number].varying
    whole = isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
    return not (whole and part.stop is None)


def _contracts(step: Step, values: Mapping[int, Value]) -> bool:
    """Whether an einsum pairs rows with other rows: they must have one letter, and keep it."""
    equation, *operands = step.args
    if not isinstance(equation, str):
        return True
    inputs, arrow, kept = equation.replace(" ", "").partition("->")
    if not arrow:
        # Letters that come once are kept, and so is an ellipsis.
        kept = "".join(one for one in inputs if one.isalpha() and inputs.count(one) == 1) + "..."
    parts = operands[0] if isinstance(operands[0], (tuple, list)) else operands
    letters = {
        _letter(term, axis, len(values[one.number].shape))
        for term, one in zip(inputs.split(","), parts, strict=True)
        if isinstance(one, Ref) and values[one.number].varying
        for axis in _axes(values[one.number])
    }
    return len(letters) != 1 or not any(one[:1] in kept for one in letters)


def _letter(term: str, axis: int, rank: int) -> str:
    """The letter of an operand's axis; for an axis under an ellipsis its position."""
    before, ellipsis, after = term.partition("...")
    if axis < len(before):
        return before[axis]
    if not ellipsis or axis >= rank - len(after):
        return after[axis - rank]
    return f".{rank - len(after) - axis}"


def _axes(value: Value) -> list[int]:
    """The axes whose size follows the rows."""
    return [axis for axis, more in enumerate(value.growth) if more]
