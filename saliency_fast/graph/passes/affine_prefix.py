"""The affine prefix: the leading part of a model that is affine in its input, taken once.

On a straight line A(x' + a (x - x')) = A(x') + a (A(x) - A(x')) for an affine A. So points can be
made behind it, gradients summed there, and the sum brought back by one transpose of A. The maps
are the same up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure

from saliency_fast._types import Inputs
from saliency_fast.errors import ModelError
from saliency_fast.graph.passes.fuse_relu import fused
from saliency_fast.graph.program import Program, Ref, Step, refs_in

# Linear in their first tensor, the others being constants of the model.
_IN_FIRST = frozenset(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm
    div divide true_divide truediv idiv itruediv neg negative mean sum dropout pad
    avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d
    view reshape view_as reshape_as flatten unflatten permute transpose t swapaxes movedim moveaxis
    contiguous clone expand expand_as squeeze unsqueeze chunk split narrow select unbind getitem
    to float double type type_as repeat roll flip im2col unfold col2im pixel_shuffle
    pixel_unshuffle channel_shuffle
    """.split()
)
# Linear in the only one of their tensors that varies.
_IN_ANY = frozenset(["mul", "multiply", "rmul", "imul", "matmul", "mm", "bmm", "einsum"])
# Linear in all their tensors together.
_IN_ALL = frozenset(
    """
    add radd iadd sub subtract rsub isub cat concat concatenate stack hstack vstack
    """.split()
)
_VIEWS = frozenset(
    """
    view reshape flatten unflatten permute transpose t swapaxes movedim expand squeeze unsqueeze
    chunk split narrow select unbind getitem dropout
    """.split()
)
FLOPS_PER_BYTE = 8
"""Multiplications and additions done in the time of moving one byte, about, on CPUs and GPUs."""
AT_PLACES = 3
"""Times that a pass goes over the places of a point: both ends read and points written; gradients
read, and sums read and written."""


@dataclass(frozen=True)
class Prefix:
    """A program in two: `stem`, affine in the inputs, and `rest`, from its results onwards.

    Places are the stem's results, in the order in which they lie in memory: [R, *] each, with the
    channels last where the stem's are.
    """

    stem: Program
    rest: Program

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the calls that are taken once."""
        return tuple(step.name for step in self.stem.steps if step.varying)

    @property
    def conditional(self) -> bool:
        """Whether the stem takes further arguments, and so may differ between examples."""
        return any(not step.used.isdisjoint(self.stem.extras) for step in self.stem.steps)

    def lift(self, points: Inputs, extras: list[Tensor]) -> Inputs:
        """The places of `points`, contiguous and without autograd."""
        with torch.no_grad():
            found = self.stem(self._spared(points), extras)
        # The data alone: autograd would not let the rest overwrite a view made without it.
        return tuple(self._in_memory_order(one).contiguous().data for one in found)

    def lower(self, grads: Inputs, like: Inputs, extras: list[Tensor]) -> Inputs:
        """The stem's transpose: gradients at places [R, *] to gradients at inputs like `like`."""
        rows = len(grads[0])
        points = tuple(x.new_zeros((rows, *x.shape[1:])).requires_grad_() for x in like)
        with torch.enable_grad():
            entered = self._spared(points)
            found = [self._in_memory_order(one) for one in self.stem(entered, extras)]
        pairs = [(one, grad) for one, grad in zip(found, grads, strict=True) if one.requires_grad]
        total = _Handed.apply([grad for _, grad in pairs], *(one for one, _ in pairs))  # type: ignore[no-untyped-call]
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
        """The shapes of the places behind their rows."""
        found = []
        for one in self.stem.outputs:
            rest = self.stem.values[one.number].shape[1:]
            turned = self.stem.channels_last and len(rest) in (3, 4)
            found.append((*rest[1:], rest[0]) if turned else rest)
        return tuple(found)

    def _in_memory_order(self, place: Tensor) -> Tensor:
        return place.movedim(1, -1) if self._turned(place) else place

    def _turned(self, place: Tensor) -> bool:
        return self.stem.channels_last and place.dim() in (4, 5)

    def turned(self, places: Inputs) -> Inputs:
        """Places as the rest takes them, in the same memory."""
        # The data alone: to work in place on a view costs autograd a copy of all.
        return tuple(one.movedim(-1, 1).data if self._turned(one) else one for one in places)

    def turned_back(self, grads: Inputs) -> Inputs:
        """Gradients of what `turned` gave, as the places lie, contiguous."""
        return tuple(self._in_memory_order(one).contiguous() for one in grads)


