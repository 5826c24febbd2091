"""The local beginning of a program, which can be run on boxes of its input with their halos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only, tree_structure

from saliency_fast.graph.intercept import NotLeanError, lean_call
from saliency_fast.graph.local import Box, Local, Span, hull, rule_of, varying
from saliency_fast.graph.program import Env, Program, Ref, Step, filled, refs_in, tensors_in


@dataclass(frozen=True)
class Stem:
    """The local beginning of a model: `local` leads from the input to the values `cut`, `rest` from
    them to the outputs (from the input as well, where `through`). rules: one per step of `local`,
    None where it does not depend on the points.
    """

    local: Program
    rest: Program
    cut: tuple[int, ...]
    rules: tuple[Local | None, ...]
    through: bool

    @property
    def input(self) -> int:
        return self.local.inputs[0]

    def size(self, number: int) -> tuple[int, ...]:
        """The spatial sizes of a value."""
        return self.local.values[number].shape[2:]

    @cached_property
    def steps(self) -> tuple[tuple[Step, Local, list[int], tuple[int, ...]], ...]:
        """The steps on crops: call, rule, operands as often as named, values that end there."""
        steps = zip(self.local.steps, self.rules, self.local.over, strict=True)
        values = self.local.values
        return tuple((one, rule, varying(one, values), over) for one, rule, over in steps if rule)

    def needed(self, cut: Mapping[int, Box]) -> dict[int, Box]:
        """The boxes of all values that boxes of cut values need."""
        found = dict(cut)
        for step, rule, operands, _ in reversed(self.steps):
            own = [found[number] for number in step.made if number in found]
            if own:
                found |= dict.fromkeys(step.made, hull(own))
                for number in operands:
                    seen = rule.sees(hull(own), self.size(number))
                    found[number] = hull([seen, found.get(number, seen)])
        return found

    def reached(self, region: Box) -> dict[int, Box]:
        """The boxes of cut values that a box of the input has a part in."""
        found = {self.input: region}
        for step, rule, operands, _ in self.steps:
            size = self.size(step.made[0])
            boxes = [rule.reaches(found[number], size) for number in operands if number in found]
            own = [box for box in boxes if box is not None]
            if own:
                found |= dict.fromkeys(step.made, hull(own))
        return {number: found[number] for number in self.cut if number in found}

    @cached_property
    def unit(self) -> tuple[int, ...]:
        """For each axis the step of the input by which all values move by whole places."""
        scales = {self.input: (Fraction(1),) * len(self.size(self.input))}
        for step, rule, operands, _ in self.steps:
            strides = [Fraction(w.stride) ** (-1 if w.spread else 1) for w in rule.windows]
            scale = tuple(a * b for a, b in zip(scales[operands[0]], strides, strict=True))
            scales |= dict.fromkeys(step.made, scale)
        axes = zip(*scales.values(), strict=True)
        return tuple(math.lcm(*(scale.numerator for scale in axis)) for axis in axes)

    def constants(self, extras: Sequence[Tensor], rows: int) -> Env:
        """The values of `local` that do not depend on the points."""
        env = dict(zip(self.local.extras, extras, strict=True))
        for step, rule in zip(self.local.steps, self.rules, strict=True):
            if rule is None:
                step.run(env, rows)
        return env

    def run(self, crop: Tensor, boxes: Mapping[int, Box], constants: Env, at: Span) -> Env:
        """The `boxes` of cut values from the crop of a row; at: the row, and how many there are."""
        extras = [constants[number] for number in self.local.extras]
        env = {**constants, **self.local.enter((crop,), extras)}
        for step, rule, operands, over in self.steps:
            if step.made[0] not in boxes:
                continue
            out, size = boxes[step.made[0]], self.size(operands[0])
            seen = rule.sees(out, size)

            def placed(one: Any, rule: Local = rule, out: Box = out, seen: Box = seen) -> Tensor:
                if isinstance(one, Ref) and one.number in boxes:
                    return cropped(env[one.number], seen, boxes[one.number])
                tensor: Tensor = (env[one.number] if isinstance(one, Ref) else one).detach()
                if isinstance(one, Ref) and self.local.values[one.number].rowwise:
                    tensor = tensor[at[0] : at[0] + 1]
                return _constant(tensor, out) if rule.constants else tensor

            args, kwargs = tree_map_only((Ref, Tensor), placed, (rule.args, dict(rule.kwargs)))
            args, kwargs = filled((args, kwargs), {}, at[1], False)
            result = _called(rule, args, kwargs, *rule.pads(out, seen, size))
            if any(window.spread for window in rule.windows):
                result = cropped(result, out, rule.made(seen, result.shape[2:]))
            env.update(zip(step.outputs, tensors_in(result), strict=True))
            for number in over:
                env.pop(number, None)
        return env


def local_stem(program: Program) -> Stem:
    """The stem of an unfolded program; raises NotLeanError, which says why, if it has none."""
    if program.aliased:
        raise NotLeanError("the model overwrites memory by one view and reads it by another")
    if len(program.inputs) != 1:
        raise NotLeanError(f"tiles need a single input: the model takes {len(program.inputs)}")
    start, values = program.inputs[0], program.values
    program = program.part(program.inputs, program.outputs, program.tree)
    rules: dict[int, Local] = {}
    known, taken = {start}, {one.number for one in refs_in(program.outputs)}
    given = {values[number].memory for number in (*program.inputs, *program.extras)}
    for step in program.steps:
        rule = rule_of(step, values) if known.issuperset(varying(step, values)) else None
        if rule is not None:
            rules[step.made[0]] = rule
            known.update(step.made)
            continue
        if any(values[number].memory in given for number in step.overwritten):
            raise NotLeanError("the model overwrites its input, which tiles read again")
        taken |= step.used
    cut = tuple(sorted(number for number in known & taken if number != start))
    if not cut:
        first = next((step.name for step in program.steps if step.varying), "none")
        raise NotLeanError(f"the model does not begin with local calls: its first is {first}")
    if not all(values[number].dtype.is_floating_point for number in cut):
        raise NotLeanError("the model's local calls end in values that carry no gradient")
    wanted = [Ref(number) for number in cut]
    local = program.part((start,), wanted, tree_structure([0] * len(wanted)))
    through = start in taken
    rest = program.part((*cut, *([start] if through else [])), program.outputs, program.tree)
    return Stem(local, rest, cut, tuple(rules.get(one.made[0]) for one in local.steps), through)


def whole_box(size: Sequence[int]) -> Box:
    return tuple((0, length) for length in size)


def cropped(tensor: Tensor, wanted: Box, held: Box) -> Tensor:
    """The box `wanted` of a value of which `tensor` is the box `held`."""
    return tensor if wanted == held else tensor[inside(wanted, held)]


def inside(box: Box, held: Box | None = None) -> tuple[slice, ...]:
    """The index of a box in a value [R, C, *spatial], or in the box `held` of it."""
    starts = [first for first, _ in held or [(0, 0)] * len(box)]
    spans = [slice(a - first, b - first) for (a, b), first in zip(box, starts, strict=True)]
    return (slice(None), slice(None), *spans)


def _constant(tensor: Tensor, out: Box) -> Tensor:
    """A tensor that is broadcast against the box `out` of a result."""
    spans = zip(reversed(out), reversed(tensor.shape), strict=False)
    index = [slice(*span) if size > 1 else slice(None) for span, size in spans]
    return tensor[(..., *reversed(index))]


def _called(rule: Local, args: Any, kwargs: Any, alike: list[int], pads: list[Span]) -> Any:
    """A rule's call, with padding."""
    x, *others = args
    if rule.padding is not None:
        others[rule.padding - 1] = alike
    flat = [amount for pair in reversed(pads) for amount in pair]
    # Where a window sees padding alone, more is cut off than there is: pad first.
    for amounts in ([max(0, one) for one in flat], [min(0, one) for one in flat]):
        x = F.pad(x, amounts, value=rule.fill) if any(amounts) else x
    return lean_call(rule.func, (x, *others), kwargs)
