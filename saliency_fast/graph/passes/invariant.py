"""Loop-invariant code: steps of a program that depend on weights alone run once a call.

Folded, standardised and normalised weights, and those in another memory format, are as large as the
weights: made in every launch, they cost time there, and memory that is counted for a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.passes.fold_norm import folded_convolution, folded_weights
from saliency_fast.graph.program import PerRow, Program, Read, Ref, Step, refs_in

Env = dict[int, Tensor]


@dataclass(frozen=True)
class Settled:
    """A program whose invariant steps have run, and what they made."""

    program: Program
    made: tuple[Tensor, ...]
    again: Callable[[], tuple[Tensor, ...]]

    def refresh(self) -> None:
        """Makes the same anew, in the same places."""
        weights = self.program.memories
        for mine, new in zip(self.made, self.again(), strict=True):
            # Views of the model's own weights are what these are now.
            if new.untyped_storage().data_ptr() not in weights:
                mine.copy_(new)


def settled(program: Program, known: dict[Any, Any] | None = None) -> Settled:
    """The program for as long as its weights do not change: invariant steps have run.

    known: what was made already for another part of the same program, by number; filled.
    """
    places = frozenset(_invariant(program))
    layers = [n for n, step in enumerate(program.steps) if _made(program, step)]
    used = {number for step in _others(program, places) for number in step.used}
    made = {number for place in places for number in program.steps[place].outputs}
    kept = sorted(made & (used | {one.number for one in refs_in(program.outputs)}))

    def make(known: dict[Any, Any]) -> tuple[Env, dict[int, tuple[Tensor, Tensor | None]]]:
        with torch.no_grad():
            _run(program, places, kept, known)
            for place in layers:
                if (key := _key(program.steps[place])) not in known:
                    known[key] = _weights(program, program.steps[place])
        env = {number: known[number] for number in kept}
        return env, {place: known[_key(program.steps[place])] for place in layers}

    env, ready = make({} if known is None else known)
    steps = list[Step]()
    for place, step in enumerate(program.steps):
        if place in ready:
            x, _, _, convolution, options, _ = _layer(step)
            step = replace(step, func=convolution, args=(x, *ready[place], *options))
        elif not step.used.isdisjoint(env):
            args, kwargs = _put(step.args, env), _put(dict(step.kwargs), env)
            step = replace(step, args=args, kwargs=kwargs)
        if place not in places:
            steps.append(step)

    def again() -> tuple[Tensor, ...]:
        found, weights = make({})
        return (*found.values(), *_each(weights.values()))

    pieces = tuple(place - sum(one < place for one in places) for place in program.pieces)
    outputs = tuple(_put(one, env) for one in program.outputs)
    found = replace(program, steps=tuple(steps), pieces=pieces, outputs=outputs)
    return Settled(found, (*env.values(), *_each(ready.values())), again)


def _run(program: Program, places: frozenset[int], kept: list[int], known: dict[Any, Any]) -> None:
    """Adds the values `kept` to those known, and lets go of what leads there as it goes."""
    needed, chain = set(kept) - known.keys(), list[int]()
    for place in sorted(places, reverse=True):
        step = program.steps[place]
        if needed & set(step.outputs):
            chain.append(place)
            needed |= step.used - known.keys()
    last = {number: place for place in chain[::-1] for number in program.steps[place].used}
    env: Env = {number: known[number] for number in last if number in known}
    for place in reversed(chain):
        step = program.steps[place]
        step.run(env, 1)
        known.update({number: env[number] for number in step.outputs if number in kept})
        for number in (*step.used, *step.outputs):
            if last.get(number, -1) <= place:
                env.pop(number, None)


def settled_bytes(program: Program) -> int:
    """What invariant steps make of their own, for the time of a call."""
    places = frozenset(_invariant(program))
    used = {number for step in _others(program, places) for number in step.used}
    memories = {one.untyped_storage()._cdata for one in program.constants}
    own = {
        value.memory: value.nbytes
        for place in places
        for number in program.steps[place].outputs
        if number in used and (value := program.values[number]).memory not in memories
    }
    layers = (step.args[1].nbytes for step in program.steps if _made(program, step))
    return int(sum(own.values()) + sum(layers))


def _others(program: Program, places: frozenset[int]) -> Iterator[Step]:
    return (step for place, step in enumerate(program.steps) if place not in places)


def _invariant(program: Program) -> Iterator[int]:
    """Places of the steps that take weights alone, and whose results nobody overwrites."""
    overwritten = {
        program.values[number].memory
        for step in program.steps
        for number in (*step.overwritten, *(after for _, after in step.changed))
    }
    known: set[int] = set()
    for place, step in enumerate(program.steps):
        values = [program.values[number] for number in step.outputs]
        if step.varying or step.changed or not values or isinstance(step.func, Read):
            continue
        grows = any(any(one.growth) or one.memory in overwritten for one in values)
        if grows or not step.used <= known or _per_row((step.args, dict(step.kwargs))):
            continue
        known.update(step.outputs)
        yield place


def _per_row(template: Any) -> bool:
    if isinstance(template, (tuple, list)):
        return any(map(_per_row, template))
    if isinstance(template, dict):
        return _per_row(tuple(template.values()))
    if isinstance(template, slice):
        return _per_row((template.start, template.stop, template.step))
    return isinstance(template, PerRow)


def _made(program: Program, step: Step) -> bool:
    """Whether a step's weights are the model's own, and others are made of them: folded, or for
    volumes in the memory format in which oneDNN takes them.
    """
    if step.func is folded_convolution:
        _, weight, bias, _, _, norm = step.args
        return isinstance(weight, Tensor) and not any(refs_in((bias, norm)))
    if step.func is not torch.conv3d or not step.varying or step.kwargs or len(step.args) < 2:
        return False
    weight, *bias = step.args[1:3]
    if not isinstance(weight, Tensor) or any(refs_in(tuple(bias))):
        return False
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return program.channels_last and plain and not _innermost(weight)


def _key(step: Step) -> tuple[int, bool]:
    return step.outputs[0], step.func is folded_convolution


def _innermost(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last_3d)


def _layer(step: Step) -> tuple[Any, ...]:
    """(input, weight, bias, convolution, further options, normalisation or None)."""
    if step.func is folded_convolution:
        return step.args
    x, weight, *others = step.args
    return x, weight, (*others, None)[0], step.func, tuple(others[1:]), None


def _weights(program: Program, step: Step) -> tuple[Tensor, Tensor | None]:
    _, weight, bias, _, _, norm = _layer(step)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if norm is not None:
        weight, bias = folded_weights(weight, bias, norm)
    if weight.dim() == 5 and program.channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return weight, bias


def _each(weights: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    return (one for two in weights for one in two if one is not None)


def _put(template: Any, env: Env) -> Any:
    """A template with the values in `env` in their places; others stay to be filled."""
    if isinstance(template, Ref):
        return env.get(template.number, template)
    if type(template) in (tuple, list):
        return type(template)([_put(one, env) for one in template])
    if type(template) is dict:
        return {name: _put(one, env) for name, one in template.items()}
    if type(template) is slice:
        return slice(*[_put(one, env) for one in (template.start, template.stop, template.step)])
    return template
