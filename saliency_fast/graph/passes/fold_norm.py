"""Folds what surrounds a convolution into it: batch normalisation behind, concatenation before.

Both spare tensors of the size of the activations and a pass over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.autograd.norms import affine_of
from saliency_fast.graph.intercept import lean_call
from saliency_fast.graph.patterns import is_norm, norm_parameters, only_maker, quiet
from saliency_fast.graph.program import Program, Ref, Step

Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
"""(weight, bias, mean, variance, eps) of a batch normalisation with frozen statistics."""
CONVOLUTIONS = frozenset((torch.conv1d, torch.conv2d, torch.conv3d))
SMALLER = 8
"""Times that a weight must be smaller than what its convolution writes for a row, to be folded:
where calls share launches, anew in every one."""


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Callable[..., Any],
    options: tuple[Any, ...],
    norm: Norm,
) -> Any:
    """The batch normalisation `norm` of a convolution, as one convolution."""
    wide, shift = folded_weights(weight, bias, norm)
    return lean_call(convolution, (x, wide, shift, *options), {})


def folded_weights(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution and the batch normalisation behind it in one."""
    scale, shift = affine_of(*norm)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


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


FOLDED = frozenset((folded_convolution, partial_convolution))


def folded(program: Program) -> Program:
    """The same program with fewer tensors of the size of its activations."""
    return _without_norms(_without_cats(program))


def _without_norms(program: Program) -> Program:
    """Batch normalisations in the weights of the convolutions before them."""
    steps: list[Step | None] = list(program.steps)
    for place, step in enumerate(program.steps):
        maker = only_maker(program, step.args[0].number, place) if is_norm(program, step) else None
        if maker is None or not _small(program, program.steps[maker]):
            continue
        made = program.steps[maker]
        x, weight, bias, options = _layer(made)
        args = (x, weight, bias, made.func, options, norm_parameters(step.args))
        steps[maker] = replace(made, func=folded_convolution, args=args, outputs=step.outputs)
        steps[place] = None
    return replace(program, steps=tuple(step for step in steps if step is not None))


def _without_cats(program: Program) -> Program:
    """The largest concatenations in the convolutions behind them, part by part."""
    values, steps = dict(program.values), list(map(_alone, program.steps))
    largest = max((value.nbytes for value in values.values() if value.varying), default=0)
    for place, step in enumerate(program.steps):
        cat = _cat(program, place)
        if cat is None or program.values[program.steps[cat].outputs[0]].nbytes < largest:
            continue
        steps[cat], steps[place] = [], []
        _, weight, bias, options = _layer(step)
        total, start = None, 0
        parts = program.steps[cat].args[0]
        for part in parts:
            made = step.outputs[0] if part is parts[-1] else len(values) + max(values)
            values[made] = program.values[step.outputs[0]]
            args = (part, total, weight, None if total else bias, step.func, options, start)
            changed = () if total is None else ((total.number, made),)
            one = replace(step, func=partial_convolution, args=args, outputs=(made,))
            steps[place].append(replace(one, changed=changed))
            total, start = Ref(made), start + values[part.number].shape[1]
    joined = tuple(step for several in steps for step in several)
    return replace(program, steps=joined, values=values)


def _alone(step: Step) -> list[Step]:
    return [step]


def _cat(program: Program, place: int) -> int | None:
    """The place of the concatenation of channels that a convolution alone takes."""
    step = program.steps[place]
    if step.func not in CONVOLUTIONS or not _plain(step) or _groups(step) != 1:
        return None
    cat = only_maker(program, step.args[0].number, place)
    if cat is None or program.steps[cat].func is not torch.cat:
        return None
    parts, *axis = program.steps[cat].args
    axis += program.steps[cat].kwargs.values()
    whole = all(isinstance(one, Ref) and program.values[one.number].varying for one in parts)
    numbers = [one.number for one in parts] if whole else []
    apart = len({*numbers}) == len(numbers) > 1
    return cat if apart and axis == [1] and quiet(program, cat, place, numbers) else None


def _small(program: Program, step: Step) -> bool:
    """Whether a call is a convolution whose weight is small beside what it writes."""
    if step.func not in CONVOLUTIONS or not _plain(step):
        return False
    return SMALLER * int(step.args[1].nbytes) <= program.values[step.outputs[0]].nbytes


def _plain(step: Step) -> bool:
    """Whether a convolution's weights are the model's own, and its arguments in order."""
    weights = [one for one in step.args[1:3] if one is not None]
    frozen = all(isinstance(one, Tensor) for one in weights)
    return len(step.args) > 1 and frozen and not step.kwargs and step.varying and not step.detached


def _layer(step: Step) -> tuple[Any, Tensor, Tensor | None, tuple[Any, ...]]:
    """(input, weight, bias, further options) of a convolution."""
    x, weight, *others = step.args
    return x, weight, others[0] if others else None, tuple(others[1:])


def _groups(step: Step) -> int:
    return int(step.args[6]) if len(step.args) > 6 else 1
