"""Scores alone: a program for launches without gradients. Convolutions on the CPU include the
normalisation and rectifier behind them, and their weights are prepared once: folded, and
transformed or in the order in which oneDNN takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from saliency_fast import _torch_compat as compat
from saliency_fast import ops
from saliency_fast.graph.autograd.convolutions import winograd_pays
from saliency_fast.graph.passes.fusion import Layer, layers, without_norm
from saliency_fast.graph.program import Program, Step

WINOGRAD_BYTES = 4
"""Bytes of transformed weights for each byte of a 3x3 kernel: 36 numbers for nine."""


@dataclass(frozen=True)
class _Prepared:
    """A layer of a program with the arguments of its convolution in order."""

    layer: Layer
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    shape: tuple[int, ...]

    @property
    def by_winograd(self) -> bool:
        if len(self.shape) != 4:
            return False
        x = torch.empty(self.shape, device="meta")
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return winograd_pays(x, self.layer.weight, None, *geometry)

    @property
    def nbytes(self) -> int:
        copies = WINOGRAD_BYTES + (self.layer.norm is not None) if self.by_winograd else 1
        return int(self.layer.weight.nbytes) * copies

    def call(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        (weight, bias), relu = self.layer.weights(), self.layer.relu_index is not None
        if self.by_winograd:
            transformed = ops.winograd_weights(weight)
            return _winograd, (self.layer.x, weight, bias, self.padding, relu, transformed)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight = compat.ONEDNN_REORDER(weight, *geometry, (1, *self.shape[1:]))
        rectifier = "relu" if relu else "none"
        return _reordered, (self.layer.x, weight, bias, *geometry, rectifier, [], "")


def _winograd(*args: Any) -> Any:
    return ops.winograd(*args)


def _reordered(*args: Any) -> Any:
    return compat.ONEDNN_FUSED(*args)


def scoring(program: Program) -> Program:
    """The same program without gradients, for as long as its weights do not change."""
    steps: list[Step | None] = list(program.steps)
    with torch.no_grad():
        for one in _prepared(program):
            layer, last = one.layer, one.layer.index
            behind = layer.norm_index
            if behind is not None and behind != layer.relu_index:
                if program.steps[behind].info.kind == "rectified":
                    steps[behind] = without_norm(program.steps[behind])
                else:
                    steps[behind], last = None, behind
            if layer.relu_index is not None:
                steps[layer.relu_index], last = None, layer.relu_index
            (call, args), own = one.call(), program.steps[layer.index]
            outputs = program.steps[last].outputs
            steps[layer.index] = replace(own, func=call, args=args, outputs=outputs)
    return replace(program, steps=tuple(step for step in steps if step is not None))


def prepared_bytes(program: Program) -> int:
    return sum(one.nbytes for one in _prepared(program))


def _prepared(program: Program) -> Iterator[_Prepared]:
    """The convolutions for which there is a faster call than PyTorch's own."""
    # All calls hand on channels last.
    if program.segments or not program.channels_last:
        return
    onednn = compat.HAS_ONEDNN_ORDERS and compat.onednn_enabled()
    for layer in layers(program):
        one = _geometry(program, layer)
        if one is not None and (onednn or one.by_winograd):
            yield one


def _geometry(program: Program, layer: Layer) -> _Prepared | None:
    """The arguments of an image's or volume's convolution in float32 on the CPU."""
    step, axes = program.steps[layer.index], layer.weight.dim() - 2
    values = [program.values[one] for one in (layer.x.number, *step.outputs)]
    own = [one for one in (layer.weight, layer.bias) if one is not None]
    plain = all(one.rowwise and len(one.shape) == axes + 2 for one in values)
    on_cpu = all(one.device.type == "cpu" for one in own)
    exact = {one.dtype for one in values} | {one.dtype for one in own} == {torch.float32}
    if step.changed or axes not in (2, 3) or not (plain and on_cpu and exact):
        return None
    geometry = layer.geometry
    return geometry and _Prepared(layer, *geometry, program.values[layer.x.number].shape)
