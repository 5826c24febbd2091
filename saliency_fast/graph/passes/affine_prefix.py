"""The affine prefix: the leading part of a model that is affine in its input, applied once.

On a straight line A(x' + a (x - x')) = A(x') + a (A(x) - A(x')) for an affine A. So points can be
made downstream of it, gradients summed there, and the sum brought back by one transpose of A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._torch_compat import tree_structure
from saliency_fast._types import Inputs
from saliency_fast.errors import ModelError
from saliency_fast.graph.gradients import differentiable
from saliency_fast.graph.passes.fusion import SEPARATE, OneCall, fused
from saliency_fast.graph.program import Program, Ref, Step, refs_in

FLOPS_PER_BYTE = 8
"""Multiplications and additions done in the time of moving one byte, about, on CPUs and GPUs."""
PASSES = 3
"""Times that memory is passed over at the cut of a point: both ends read and points written;
gradients read, and sums read and written."""
TOLERANCE = 1e4
"""Units of rounding by which the midpoint of an affine function may be off."""


@dataclass(frozen=True)
class Prefix:
    """A program in two: `stem`, affine in the inputs, and `rest`, from the activations at the cut
    onwards: [R, *] each, in memory order, so that channels are last where the stem's are.
    """

    stem: Program
    rest: Program

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the calls that run once."""
        return tuple(step.name for step in self.stem.steps if step.varying)

    @property
    def conditional(self) -> bool:
        """Whether the stem takes further arguments, and so may differ between examples."""
        return any(not step.used.isdisjoint(self.stem.extras) for step in self.stem.steps)

    def forward(self, points: Inputs, extras: list[Tensor]) -> Inputs:
        """The activations of `points` at the cut, contiguous and without autograd."""
        with torch.no_grad():
            found = self.stem(self._spared(points), extras)
        # The data alone: autograd would not let the rest overwrite a view made without it.
        return tuple(one.contiguous().data for one in self.in_memory_order(found))

    def transpose(self, grads: Inputs, like: Inputs, extras: list[Tensor]) -> Inputs:
        """The stem's transpose: gradients at the cut [R, *] to gradients at inputs like `like`."""
        rows = len(grads[0])
        points = tuple(x.new_zeros((rows, *x.shape[1:])).requires_grad_() for x in like)
        with torch.enable_grad():
            entered = self._spared(points)
            found = self.in_memory_order(self.stem(entered, extras))
        pairs = [(one, grad) for one, grad in zip(found, grads, strict=True) if one.requires_grad]
        (first, *others), cotangents = zip(*pairs, strict=True)
        # A number with these gradients: where `torch.autograd.grad` is given gradients, it imports
        # PyTorch's symbolic shapes, which takes a third of a second.
        total = differentiable(
            first, lambda one, *_: (one.new_zeros(()), ()), lambda _: cotangents, *others
        )
        back = torch.autograd.grad(total, points, allow_unused=True)
        return tuple(
            torch.zeros_like(point) if grad is None else grad.contiguous()
            for grad, point in zip(back, points, strict=True)
        )

    def _spared(self, points: Inputs) -> Inputs:
        """Copies, where the stem works in place: points may be the user's own."""
        inplace = any(step.changed for step in self.stem.steps)
        return tuple(one.clone() for one in points) if inplace else points

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of a row's activations at the cut."""
        shapes = [self.stem.values[one.number].shape[1:] for one in self.stem.outputs]
        return tuple((*s[1:], s[0]) if self._is_last(len(s) + 1) else s for s in shapes)

    def _is_last(self, rank: int) -> bool:
        """Whether values of so many axes have channels-last memory format."""
        return self.stem.channels_last and rank in (4, 5)

    def in_memory_order(self, values: Inputs) -> list[Tensor]:
        """Activations at the cut, or their gradients, with their axes as they lie in memory."""
        return [one.movedim(1, -1) if self._is_last(one.dim()) else one for one in values]

    def as_rest_inputs(self, values: Inputs) -> Inputs:
        """Activations at the cut as the rest takes them, in the same memory."""
        # The data alone: to work in place on a view costs autograd a copy of all.
        return tuple(one.movedim(-1, 1).data if self._is_last(one.dim()) else one for one in values)


def prefix_of(
    program: Program, *, channels_last: bool, line: bool, one_call: OneCall = SEPARATE
) -> Prefix | None:
    """The prefix that pays of a program that was not fused yet; line: points lie on lines."""
    rest = behind_prefix(program, line)
    if rest is None:
        return None
    cut = tuple(Ref(number) for number in rest.inputs)
    stem = program.part(program.inputs, cut, tree_structure(rest.inputs))
    rest = fused(rest, one_call)
    if channels_last:
        stem, rest = stem.with_channels_last(), rest.with_channels_last()
    return Prefix(stem, rest)