class _Handed(torch.autograd.Function):
    """A number whose gradients at some tensors are those given.

    Gradients that `torch.autograd.grad` is handed make it import PyTorch's symbolic shapes, which
    takes a third of a second.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.grads


def prefix_of(program: Program, *, channels_last: bool, line: bool) -> Prefix | None:
    """The prefix of a program that was not fused yet, or None where there is none or none that
    pays. line: points lie on straight lines, so that the stem's forward passes are spared too.
    """
    affine = _affine(program)
    cut = _cut(program, affine)
    tree = tree_structure(tuple(cut))
    stem = program.part(program.inputs, tuple(Ref(number) for number in cut), tree)
    memories = {program.values[number].memory for number in cut}
    doubtful = program.aliased or _overwritten(stem, cut) or len(memories) < len(cut)
    if doubtful or not any(step.varying for step in stem.steps):
        return None
    if _gain(program, stem, cut, line=line) <= 0:
        return None
    rest = fused(program.part(tuple(cut), program.outputs, program.tree))
    if channels_last:
        stem, rest = stem.innermost(), rest.innermost()
    return Prefix(stem, rest)


def check_affine(prefix: Prefix, points: Inputs, extras: list[Tensor]) -> None:
    """Raises ModelError where the stem of a midpoint is not the midpoint of the stems."""
    # Apart from the points' own direction: on the ray through them a ReLU is linear too.
    moves = [tuple(_wave(one, shift) for one in points) for shift in (0, 1)]
    moves.append(tuple((one + other) / 2 for one, other in zip(*moves, strict=True)))
    lifted = []
    for move in moves:
        moved = tuple(one + step for one, step in zip(points, move, strict=True))
        lifted.append(prefix.lift(moved, extras))
    for start, stop, found in zip(*lifted, strict=True):
        scale = float(torch.maximum(start.abs().max(), stop.abs().max()))
        gap = float(((start + stop) / 2 - found).abs().max())
        if not gap <= 1e4 * torch.finfo(found.dtype).eps * scale:
            raise ModelError(f"the prefix is not affine: off by {gap:.1g} of {scale:.1g}")


def _wave(like: Tensor, shift: int) -> Tensor:
    """Numbers of either sign of twice the size of `like`."""
    number = torch.arange(like.numel(), dtype=like.dtype, device=like.device)
    return (number + shift).cos().view_as(like) * (1 + 2 * like.abs().max())


def _overwritten(stem: Program, cut: list[int]) -> bool:
    """Whether the stem works in place on memory of a place that is there before."""
    memory = {stem.values[number].memory: stem.born.get(number, -1) for number in cut}
    return any(
        memory.get(stem.values[after].memory, place) < place
        for place, step in enumerate(stem.steps)
        for _, after in step.changed
    )


def _affine(program: Program) -> set[int]:
    """The values that are affine in the inputs, and rows of a launch."""
    affine = set(program.inputs)
    for step in program.steps:
        if step.varying and not step.detached and _keeps(program, step, affine):
            values = [program.values[number] for number in step.made]
            dtype = program.values[program.inputs[0]].dtype
            if all(value.rowwise and value.dtype == dtype for value in values):
                affine.update(step.made)
    return affine


def _keeps(program: Program, step: Step, affine: set[int]) -> bool:
    """Whether a call's results are affine where the values in `affine` are."""
    name = step.name.strip("_")
    taken = [one.number for one in refs_in((step.args, step.kwargs))]
    varying = [number for number in taken if program.values[number].varying]
    if not set(varying) <= affine:
        return False
    if name in _IN_ALL:
        return True
    if len(varying) != 1 or not _frozen(step) or "rounding_mode" in step.kwargs:
        return False
    first = isinstance((*step.args, None)[0], Ref) and step.args[0].number == varying[0]
    return name in _IN_ANY or (first and name in _IN_FIRST)


def _frozen(step: Step) -> bool:
    """Whether a layer that has a training mode is out of it."""
    place = {"batch_norm": 5, "dropout": 2}.get(step.name.strip("_"), -1)
    return place < 0 or (len(step.args) > place and not step.args[place])


def _cut(program: Program, affine: set[int]) -> list[int]:
    """The affine values that calls behind the prefix, or the result, take."""
    found = {one.number for one in refs_in(program.outputs) if one.number in affine}
    for step in program.steps:
        if not (step.varying and set(step.made) <= affine):
            found |= step.used & affine
    return sorted(found)


def _gain(program: Program, stem: Program, cut: list[int], *, line: bool) -> float:
    """Bytes' worth of time that the prefix spares each point; negative where it costs."""
    passes = 2 if line else 1
    spared = 0.0
    for step in stem.steps:
        if step.varying:
            spared += passes * (_flops(program, step) / FLOPS_PER_BYTE + _moved(program, step))
    places = sum(program.values[number].nbytes for number in cut)
    points = sum(program.values[number].nbytes for number in program.inputs)
    # Where the inputs were; noise still needs its points there.
    return spared - passes * AT_PLACES * (places - points)


def _flops(program: Program, step: Step) -> float:
    """Multiplications and additions of a convolution or linear call; 0 for all others."""
    if not step.name.startswith(("conv", "linear")):
        return 0.0
    weight = step.args[1] if len(step.args) > 1 else step.kwargs["weight"]
    weight = program.values[weight.number] if isinstance(weight, Ref) else weight
    out = math.prod(program.values[step.outputs[0]].shape)
    taken = math.prod(program.values[step.args[0].number].shape)
    per = math.prod(weight.shape[1:])
    # A transposed convolution visits its weight once for every number that it takes.
    return 2.0 * per * (taken if "transpose" in step.name else out)


def _moved(program: Program, step: Step) -> float:
    """Bytes that a call reads and writes; a normalisation rides in another one."""
    if step.name.strip("_") in _VIEWS or step.func is torch.batch_norm:
        return 0.0
    numbers = [*step.outputs, *(one for one in step.used if program.values[one].varying)]
    return float(sum(program.values[number].nbytes for number in numbers))
