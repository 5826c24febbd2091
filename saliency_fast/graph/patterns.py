"""Patterns: what passes over a program ask of its steps and values before they join them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from saliency_fast.graph.program import Program, Ref, Step

_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


def only_maker(program: Program, number: int, user: int) -> int | None:
    """The place of the step that made a value, where `user` alone takes it and it has no views."""
    place = program.born.get(number)
    if place is None or program.uses.get(number) != (user,) or watched(program, number, user):
        return None
    step = program.steps[place]
    return place if step.varying and not step.detached and step.outputs == (number,) else None


def watched(program: Program, number: int, place: int) -> bool:
    """Whether another value of the same memory is still looked at behind `place`."""
    memory = program.values[number].memory
    return any(
        other != number and program.values[other].memory == memory and places[-1] > place
        for other, places in program.uses.items()
        if program.born.get(other, -1) < place
    )


def is_norm(program: Program, step: Step) -> bool:
    """Batch normalisation with frozen statistics and parameters of the input's type, that gradients
    pass.
    """
    if step.func is not torch.batch_norm or step.kwargs or len(step.args) < len(_NORM):
        return False
    x, *parameters, training, _, _ = step.args[: len(_NORM)]
    if not isinstance(x, Ref) or not step.varying or step.detached:
        return False
    if training or any(isinstance(one, Ref) for one in parameters) or parameters[2] is None:
        return False
    dtype = program.values[x.number].dtype
    return all(one is None or one.dtype == dtype for one in parameters)


def norm_parameters(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """(weight, bias, mean, variance, eps) of a batch normalisation."""
    _, weight, bias, mean, variance, _, _, eps = args[: len(_NORM)]
    return weight, bias, mean, variance, eps


def quiet(program: Program, start: int, stop: int, numbers: Iterable[int]) -> bool:
    """Whether no step between two others overwrites memory of `numbers`."""
    memories = {program.values[number].memory for number in numbers}
    return not any(
        program.values[number].memory in memories
        for step in program.steps[start + 1 : stop]
        for number in step.overwritten
    )