def behind_prefix(program: Program, line: bool) -> Program | None:
    """The pass: the part of a program behind its prefix, as it was recorded."""
    affine = _affine(program)
    # The affine values that calls behind the prefix, or the result, take.
    taken = {one.number for one in refs_in(program.outputs)}
    for step in program.steps:
        taken |= set() if step.varying and set(step.made) <= affine else step.used
    cut = sorted(taken & affine)
    stem = program.part(program.inputs, tuple(map(Ref, cut)), tree_structure(tuple(cut)))
    memory = {program.values[number].memory: stem.made_at.get(number, -1) for number in cut}
    # Or the stem works in place on memory of a cut value that exists before.
    doubtful = (
        program.aliased
        or len(memory) < len(cut)
        or any(
            memory.get(stem.values[after].memory, index) < index
            for index, step in enumerate(stem.steps)
            for _, after in step.changed
        )
    )
    if doubtful or not any(step.varying for step in stem.steps):
        return None
    if _gain(program, stem, cut, line=line) <= 0:
        return None
    return program.part(tuple(cut), program.outputs, program.tree)


def check_affine(prefix: Prefix, points: Inputs, extras: list[Tensor]) -> None:
    """Raises ModelError where the stem of a midpoint is not the midpoint of the stems."""

    def wave(like: Tensor, shift: int) -> Tensor:
        """Numbers of either sign of twice the size of `like`."""
        number = torch.arange(like.numel(), dtype=like.dtype, device=like.device)
        return (number + shift).cos().view_as(like) * (1 + 2 * like.abs().max())

    # Apart from the points' own direction: on the ray through them a ReLU is linear too.
    moves = [tuple(wave(one, shift) for one in points) for shift in (0, 1)]
    moves.append(tuple((one + other) / 2 for one, other in zip(*moves, strict=True)))
    at_prefix_end = []
    for move in moves:
        moved = tuple(one + step for one, step in zip(points, move, strict=True))
        at_prefix_end.append(prefix.forward(moved, extras))
    for start, stop, found in zip(*at_prefix_end, strict=True):
        scale = float(torch.maximum(start.abs().max(), stop.abs().max()))
        gap = float(((start + stop) / 2 - found).abs().max())
        if not gap <= TOLERANCE * torch.finfo(found.dtype).eps * scale:
            raise ModelError(f"the prefix is not affine: off by {gap:.1g} of {scale:.1g}")


def _affine(program: Program) -> set[int]:
    """The values that are affine in the inputs, and rows of a launch."""
    affine = set(program.inputs)
    dtype = program.values[program.inputs[0]].dtype
    for step in program.steps:
        if step.passing and _stays_affine(program, step, affine):
            values = [program.values[number] for number in step.made]
            if all(value.rowwise and value.dtype == dtype for value in values):
                affine.update(step.made)
    return affine


def _stays_affine(program: Program, step: Step, affine: set[int]) -> bool:
    """Whether a call's results are affine where the values in `affine` are."""
    linear, training = step.info.linear, step.info.training
    taken = [one.number for one in refs_in((step.args, step.kwargs))]
    varying = [number for number in taken if program.values[number].varying]
    if not linear or not set(varying) <= affine:
        return False
    if linear == "all":
        return True
    # A layer that has a training mode must be out of it.
    trains = training is not None and (*step.args, *[True] * (training + 1))[training]
    if len(varying) != 1 or trains or "rounding_mode" in step.kwargs:
        return False
    first = step.args[0] if step.args else None
    return linear == "any" or (isinstance(first, Ref) and first.number == varying[0])


def _gain(program: Program, stem: Program, cut: list[int], *, line: bool) -> float:
    """Bytes' worth of time that the prefix spares each point; negative where it costs."""
    passes = 2 if line else 1
    spared = 0.0
    for step in stem.steps:
        if step.varying:
            spared += passes * (_flops(program, step) / FLOPS_PER_BYTE + _moved(program, step))
    held = sum(program.values[number].nbytes for number in cut)
    points = sum(program.values[number].nbytes for number in program.inputs)
    # In the place of the inputs; noise still needs its points there.
    return spared - passes * PASSES * (held - points)


def _flops(program: Program, step: Step) -> float:
    """Multiplications and additions of a convolution or linear call; 0 for all others."""
    if step.info.half != "product" or step.info.linear != "first":
        return 0.0
    weight = step.args[1] if len(step.args) > 1 else step.kwargs["weight"]
    weight = program.values[weight.number] if isinstance(weight, Ref) else weight
    # A transposed convolution visits its weight once for every number that it takes.
    transposed = step.info.kind == "transposed convolution"
    visits = step.args[0].number if transposed else step.outputs[0]
    return 2.0 * math.prod(weight.shape[1:]) * math.prod(program.values[visits].shape)


def _moved(program: Program, step: Step) -> float:
    """Bytes that a call reads and writes; a normalisation is part of another call."""
    if step.info.view or step.info.kind == "normalisation":
        return 0.0
    numbers = [*step.outputs, *(one for one in step.used if program.values[one].varying)]
    return float(sum(program.values[number].nbytes for number in numbers))
