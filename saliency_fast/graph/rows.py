"""Rows: whether the rows of a launch can meet inside a recorded model, told from shapes and axes.

A recording with one row and one with two tell which axis of every tensor counts the rows. A call
that reduces, orders or mixes along that axis lets rows meet; shapes cannot tell whether scores
depend on it, so such a call only makes a model suspect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from saliency_fast.graph.program import PerRow, Program, Ref, Step, Value, refs_in

# Calls that keep their argument's shape and mix along one axis; those that take it second.
_ALONG = frozenset(
    "softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp sort argsort msort flip "
    "flipud roll rot90 normalize renorm glu diff gumbel_softmax".split()
)
# Calls that count rows on their first axis; on any other one they would take them for positions.
_ROWS_FIRST = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d "
    "max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate "
    "group_norm instance_norm unfold fold grid_sample".split()
)
_SPLITS = frozenset("split chunk tensor_split split_with_sizes unsafe_split".split())
_INDEXED = frozenset("index_select take index_add index_copy index_put scatter scatter_add".split())
_DEFAULTS = {"normalize": 1, "flipud": 0, "msort": 0} | dict.fromkeys(_SPLITS, 0)
# Calls that take sizes, of which one may be the number of rows.
_SIZED = frozenset(
    "view reshape expand repeat tile broadcast_to unflatten resize_ as_strided narrow __getitem__ "
    "__setitem__ split chunk tensor_split split_with_sizes unsafe_split new_zeros new_ones "
    "new_full new_empty zeros ones full empty arange eye rand randn randint repeat_interleave "
    "select index_select unfold fold view_as_complex size sparse_coo_tensor range tril_indices "
    "triu_indices multi_head_attention_forward bincount one_hot meshgrid".split()
)
# Their results have the type and device of an argument, and none of its numbers.
_FRESH = frozenset(
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like "
    "rand_like randn_like".split()
)


@dataclass(frozen=True)
class Suspicion:
    """Why rows may meet in a model. proof: whether a proof in every launch can tell; else what was
    seen may move some rows alone, and rows are kept apart. vmap: whether by `torch.func.vmap`,
    under which hooks do not run. arguments: whether Python reads numbers of further arguments, so
    that the other examples of a launch may lead it another way.
    """

    reason: str
    proof: bool = True
    vmap: bool = True
    arguments: bool = False


def suspicion(program: Program) -> Suspicion | None:
    """The first call through which rows may meet; None where there is none."""
    values = program.values
    for step in program.steps:
        if step.name not in _SIZED and any(_counts_rows((step.args, dict(step.kwargs)))):
            return Suspicion(f"{step.name} takes the number of rows for a number", proof=False)
        if step.varying and step.name not in _FRESH and _meets(step, values):
            return Suspicion(f"{step.name} works along the rows", proof=False)
    return None


def _counts_rows(template: Any) -> Iterator[bool]:
    """Whether each number in a call's arguments follows the rows."""
    if isinstance(template, (tuple, list)):
        for one in template:
            yield from _counts_rows(one)
    elif isinstance(template, dict):
        yield from _counts_rows(tuple(template.values()))
    elif isinstance(template, slice):
        yield from _counts_rows((template.start, template.stop, template.step))
    else:
        yield isinstance(template, PerRow)


def _meets(step: Step, values: Mapping[int, Value]) -> bool:
    taken = [values[one.number] for one in refs_in((step.args, dict(step.kwargs)))]
    counted = [axis for one in taken if one.varying for axis in _axes(one)]
    if not counted:
        # What meets did so before; of what no longer counts rows nothing is known.
        return False
    if any(len(_axes(values[number])) != 1 for number in step.made):
        return True
    if step.name == "einsum":
        return _contracts(step, values)
    first = step.args[0] if step.args else None
    if not isinstance(first, Ref) or not (axes := _axes(values[first.number])):
        return False
    axis, rank = axes[0], len(values[first.number].shape)
    return _mixes(step, axis, rank, values)


def _mixes(step: Step, axis: int, rank: int, values: Mapping[int, Value]) -> bool:
    """Whether a call on a tensor that counts rows on `axis` mixes along it."""
    name = step.name.rstrip("_")
    if name in _ALONG or name in _SPLITS:
        return axis in _dims(step, rank, _DEFAULTS.get(name, -1))
    if name in _ROWS_FIRST or name == "batch_norm":
        return axis != 0 or (name == "batch_norm" and _of_batch(step))
    if name == "scaled_dot_product_attention":
        return axis >= rank - 2
    if name == "multi_head_attention_forward":
        return axis != 1 or rank == 2
    if name == "layer_norm":
        shape = step.args[1] if len(step.args) > 1 else step.kwargs.get("normalized_shape", ())
        return axis >= rank - (len(shape) if isinstance(shape, (tuple, list)) else 1)
    if name == "linear":
        return axis == rank - 1
    if name == "__getitem__":
        return _picks(step.args[1], axis, values)
    if name in _INDEXED:
        return axis in _dims(step, rank, 0)
    return False


def _dims(step: Step, rank: int, default: int) -> Iterator[int]:
    """The axes that a call is along; all of them where it names none."""
    found: Any = next((step.kwargs[n] for n in ("dim", "dims", "axis") if n in step.kwargs), None)
    name = step.name.rstrip("_")
    if found is None:
        # flip(x, 0, 1) and flip(x, (0, 1)) are alike; others take the axis second or third.
        place = 2 if name in (*_SPLITS, "roll", "rot90", "renorm", "diff", "normalize") else 1
        found = step.args[place:] if name == "flip" else (*step.args, *[None] * 3)[place]
    if found is None:
        found = range(rank) if name == "roll" else default
    for one in found if isinstance(found, (tuple, list, range)) else (found,):
        for dim in one if isinstance(one, (tuple, list)) else (one,):
            if isinstance(dim, int):
                yield dim % rank


def _picks(index: Any, axis: int, values: Mapping[int, Value]) -> bool:
    """Whether an index takes other than all rows, in their order."""
    parts = index if isinstance(index, tuple) else (index,)
    at = 0
    for part in parts:
        if part is None:
            continue
        if part is Ellipsis:
            return False
        if at == axis:
            whole = isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
            if isinstance(part, Ref):
                return values[part.number].varying
            return not (whole and getattr(part, "stop", None) is None)
        at += 1
    return False


def _contracts(step: Step, values: Mapping[int, Value]) -> bool:
    """Whether an einsum pairs rows with other rows: they must have one letter, and keep it."""
    equation, *operands = step.args
    if not isinstance(equation, str):
        return True
    inputs, arrow, kept = equation.replace(" ", "").partition("->")
    if not arrow:
        # What comes once is kept, and so is an ellipsis.
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
    """The letter of an operand's axis; for one that an ellipsis stands for its place."""
    before, ellipsis, after = term.partition("...")
    if axis < len(before):
        return before[axis]
    if not ellipsis or axis >= rank - len(after):
        return after[axis - rank]
    return f".{rank - len(after) - axis}"


def _of_batch(step: Step) -> bool:
    """Whether a batch normalisation takes its statistics from the batch."""
    names = ["input", "running_mean", "running_var", "weight", "bias", "training"]
    if step.func is torch.batch_norm:
        names[1:5] = names[3:5] + names[1:3]
    given = dict(zip(names, step.args, strict=False)) | dict(step.kwargs)
    return given.get("running_mean") is None or given.get("training") is True


def _axes(value: Value) -> list[int]:
    """The axes whose size follows the rows."""
    return [axis for axis, more in enumerate(value.growth) if more]
