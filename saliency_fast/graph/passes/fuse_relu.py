"""Fuses neighbours of a program: batch normalisation, residual addition and rectifier in one pass
over memory, in place where nothing else looks at what it overwrites.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.autograd.activations import RECTIFIERS, SLOPE, ramp
from saliency_fast.graph.autograd.norms import affine_of
from saliency_fast.graph.passes.fold_norm import FOLDED, folded
from saliency_fast.graph.patterns import is_norm, norm_parameters, only_maker, watched
from saliency_fast.graph.program import Program, Ref, Step

_ADDITIONS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))
# Calls whose lean versions neither keep their result nor hand out a view: it may be overwritten.
_FRESH = frozenset(
    (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        torch.batch_norm,
        torch.cat,
        torch._C._nn.linear,
        *FOLDED,
    )
)


def rectified(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor, float] | None,
    residual: Tensor | None,
    slope: float,
    upper: float,
    inplace: bool,
) -> Tensor:
    """The rectifier of norm(x) + residual; `inplace` writes into x."""
    if residual is not None and residual.dtype != x.dtype:
        # As an addition would: where half types meet float32, float32 remains.
        common = torch.promote_types(residual.dtype, x.dtype)
        inplace = inplace and common == x.dtype
        x, residual = x.to(common), residual.to(common)
    affine = (None, None) if norm is None else affine_of(*norm)
    scale, shift = [None if one is None else one.to(x.dtype) for one in affine]
    found = ramp(x, scale, shift, residual, slope=slope, upper=upper, inplace=inplace)
    if found is NotImplemented:
        raise TypeError(f"no fused rectifier for {x.dtype}")
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class _Match:
    """A rectifier's operands, and the places of the steps that it swallows."""

    base: int
    norm: Any
    residual: int | None
    swallowed: tuple[int, ...]


def fused(program: Program) -> Program:
    """The same program with fewer passes over memory and fewer tensors in it."""
    return with_rectifiers(folded(program))


def with_rectifiers(program: Program) -> Program:
    """The same program with its rectifiers and what is before them in one pass."""
    steps: list[Step | None] = list(program.steps)
    for place, step in enumerate(program.steps):
        rule = _rule(step)
        if rule is None:
            continue
        match = _match(program, place)
        if not _may_wait(program, match, place):
            match = _Match(step.args[0].number, None, None, ())
        inplace = _may_overwrite(program, match, place)
        if not (match.swallowed or inplace):
            continue
        for one in match.swallowed:
            steps[one] = None
        residual = None if match.residual is None else Ref(match.residual)
        args = (Ref(match.base), match.norm, residual, *rule, inplace)
        spent = (match.base,) if inplace else ()
        steps[place] = replace(step, func=rectified, args=args, kwargs={}, changed=(), spent=spent)
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _rule(step: Step) -> tuple[float, float] | None:
    """(slope, upper) of a rectifier that gradients pass."""
    kind = RECTIFIERS.get(step.func)
    if kind is None or not step.varying or step.detached or step.kwargs:
        return None
    if not isinstance(step.args[0], Ref) or not kind.agrees():
        return None
    slope = float((*step.args, SLOPE)[1]) if kind.leaky else 0.0
    return slope, kind.upper


def _match(program: Program, place: int) -> _Match:
    """Follows the rectifier's operand up through an addition and a normalisation."""
    own = program.steps[place].args[0].number
    add = only_maker(program, own, place)
    if add is not None and _is_addition(program, program.steps[add]):
        left, right = (one.number for one in program.steps[add].args[:2])
        for normed, residual in ((left, right), (right, left)):
            norm = only_maker(program, normed, add)
            found = norm is not None and is_norm(program, program.steps[norm])
            if norm is not None and found and normed != residual:
                given = program.steps[norm].args
                return _Match(given[0].number, norm_parameters(given), residual, (norm, add))
        return _Match(left, None, right, (add,))
    if add is not None and is_norm(program, program.steps[add]):
        given = program.steps[add].args
        return _Match(given[0].number, norm_parameters(given), None, (add,))
    return _Match(own, None, None, ())


def _may_wait(program: Program, match: _Match, place: int) -> bool:
    """Whether the swallowed steps may run as late as `place`: no step in between overwrites what
    they take, or looks at what they overwrite.
    """

    def memory(numbers: Iterable[int]) -> set[int]:
        return {program.values[number].memory for number in numbers}

    for one in match.swallowed:
        step = program.steps[one]
        taken, written = memory(step.used), memory(step.overwritten)
        for other in set(range(one + 1, place)) - set(match.swallowed):
            between = program.steps[other]
            if memory(between.overwritten) & taken or memory(between.used) & written:
                return False
    return True


def _is_addition(program: Program, step: Step) -> bool:
    """A sum of two values of one shape, all of them the points' own."""
    if getattr(step.func, "__name__", "") not in _ADDITIONS or step.kwargs or len(step.args) != 2:
        return False
    if not all(isinstance(one, Ref) for one in step.args):
        return False
    left, right = (program.values[one.number] for one in step.args)
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and left.varying and right.varying and left.rowwise and right.rowwise


def _may_overwrite(program: Program, match: _Match, place: int) -> bool:
    """Whether the rectifier's base is fresh memory that nobody takes but the fused steps."""
    maker = program.born.get(match.base)
    if match.base == match.residual:
        return False
    uses = set(program.uses[match.base]) - {place, *match.swallowed}
    if maker is None:
        # Points are handed over; further arguments are the user's.
        fresh = match.base in program.inputs
    else:
        step = program.steps[maker]
        fresh = step.func in _FRESH and step.varying and not step.detached
    return fresh and not uses and not watched(program, match.base, place)
