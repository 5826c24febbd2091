"""Patterns that several passes match: a convolution with its normalisation and rectifier, and what
must hold of steps and values before they are joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.fused import Norm
from saliency_fast.graph.program import Program, Ref, Step, refs_in

_NORM_ARGUMENTS = 8


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


def layers(program: Program) -> Iterator[Layer]:
    """The convolutions of a program, in order."""
    for index, step in enumerate(program.steps):
        layer = convolution(index, step)
        if layer is not None:
            yield _with_rectifier(program, _with_norm(program, layer))


def convolution(index: int, step: Step) -> Layer | None:
    """A step as a layer, without what is behind it; None where it is no convolution with weights
    of the model's own, or its arguments go by name.
    """
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


def _with_norm(program: Program, layer: Layer) -> Layer:
    user = _only_user(program, layer.output)
    if user is None or layer.norm is not None or not is_norm(program, program.steps[user]):
        return layer
    step = program.steps[user]
    if step.args[0].number != layer.output:
        return layer
    norm = norm_parameters(step.args)
    return replace(layer, norm=norm, norm_index=user, output=step.outputs[0])


def _with_rectifier(program: Program, layer: Layer) -> Layer:
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
    index = program.born.get(number)
    if index is None or program.uses.get(number) != (user,) or watched(program, number, user):
        return None
    step = program.steps[index]
    return index if step.passing and step.outputs == (number,) else None


def watched(program: Program, number: int, index: int) -> bool:
    """Whether a step after `index` takes another value of the same memory."""
    memory = program.values[number].memory
    return any(
        other != number and program.values[other].memory == memory and indices[-1] > index
        for other, indices in program.uses.items()
        if program.born.get(other, -1) < index
    )


def is_norm(program: Program, step: Step) -> bool:
    """Batch normalisation with frozen statistics and parameters of the input's type, that gradients
    pass.
    """
    if step.func is not torch.batch_norm or step.kwargs or len(step.args) < _NORM_ARGUMENTS:
        return False
    x, *parameters, training, _, _ = step.args[:_NORM_ARGUMENTS]
    if not isinstance(x, Ref) or not step.passing:
        return False
    if training or any(refs_in(tuple(parameters))) or parameters[2] is None:
        return False
    dtype = program.values[x.number].dtype
    return all(one is None or one.dtype == dtype for one in parameters)


def norm_parameters(args: tuple[Any, ...]) -> Norm:
    """The parameters of a batch normalisation with these arguments."""
    _, weight, bias, mean, variance, _, _, eps = args[:_NORM_ARGUMENTS]
    return weight, bias, mean, variance, eps
