"""Pools that keep one byte per window, or nothing, and paddings by the points' own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast import ops
from saliency_fast._torch_compat import NN, backward_operator
from saliency_fast.graph.autograd.convolutions import Ints, Sizes, each_axis
from saliency_fast.graph.gradients import differentiable, takes_first
from saliency_fast.graph.opinfo import LEAN, lean
from saliency_fast.ops.masks import DTYPES
from saliency_fast.ops.pools import LARGEST_WINDOW, layout

_PADS = {"reflect": "reflection_pad", "replicate": "replication_pad"}


def _served(x: Tensor, axes: int) -> bool:
    return x.dim() == axes + 2 and x.dtype in DTYPES


def _strides(stride: Sizes | None, kernel: Ints) -> Ints:
    """Strides per axis; by default windows lie side by side."""
    return kernel if stride is None or stride == [] else each_axis(stride, len(kernel))


def _max_pool(call: Callable[..., Any], axes: int) -> None:
    @lean(call)
    def max_pool(
        input: Tensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        ceil_mode: bool = False,
    ) -> Any:
        kernel = each_axis(kernel_size, axes)
        if not _served(input, axes) or math.prod(kernel) > LARGEST_WINDOW:
            return NotImplemented
        edges, holes = each_axis(padding, axes), each_axis(dilation, axes)
        options = (kernel, _strides(stride, kernel), edges, holes, ceil_mode)
        if not torch.is_grad_enabled() or not takes_first(call, axes, layout(input)):
            return NotImplemented
        size = list(input.shape[2:])

        def run(x: Tensor) -> Any:
            y, index = ops.maxpool_index(x, *options)
            return y, (index,)

        def back(grad: Tensor, index: Tensor) -> Any:
            return ops.maxpool_index_backward(grad, index, size, *options[:-1])

        return differentiable(input, run, back)


class _AdaptiveMaxPool(torch.autograd.Function):
    """Windows of any size: keeps where the maxima lie, and not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Any, pool: Callable[..., Any]) -> Any:
        y, index = pool(x, size)
        ctx.save_for_backward(index)
        ctx.shape, ctx.layout = x.shape, layout(x)
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        found = grad.new_zeros((*ctx.shape[:2], math.prod(ctx.shape[2:])))
        found.scatter_add_(2, index.flatten(2), grad.flatten(2))
        return found.view(ctx.shape).contiguous(memory_format=ctx.layout), None, None


def _adaptive_max_pool(call: Callable[..., Any], axes: int) -> None:
    @lean(call)
    def adaptive_max_pool(input: Tensor, output_size: Any) -> Any:
        if not _served(input, axes):
            return NotImplemented
        return _AdaptiveMaxPool.apply(input, output_size, call)  # type: ignore[no-untyped-call]


def _shaped(x: Tensor, call: Callable[..., Any], transpose: Callable[..., Any], *rest: Any) -> Any:
    """A call whose transpose needs the shape of its input alone."""
    size, form = x.shape, layout(x)

    def back(grad: Tensor) -> Any:
        # The operators ask for the input and read its shape: one number stands for all.
        found = transpose(grad, grad.new_empty(()).expand(size), *rest)
        # As the input lies: activations are slow where values and gradients lie differently.
        return found.contiguous(memory_format=form)

    return differentiable(x, lambda one: (call(one, *rest), ()), back)


# PyTorch, too, averages a series as an image of one line.


def _average_pool(call: Callable[..., Any], axes: int) -> None:
    pool = NN.avg_pool2d if axes == 1 else call
    transpose = backward_operator(f"avg_pool{max(2, axes)}d")

    @lean(call)
    def average_pool(
        input: Tensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if not _served(input, axes):
            return NotImplemented
        kernel = each_axis(kernel_size, axes)
        sizes = [kernel, _strides(stride, kernel), each_axis(padding, axes)]
        options = (ceil_mode, count_include_pad, divisor_override)
        if axes > 1:
            return _shaped(input, pool, transpose, *sizes, *options)
        sizes = [[one, *own] for one, own in zip((1, 1, 0), sizes, strict=True)]
        return _shaped(input.unsqueeze(2), pool, transpose, *sizes, *options).squeeze(2)


def _adaptive_average_pool(call: Callable[..., Any], axes: int) -> None:
    pool = NN.adaptive_avg_pool2d if axes == 1 else call
    transpose = backward_operator(f"_adaptive_avg_pool{max(2, axes)}d")

    @lean(call)
    def adaptive_average_pool(input: Tensor, output_size: Any) -> Any:
        if not _served(input, axes):
            return NotImplemented
        sizes = zip(each_axis(output_size, axes), input.shape[2:], strict=True)
        wanted = [1] * (axes == 1) + [own if size is None else size for size, own in sizes]
        x = input.unsqueeze(2) if axes == 1 else input
        found = _shaped(x, pool, lambda grad, x, _: transpose(grad, x), wanted)
        return found.squeeze(2) if axes == 1 else found


_max_pool(torch.max_pool1d, 1)
_adaptive_max_pool(torch.adaptive_max_pool1d, 1)
_average_pool(torch.avg_pool1d, 1)
_adaptive_average_pool(torch.adaptive_avg_pool1d, 1)
for _axes in (2, 3):
    _max_pool(getattr(torch, f"max_pool{_axes}d"), _axes)
    _adaptive_max_pool(getattr(NN, f"adaptive_max_pool{_axes}d"), _axes)
    _average_pool(getattr(NN, f"avg_pool{_axes}d"), _axes)
    _adaptive_average_pool(getattr(NN, f"adaptive_avg_pool{_axes}d"), _axes)


def _padding(call: Callable[..., Any], axes: int) -> None:
    transpose = backward_operator(call.__name__)

    @lean(call)
    def padded(input: Tensor, padding: Any) -> Any:
        if not _served(input, axes) or len(padding) != 2 * axes:
            return NotImplemented
        return _shaped(input, call, transpose, list(padding))


for _kind in _PADS.values():
    for _axes in (1, 2, 3):
        _padding(getattr(NN, f"{_kind}{_axes}d"), _axes)


@lean(NN.pad)
def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    call = getattr(NN, f"{_PADS[mode]}{len(pad) // 2}d", None) if mode in _PADS else None
    return NotImplemented if call is None else LEAN[call](input, pad)
