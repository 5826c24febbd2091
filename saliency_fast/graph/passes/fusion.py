"""Fuses neighbours of a program, which spares tensors of the size of the activations and passes
over them: batch normalisation and concatenation in convolutions; batch normalisation, residual
addition and rectifier in one call, in place where nothing reads what is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.autograd.activations import RECTIFIERS, SLOPE, ramp
from saliency_fast.graph.autograd.convolutions import convolution_relu, each_axis, even_edges
from saliency_fast.graph.autograd.norms import add_layer_norm, affine_of
from saliency_fast.graph.intercept import lean_call
from saliency_fast.graph.opinfo import info
from saliency_fast.graph.program import Program, Ref, Step, refs_in
from saliency_fast.ops.norms import LARGEST

Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
"""(weight, bias, mean, variance, eps) of a batch normalisation with frozen statistics."""
_NORM_ARGUMENTS = 8
SMALLER = 8
"""Times that a weight must be smaller than what its convolution writes for a row, to be folded:
where calls share launches, anew in every one."""


# Operators that take the place of several calls.


def folded_weights(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution and the batch normalisation behind it in one."""
    scale, shift = affine_of(*norm)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Callable[..., Any],
    options: tuple[Any, ...],
    norm: Norm,
) -> Any:
    """A convolution and the batch normalisation `norm` behind it, as one convolution."""
    return lean_call(convolution, (x, *folded_weights(weight, bias, norm), *options), {})


def partial_convolution(
    x: Tensor,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Callable[..., Any],
    options: tuple[Any, ...],
    start: int,
) -> Any:
    """Adds to `total` the convolution of the channels from `start` onwards, which are `x`."""
    part = weight.narrow(1, start, x.shape[1])
    found = lean_call(convolution, (x, part, bias, *options), {})
    return found if total is None else total.add_(found)


