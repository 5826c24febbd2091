"""Loop-invariant code: steps of a program that depend on weights alone (folded, standardised or in
another memory format) run once a call, not in every launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast._torch_compat import storage_id
from saliency_fast.graph.passes.fusion import Layer, convolution
from saliency_fast.graph.program import PerRow, Prepared, Program, Read, Ref, leaves_in, refs_in

Env = dict[int, Tensor]
Weights = tuple[Tensor, Tensor | None]


def with_invariants(program: Program, known: dict[Any, Any] | None = None) -> Prepared:
    """The program whose invariant steps have run; known: tensors made already, filled."""
    indices, layers = frozenset(_invariant(program)), list(_prepared(program))
    made = {number for index in indices for number in program.steps[index].outputs}
    outputs = {one.number for one in refs_in(program.outputs)}
    kept = sorted(made & (_used(program, indices) | outputs))

    def make(known: dict[Any, Any]) -> tuple[Env, dict[int, Weights]]:
        given = tuple(number for number in known if isinstance(number, int))
        missing = [Ref(number) for number in kept if number not in known]
        part, env = program.part(given, missing, program.tree), {n: known[n] for n in given}
        with torch.no_grad():
            part.run(env, 1, 0, len(part.steps))
            known |= {one.number: env[one.number] for one in missing}
            for layer in layers:
                if _key(layer) not in known:
                    known[_key(layer)] = _weights(program, layer)
        kept_values = {number: known[number] for number in kept}
        return kept_values, {layer.index: known[_key(layer)] for layer in layers}

    def tensors(env: Env, ready: dict[int, Weights]) -> tuple[Tensor, ...]:
        return (*env.values(), *(one for two in ready.values() for one in two if one is not None))

    env, ready = make({} if known is None else known)

    def put(leaf: Any) -> Any:
        return env.get(leaf.number, leaf) if isinstance(leaf, Ref) else leaf

    steps = {n: step.with_arguments(put) for n, step in enumerate(program.steps)}
    for layer in layers:
        args = (put(layer.x), *ready[layer.index], *layer.options)
        steps[layer.index] = replace(steps[layer.index], func=layer.call, args=args)

    found = replace(
        program,
        steps=tuple(step for index, step in steps.items() if index not in indices),
        segments=tuple(end - sum(one < end for one in indices) for end in program.segments),
        outputs=tuple(map(put, program.outputs)),
    )
    return Prepared(found, ((lambda: tensors(*make({})), tensors(env, ready)),))


def invariant_bytes(program: Program) -> int:
    """Bytes that invariant steps make of their own, for the time of a call."""
    indices = frozenset(_invariant(program))
    used = _used(program, indices)
    memories = set(map(storage_id, program.constants))
    own = {
        value.memory: value.nbytes
        for index in indices
        for number in program.steps[index].outputs
        if number in used and (value := program.values[number]).memory not in memories
    }
    return sum(own.values()) + sum(layer.weight.nbytes for layer in _prepared(program))


def _used(program: Program, indices: frozenset[int]) -> set[int]:
    """The values that the other steps take."""
    others = (step for index, step in enumerate(program.steps) if index not in indices)
    return {number for step in others for number in step.used}


def _invariant(program: Program) -> Iterator[int]:
    """Indices of the steps that take weights alone, and whose results no step overwrites."""
    overwritten = {
        program.values[number].memory
        for step in program.steps
        for number in (*step.overwritten, *(after for _, after in step.changed))
    }
    known: set[int] = set()
    for index, step in enumerate(program.steps):
        values = [program.values[number] for number in step.outputs]
        if step.varying or step.changed or not values or isinstance(step.func, Read):
            continue
        grows = any(any(one.growth) or one.memory in overwritten for one in values)
        follows = any(isinstance(one, PerRow) for one in leaves_in((step.args, step.kwargs)))
        if not grows and not follows and step.used <= known:
            known.update(step.outputs)
            yield index


def _prepared(program: Program) -> Iterator[Layer]:
    """Convolutions with folded weights, or with weights in oneDNN's format for volumes."""
    for index, step in enumerate(program.steps):
        if (layer := convolution(index, step)) is None:
            continue
        weight, last = layer.weight, torch.channels_last_3d
        plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
        volumes = plain and weight.dim() == 5 and program.channels_last
        if layer.norm is not None or (volumes and not weight.is_contiguous(memory_format=last)):
            yield layer


def _key(layer: Layer) -> tuple[int, bool]:
    return layer.output, layer.norm is not None


def _weights(program: Program, layer: Layer) -> Weights:
    weight, bias = layer.weights()
    if weight.dim() == 5 and program.channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return weight, bias
