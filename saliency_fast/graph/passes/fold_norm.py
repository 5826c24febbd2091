"""Folds what surrounds a convolution into it: batch normalisation behind, concatenation before.

Both spare tensors of the size of the activations and a pass over them.
"""

from __future__ import annotations

from dataclasses import replace

from saliency_fast.graph.fused import folded_convolution, partial_convolution
from saliency_fast.graph.patterns import Layer, convolution, layers, only_maker
from saliency_fast.graph.program import Program, Ref, Step

SMALLER = 8
"""Times that a weight must be smaller than what its convolution writes for a row, to be folded:
where calls share launches, anew in every one."""


def folded(program: Program) -> Program:
    """The same program with fewer tensors of the size of its activations."""
    return _without_norms(_without_cats(program))


def _without_norms(program: Program) -> Program:
    """Batch normalisations in the weights of the convolutions before them."""
    steps: list[Step | None] = list(program.steps)
    for layer in layers(program):
        small = SMALLER * layer.weight.nbytes <= program.values[layer.output].nbytes
        if (
            layer.norm_index is None
            or not small
            or program.steps[layer.norm_index].info.kind != ("normalisation")
        ):
            continue
        args = (layer.x, layer.weight, layer.bias, layer.call, layer.options, layer.norm)
        made = program.steps[layer.index]
        steps[layer.index] = replace(
            made, func=folded_convolution, args=args, outputs=(layer.output,)
        )
        steps[layer.norm_index] = None
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