def rectified(
    x: Tensor, norm: Norm | None, residual: Tensor | None, slope: float, upper: float, inplace: bool
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


# Patterns that passes match.


@dataclass(frozen=True)
class Layer:
    """A convolution of the model's own weights, with the normalisation and rectifier behind it.

    Attributes:
        index: Of the convolution's step.
        output: Number of its result, or of its normalisation's.
        x, weight, bias, call, options: The convolution `call(x, weight, bias, *options)`.
        norm: Its batch normalisation, folded into it already or still behind it.
        norm_index: Of the step behind it that applies `norm`: a batch normalisation, or a fused
            rectifier.
        relu_index: Of the fused rectifier behind it, where that is a ReLU without a residual.
    """

    index: int
    output: int
    x: Ref
    weight: Tensor
    bias: Tensor | None
    call: Callable[..., Any]
    options: tuple[Any, ...]
    norm: Norm | None = None
    norm_index: int | None = None
    relu_index: int | None = None

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int] | None:
        """Stride, padding and dilation per axis, and groups; None for edges that differ."""
        if info(self.call).kind != "convolution":
            return None
        axes, defaults = self.weight.dim() - 2, (1, 0, 1, 1)
        given: tuple[Any, ...] = self.options + defaults[len(self.options) :]
        stride, padding, dilation, groups = given
        holes = each_axis(dilation, axes)
        edges = even_edges(padding, self.weight, holes)
        return None if edges is None else (each_axis(stride, axes), edges, holes, int(groups))

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, with the normalisation folded into them."""
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        return (weight, bias) if self.norm is None else folded_weights(weight, bias, self.norm)


def without_norm(rectifier: Step) -> Step:
    """A fused rectifier whose normalisation is folded elsewhere."""
    x, _, *others = rectifier.args
    return replace(rectifier, args=(x, None, *others))


def layers(program: Program) -> Iterator[Layer]:
    """The convolutions of a program, in order."""
    for index, step in enumerate(program.steps):
        layer = convolution(index, step)
        if layer is not None:
            yield _with_neighbours(program, layer)


def convolution(index: int, step: Step) -> Layer | None:
    """A step as a layer without what is behind it, if it is a convolution by weights."""
    if not step.passing or step.kwargs or len(step.args) < 2:
        return None
    if step.info.kind == "folded convolution":
        x, weight, bias, call, options, norm = step.args
    elif step.info.kind == "convolution":
        x, weight, *others = step.args
        bias, call, options, norm = (*others, None)[0], step.func, tuple(others[1:]), None
    else:
        return None
    if not isinstance(x, Ref) or any(refs_in((weight, bias, norm))):
        return None
    return Layer(index, step.outputs[0], x, weight, bias, call, options, norm)


def _with_neighbours(program: Program, layer: Layer) -> Layer:
    """A layer with the normalisation and the rectifier behind it."""
    user = _only_user(program, layer.output)
    if user is not None and layer.norm is None:
        step = program.steps[user]
        norm = norm_of(program, step)
        if norm is not None and step.args[0].number == layer.output:
            layer = replace(layer, norm=norm, norm_index=user, output=step.outputs[0])
            user = _only_user(program, layer.output)
    if user is None or program.steps[user].info.kind != "rectified":
        return layer
    base, norm, residual, slope, upper, _ = program.steps[user].args
    # A base that is the residual too is taken a second time without the normalisation.
    both = norm is not None and layer.norm is not None
    if base.number != layer.output or residual == base or both:
        return layer
    if norm is not None:
        layer = replace(layer, norm=norm, norm_index=user)
    whole = residual is None and slope == 0.0 and upper == math.inf
    return replace(layer, relu_index=user) if whole else layer


def _only_user(program: Program, number: int) -> int | None:
    """The index of the step that alone takes a value, of which there are no views."""
    uses = program.uses.get(number, ())
    if len(uses) != 1 or uses[0] == len(program.steps):
        return None
    return None if only_maker(program, number, uses[0]) is None else uses[0]


def only_maker(program: Program, number: int, user: int) -> int | None:
    """The index of the step that made a value, where `user` alone takes it and it has no views."""
    index = program.made_at.get(number)
    if (
        index is None
        or program.uses.get(number) != (user,)
        or is_viewed_later(program, number, user)
    ):
        return None
    step = program.steps[index]
    return index if step.passing and step.outputs == (number,) else None


def is_viewed_later(program: Program, number: int, index: int) -> bool:
    """Whether a step after `index` takes another value of the same memory."""
    memory = program.values[number].memory
    return any(
        other != number and program.values[other].memory == memory and indices[-1] > index
        for other, indices in program.uses.items()
        if program.made_at.get(other, -1) < index
    )


def norm_of(program: Program, step: Step) -> Norm | None:
    """A step as a normalisation with parameters of its input's type, or None."""
    if step.func is not torch.batch_norm or step.kwargs or len(step.args) < _NORM_ARGUMENTS:
        return None
    x, weight, bias, mean, variance, training, _, eps = step.args[:_NORM_ARGUMENTS]
    parameters = weight, bias, mean, variance
    if not isinstance(x, Ref) or not step.passing or training or mean is None:
        return None
    dtype = program.values[x.number].dtype
    if any(refs_in(parameters)) or any(
        one is not None and one.dtype != dtype for one in parameters
    ):
        return None
    return (*parameters, eps)


# What surrounds a convolution: batch normalisation behind it, concatenation before it.


def folded(program: Program, *, all_norms: bool = False) -> Program:
    """The same program with fewer tensors of the size of its activations."""
    return _without_norms(_without_cats(program), all_norms)


def _without_norms(program: Program, all_norms: bool) -> Program:
    """Batch normalisations in the weights of the convolutions before them."""
    steps: list[Step | None] = list(program.steps)
    for layer in layers(program):
        written = program.values[layer.output].nbytes
        small = all_norms or SMALLER * layer.weight.nbytes <= written
        behind = layer.norm_index
        if behind is None or not small or program.steps[behind].info.kind != "normalisation":
            continue
        args = (layer.x, layer.weight, layer.bias, layer.call, layer.options, layer.norm)
        own, made = program.steps[layer.index], (layer.output,)
        steps[layer.index] = replace(own, func=folded_convolution, args=args, outputs=made)
        steps[behind] = None
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _without_cats(program: Program) -> Program:
    """The largest concatenations in the convolutions behind them, part by part."""
    values, steps = dict(program.values), [[step] for step in program.steps]
    largest = max((value.nbytes for value in values.values() if value.varying), default=0)
    for index, step in enumerate(program.steps):
        layer = convolution(index, step)
        cat = None if layer is None else _concatenation(program, layer)
        if layer is None or cat is None or values[layer.x.number].nbytes < largest:
            continue
        steps[cat], steps[index] = [], []
        total, start = None, 0
        parts = program.steps[cat].args[0]
        for part in parts:
            made = layer.output if part is parts[-1] else len(values) + max(values)
            values[made] = program.values[layer.output]
            bias = None if total else layer.bias
            args = (part, total, layer.weight, bias, layer.call, layer.options, start)
            changed = () if total is None else ((total.number, made),)
            one = replace(step, func=partial_convolution, args=args, outputs=(made,))
            steps[index].append(replace(one, changed=changed))
            total, start = Ref(made), start + values[part.number].shape[1]
    joined = tuple(step for several in steps for step in several)
    return replace(program, steps=joined, values=values)


