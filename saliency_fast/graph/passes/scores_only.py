"""Scores alone: a program for launches without gradients, its weights as they are now.

Convolutions on the CPU take along what is behind them (normalisation, rectifier, and the maximum
pool of an image's first one), and their weights are made ready once: folded, and in the order in
which loops take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.graph.autograd.convolutions import each_axis, even_edges
from saliency_fast.graph.autograd.winograd import built, pays
from saliency_fast.graph.passes.fold_norm import Norm, folded_convolution, folded_weights
from saliency_fast.graph.passes.fuse_relu import rectified
from saliency_fast.graph.patterns import is_norm, norm_parameters, only_maker
from saliency_fast.graph.program import Program, Ref, Step
from saliency_fast.ops.direct import FEW
from saliency_fast.ops.winograd import CHANNELS

_AXES = {torch.conv2d: 2, torch.conv3d: 3}
_TAPS = 64
"""Products of a result up to which a direct convolution takes no more time than oneDNN's, which
fills registers with channels that an image does not have."""


@dataclass(frozen=True)
class _Layer:
    """A convolution of a program, and the steps behind it that go along.

    place: of its step. taken: of the others. output: the number of what the last one makes.
    """

    place: int
    taken: tuple[int, ...]
    output: int
    x: Ref
    size: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    norm: Norm | None
    relu: bool
    pool: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def few(self) -> bool:
        """Whether it is the direct convolution of an image of few channels."""
        kernel = self.weight.shape[1:]
        small = len(kernel) == 3 and kernel[0] <= FEW and math.prod(kernel) <= _TAPS
        alike = self.groups == max(self.dilation) == 1 and not len(self.weight) % CHANNELS
        return small and alike and built()

    @property
    def by_winograd(self) -> bool:
        if self.weight.dim() != 4:
            return False
        x = torch.empty(self.size, device="meta")
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        return pays(x, self.weight, None, *sizes)

    @property
    def helped(self) -> bool:
        """Whether there is a faster call than PyTorch's own."""
        return self.few or self.by_winograd or _onednn()

    @property
    def ready_bytes(self) -> int:
        if self.few or not self.by_winograd:
            return int(self.weight.nbytes)
        # 36 numbers of each 3x3, beside what was folded.
        return int(self.weight.nbytes) * (4 + (self.norm is not None))

    def ready(self) -> Callable[[Tensor], Tensor]:
        """The layer as a call of its input."""
        weight, bias = self.weight, self.bias
        if self.norm is not None:
            weight, bias = folded_weights(weight, bias, self.norm)
        if self.few:
            return _Direct(weight, bias, self.stride, self.padding, self.relu, self.pool)
        if self.by_winograd:
            ready = ops.winograd_weights(weight)
            return _Winograd(weight, bias, self.padding, self.relu, ready)
        size = (1, *self.size[1:])
        options = (self.padding, self.stride, self.dilation, self.groups)
        ready = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, size)
        return _Reordered(ready, bias, options, self.relu)


@dataclass(frozen=True, eq=False)
class _Direct:
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    relu: bool
    pool: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        about = (self.stride, self.padding, self.relu, self.pool)
        found: Tensor = ops.direct(x, self.weight, self.bias, *about)
        return found


@dataclass(frozen=True, eq=False)
class _Winograd:
    weight: Tensor
    bias: Tensor | None
    padding: list[int]
    relu: bool
    ready: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        about = (self.padding, self.relu, self.ready)
        found: Tensor = ops.winograd(x, self.weight, self.bias, *about)
        return found


@dataclass(frozen=True, eq=False)
class _Reordered:
    """oneDNN's, with its weights in its own order."""

    weight: Tensor
    bias: Tensor | None
    options: tuple[Any, ...]
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        behind = "relu" if self.relu else "none"
        call = torch.ops.mkldnn._convolution_pointwise
        found: Tensor = call(x, self.weight, self.bias, *self.options, behind, [], "")
        return found


def scoring(program: Program) -> Program:
    """The same program without gradients, for as long as its weights do not change."""
    steps: list[Step | None] = list(program.steps)
    with torch.no_grad():
        for layer in _layers(program):
            last = program.steps[layer.taken[-1]] if layer.taken else program.steps[layer.place]
            for place in layer.taken:
                steps[place] = None
            own = replace(program.steps[layer.place], func=layer.ready(), args=(layer.x,))
            steps[layer.place] = replace(own, outputs=last.outputs)
            _without_norm(program, steps, layer)
    return replace(program, steps=tuple(step for step in steps if step is not None))


def ready_bytes(program: Program) -> int:
    """What the weights of `scoring` take."""
    return sum(layer.ready_bytes for layer in _layers(program))


def _without_norm(program: Program, steps: list[Step | None], layer: _Layer) -> None:
    """Takes the normalisation that went along with a layer from the rectifier behind it."""
    uses = program.uses.get(layer.output, ())
    step = steps[uses[0]] if len(uses) == 1 and uses[0] < len(steps) else None
    if step is not None and step.func is rectified and step.args[1] is layer.norm is not None:
        x, _, *others = step.args
        steps[uses[0]] = replace(step, args=(x, None, *others))


