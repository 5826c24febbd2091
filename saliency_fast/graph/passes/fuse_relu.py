"""Fuses neighbours of a program: batch normalisation, residual addition and rectifier in one pass
over memory, in place where nothing reads what is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from saliency_fast.graph.autograd.activations import RECTIFIERS, SLOPE
from saliency_fast.graph.fused import Norm, rectified
from saliency_fast.graph.passes.fold_norm import folded
from saliency_fast.graph.patterns import is_norm, norm_parameters, only_maker, watched
from saliency_fast.graph.program import Program, Ref, Step


@dataclass(frozen=True)
class _Match:
    """A rectifier's operands, and the indices of the steps that it swallows."""

    base: int
    norm: Norm | None = None
    residual: int | None = None
    swallowed: tuple[int, ...] = ()


def fused(program: Program) -> Program:
    """The same program with fewer passes over memory and fewer tensors in it."""
    return with_rectifiers(folded(program))


def with_rectifiers(program: Program) -> Program:
    """The same program with its rectifiers and what is before them in one pass."""
    steps: list[Step | None] = list(program.steps)
    for index, step in enumerate(program.steps):
        rule = _slope_and_upper(step)
        if rule is None:
            continue
        match = _match(program, index)
        if not _may_wait(program, match, index):
            match = _Match(step.args[0].number)
        inplace = _may_overwrite(program, match, index)
        if not (match.swallowed or inplace):
            continue
        for one in match.swallowed:
            steps[one] = None
        residual = None if match.residual is None else Ref(match.residual)
        args = (Ref(match.base), match.norm, residual, *rule, inplace)
        donated = (match.base,) if inplace else ()
        own = replace(step, func=rectified, args=args, kwargs={}, changed=(), donated=donated)
        steps[index] = own
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _slope_and_upper(step: Step) -> tuple[float, float] | None:
    """Those of a rectifier that gradients pass."""
    kind = RECTIFIERS.get(step.func) if step.passing else None
    if kind is None or step.kwargs or not isinstance(step.args[0], Ref) or not kind.agrees():
        return None
    slope = float((*step.args, SLOPE)[1]) if kind.leaky else 0.0
    return slope, kind.upper


def _match(program: Program, index: int) -> _Match:
    """Follows the rectifier's operand up through an addition and a normalisation."""
    own = program.steps[index].args[0].number
    add = only_maker(program, own, index)
    if add is None:
        return _Match(own)
    if is_norm(program, program.steps[add]):
        given = program.steps[add].args
        return _Match(given[0].number, norm_parameters(given), None, (add,))
    if not _is_addition(program, program.steps[add]):
        return _Match(own)
    left, right = (one.number for one in program.steps[add].args)
    for normed, residual in ((left, right), (right, left)):
        norm = only_maker(program, normed, add)
        if norm is not None and is_norm(program, program.steps[norm]) and normed != residual:
            given = program.steps[norm].args
            return _Match(given[0].number, norm_parameters(given), residual, (norm, add))
    return _Match(left, None, right, (add,))


def _may_wait(program: Program, match: _Match, index: int) -> bool:
    """Whether the swallowed steps may run as late as `index`: no step in between overwrites what
    they take, or reads what they overwrite.
    """
    memory = {number: value.memory for number, value in program.values.items()}
    for one in match.swallowed:
        taken, written = (
            {memory[number] for number in numbers}
            for numbers in (program.steps[one].used, program.steps[one].overwritten)
        )
        for other in set(range(one + 1, index)) - set(match.swallowed):
            between = program.steps[other]
            if taken & {memory[number] for number in between.overwritten}:
                return False
            if written & {memory[number] for number in between.used}:
                return False
    return True


def _is_addition(program: Program, step: Step) -> bool:
    """A sum of two values of one shape, both of which depend on the points."""
    if step.info.kind != "addition" or step.kwargs or len(step.args) != 2:
        return False
    if not all(isinstance(one, Ref) for one in step.args):
        return False
    left, right = (program.values[one.number] for one in step.args)
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and all(one.varying and one.rowwise for one in (left, right))


def _may_overwrite(program: Program, match: _Match, index: int) -> bool:
    """Whether the rectifier's base is fresh memory that only the fused steps take."""
    maker = program.born.get(match.base)
    if match.base == match.residual or set(program.uses[match.base]) - {index, *match.swallowed}:
        return False
    if maker is None:
        # Points are donated; further arguments are the user's.
        fresh = match.base in program.inputs
    else:
        fresh = program.steps[maker].info.fresh and program.steps[maker].passing
    return fresh and not watched(program, match.base, index)