def _concatenation(program: Program, layer: Layer) -> int | None:
    """The index of the concatenation of channels that a convolution alone takes."""
    if layer.norm is not None or (*layer.options, *(1,) * 4)[3] != 1:
        return None
    cat = only_maker(program, layer.x.number, layer.index)
    if cat is None or program.steps[cat].info.kind != "concatenation":
        return None
    parts, *axis = program.steps[cat].args
    axis += program.steps[cat].kwargs.values()
    whole = all(isinstance(one, Ref) and program.values[one.number].varying for one in parts)
    numbers = {one.number for one in parts} if whole else set()
    if not whole or axis != [1] or not len(numbers) == len(parts) > 1:
        return None
    memories = {program.values[number].memory for number in numbers}
    between = program.steps[cat + 1 : layer.index]
    written = {program.values[number].memory for one in between for number in one.overwritten}
    return None if memories & written else cat


# Rectifiers and what is before them.


@dataclass(frozen=True)
class _Match:
    """A rectifier's operands, and the indices of the steps that it swallows."""

    base: int
    norm: Norm | None = None
    residual: int | None = None
    swallowed: tuple[int, ...] = ()


@dataclass(frozen=True)
class OneCall:
    """What is one call of a library's or one kernel, where that has been measured to pay.

    Attributes:
        relu: A convolution and the ReLU behind it.
        residual_relu: A convolution, a residual addition and the ReLU behind it.
        layer_norm: A residual addition and the layer normalisation behind it.
    """

    relu: bool = False
    residual_relu: bool = False
    layer_norm: bool = False


SEPARATE = OneCall()


def fused(program: Program, one_call: OneCall = SEPARATE) -> Program:
    """The same program with fewer passes over memory and fewer tensors in it."""
    relu = one_call.relu or one_call.residual_relu
    found = with_rectifiers(folded(program, all_norms=relu))
    found = _with_convolution_relus(found, one_call) if relu else found
    return _with_layer_norms(found) if one_call.layer_norm else found


def with_rectifiers(program: Program) -> Program:
    """The same program with its rectifiers and what is before them in one pass."""
    steps: list[Step | None] = list(program.steps)
    for index, step in enumerate(program.steps):
        kind = RECTIFIERS.get(step.func) if step.passing and not step.kwargs else None
        if kind is None or not isinstance(step.args[0], Ref) or not kind.agrees():
            continue
        slope = float((*step.args, SLOPE)[1]) if kind.leaky else 0.0
        match = _match(program, index)
        if not _may_wait(program, match, index):
            match = _Match(step.args[0].number)
        inplace = _may_overwrite(program, match, index)
        if not (match.swallowed or inplace):
            continue
        for one in match.swallowed:
            steps[one] = None
        residual = None if match.residual is None else Ref(match.residual)
        args = (Ref(match.base), match.norm, residual, slope, kind.upper, inplace)
        donated = (match.base,) if inplace else ()
        own = replace(step, func=rectified, args=args, kwargs={}, changed=(), donated=donated)
        steps[index] = own
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _with_convolution_relus(program: Program, one_call: OneCall) -> Program:
    """The same program with ReLUs, and additions before them, in the convolution before these."""
    steps: list[Step | None] = list(program.steps)
    for index, step in enumerate(program.steps):
        if step.info.kind != "rectified":
            continue
        base, norm, added, slope, upper, _ = step.args
        wanted = one_call.relu if added is None else one_call.residual_relu
        if not wanted or norm is not None or slope != 0 or upper < math.inf:
            continue
        for own, other in ((base, added), (added, base)):
            layer = None if own is None else _convolution_before(program, own, other, index)
            if layer is None:
                continue
            steps[layer.index] = None
            options = (other, *(layer.geometry or ()))
            own_args = (layer.x, layer.weight, layer.bias)
            call: Callable[..., Any] = convolution_relu
            args: tuple[Any, ...] = (*own_args, *options)
            if layer.norm is not None:
                call, args = folded_convolution, (*own_args, convolution_relu, options, layer.norm)
            steps[index] = replace(step, func=call, args=args, donated=())
            break
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _convolution_before(program: Program, own: Ref, other: Ref | None, index: int) -> Layer | None:
    """The convolution of which the rectifier at `index` takes the result `own`, if one call serves
    both and the addition of `other`: of images or volumes, in one group as PyTorch tests cuDNN's.
    """
    at = only_maker(program, own.number, index)
    layer = None if at is None else convolution(at, program.steps[at])
    if at is None or layer is None or layer.geometry is None or layer.geometry[3] != 1:
        return None
    x, axes = program.values[layer.x.number], layer.weight.dim() - 2
    # cuDNN 8 was wrong where the input is what is added (pytorch#62926).
    alias = other is not None and program.values[other.number].memory == x.memory
    batched = axes in (2, 3) and len(x.shape) == axes + 2
    waits = _may_wait(program, _Match(own.number, swallowed=(at,)), index)
    return layer if batched and waits and not alias else None