def _layers(program: Program) -> Iterator[_Layer]:
    """The convolutions whose weights are the model's own, in float32 on the CPU."""
    # All calls hand on channels last.
    if program.pieces or not program.channels_last:
        return
    for place, step in enumerate(program.steps):
        found = _layer(program, place, step)
        if found is not None and found.helped:
            yield found


def _onednn() -> bool:
    """Whether oneDNN runs here, with weights in an order of its own."""
    enabled = torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()
    return enabled and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def _layer(program: Program, place: int, step: Step) -> _Layer | None:
    if not step.varying or step.detached or step.kwargs or step.changed:
        return None
    norm: Norm | None = None
    if step.func is folded_convolution:
        x, weight, bias, func, options, norm = step.args
    elif step.func in _AXES and len(step.args) > 1:
        x, weight, *others = step.args
        bias, options, func = others[0] if others else None, tuple(others[1:]), step.func
    else:
        return None
    axes = _AXES.get(func)
    if axes is None or not isinstance(x, Ref):
        return None
    if not all(_plain(program.values[one], axes) for one in (x.number, *step.outputs)):
        return None
    if not isinstance(weight, Tensor) or isinstance(bias, Ref) or not _ours(weight, bias):
        return None
    geometry = _geometry(weight, options, axes)
    if geometry is None:
        return None
    value = program.values[x.number]
    about = (x, value.shape, weight.detach(), None if bias is None else bias.detach())
    plain = _Layer(place, (), step.outputs[0], *about, norm, False, (), *geometry)
    return _pooled(program, _rectified(program, _normalised(program, plain)))


def _plain(value: Any, axes: int) -> bool:
    return value.rowwise and value.dtype == torch.float32 and len(value.shape) == axes + 2


def _ours(weight: Tensor, bias: Tensor | None) -> bool:
    own = [one for one in (weight, bias) if one is not None]
    return all(one.dtype == torch.float32 and one.device.type == "cpu" for one in own)


def _geometry(
    weight: Tensor, options: Sequence[Any], axes: int
) -> tuple[list[int], list[int], list[int], int] | None:
    """(stride, padding, dilation, groups); None for paddings by name that are not even."""
    given: tuple[Any, ...] = (*options, *(1, 0, 1, 1)[len(options) :])
    stride, padding, dilation, groups = given
    holes = each_axis(dilation, axes)
    edges = even_edges(padding, weight, holes)
    return None if edges is None else (each_axis(stride, axes), edges, holes, int(groups))


def _behind(program: Program, layer: _Layer) -> tuple[int, Step] | None:
    """The only step that takes what a layer makes."""
    uses = program.uses.get(layer.output, ())
    if len(uses) != 1 or uses[0] >= len(program.steps):
        return None
    maker = layer.taken[-1] if layer.taken else layer.place
    if only_maker(program, layer.output, uses[0]) != maker:
        return None
    return uses[0], program.steps[uses[0]]


def _along(layer: _Layer, place: int, step: Step, **more: Any) -> _Layer:
    return replace(layer, taken=(*layer.taken, place), output=step.outputs[0], **more)


def _normalised(program: Program, layer: _Layer) -> _Layer:
    found = _behind(program, layer)
    if found is None or layer.norm is not None:
        return layer
    place, step = found
    if is_norm(program, step) and step.args[0].number == layer.output:
        return _along(layer, place, step, norm=norm_parameters(step.args))
    return layer


def _rectified(program: Program, layer: _Layer) -> _Layer:
    """With the rectifier behind it, or at least with its normalisation."""
    found = _behind(program, layer)
    if found is None or found[1].func is not rectified:
        return layer
    place, step = found
    base, norm, residual, slope, upper, _ = step.args
    if base.number != layer.output or (norm is not None and layer.norm is not None):
        return layer
    if residual == base:
        # It is taken twice, and once without the normalisation.
        return layer
    layer = layer if norm is None else replace(layer, norm=norm)
    whole = residual is None and slope == 0.0 and upper == math.inf
    return _along(layer, place, step, relu=True) if whole else layer


def _pooled(program: Program, layer: _Layer) -> _Layer:
    found = _behind(program, layer)
    if found is None or found[1].func is not torch.max_pool2d or not layer.few:
        return layer
    place, step = found
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, step.args[1:], strict=False)) | dict(step.kwargs)
    if step.changed or not set(given) <= set(names) or given.get("ceil_mode"):
        return layer
    kernel = each_axis(given["kernel_size"], 2)
    stride = each_axis(given.get("stride") or kernel, 2)
    padding = each_axis(given.get("padding", 0), 2)
    if max(each_axis(given.get("dilation", 1), 2)) > 1 or math.prod(kernel) > 256:
        return layer
    return _along(layer, place, step, pool=(*kernel, *stride, *padding))