def _with_layer_norms(program: Program) -> Program:
    """The same program with layer normalisations in the residual additions before them."""
    steps: list[Step | None] = list(program.steps)
    for index, step in enumerate(program.steps):
        if step.func is not torch.layer_norm or not step.passing or len(step.args) < 5:
            continue
        x, shape, weight, bias, eps = step.args[:5]
        at = program.made_at.get(x.number) if isinstance(x, Ref) else None
        add = None if at is None else steps[at]
        if at is None or add is None or not _adds_two(program, add) or add.made != (x.number,):
            continue
        written = {n for one in program.steps[at + 1 : index] for n in one.overwritten}
        memory = program.values[x.number].memory
        small = len(shape) == 1 and shape[0] <= LARGEST and not any(refs_in((weight, bias)))
        if not small or memory in {program.values[number].memory for number in written}:
            continue
        args = (*add.args, weight, bias, eps, None)
        steps[at] = replace(add, func=add_layer_norm, args=args, outputs=(x.number, *step.outputs))
        steps[index] = None
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _adds_two(program: Program, step: Step) -> bool:
    """Whether a step adds two values of the points, of one shape and type."""
    two = not step.kwargs and len(step.args) == 2
    if step.info.kind != "addition" or not two or len([*refs_in(step.args)]) != 2:
        return False
    a, b = (program.values[one.number] for one in step.args)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and a.varying and b.varying and a.rowwise and b.rowwise


def _match(program: Program, index: int) -> _Match:
    """Follows the rectifier's operand up through an addition and a normalisation."""
    own = program.steps[index].args[0].number
    add = only_maker(program, own, index)
    if add is None:
        return _Match(own)
    step = program.steps[add]
    if (norm := norm_of(program, step)) is not None:
        return _Match(step.args[0].number, norm, None, (add,))
    if not _adds_two(program, step):
        return _Match(own)
    left, right = (one.number for one in step.args)
    for normed, residual in ((left, right), (right, left)):
        at = only_maker(program, normed, add)
        norm = None if at is None else norm_of(program, program.steps[at])
        if at is not None and norm is not None and normed != residual:
            return _Match(program.steps[at].args[0].number, norm, residual, (at, add))
    return _Match(left, None, right, (add,))


def _may_wait(program: Program, match: _Match, index: int) -> bool:
    """Whether steps up to `index` leave alone what swallowed steps take and overwrite."""
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


def _may_overwrite(program: Program, match: _Match, index: int) -> bool:
    """Whether the rectifier's base is fresh memory that only the fused steps take."""
    maker = program.made_at.get(match.base)
    if match.base == match.residual or set(program.uses[match.base]) - {index, *match.swallowed}:
        return False
    if maker is None:
        # Points are donated; further arguments are the user's.
        fresh = match.base in program.inputs
    else:
        fresh = program.steps[maker].info.fresh and program.steps[maker].passing
    return fresh and not is_viewed_later(program, match.base, index)
