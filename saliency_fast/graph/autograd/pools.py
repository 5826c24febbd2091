"""Pools that keep one byte per window, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast import ops
from saliency_fast.graph.autograd.convolutions import Sizes, _on_cpu, each_axis
from saliency_fast.graph.autograd.ties import takes_first
from saliency_fast.ops.masks import DTYPES
from saliency_fast.ops.pools import layout

LARGEST_WINDOW = 256
_CALLS = {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
VALUES = 8
"""Channels from which maxima alone are found window by window."""


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        ceil_mode: bool,
    ) -> Any:
        y, index = ops.maxpool_index(x, kernel, stride, padding, dilation, ceil_mode)
        ctx.save_for_backward(index)
        ctx.options = (list(x.shape[2:]), kernel, stride, padding, dilation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return ops.maxpool_index_backward(grad, index, *ctx.options), *(None,) * 5


def _max_pool(axes: int) -> Callable[..., Any]:
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
        steps = kernel if stride is None or stride == [] else each_axis(stride, axes)
        edges, holes = each_axis(padding, axes), each_axis(dilation, axes)
        if not torch.is_grad_enabled() and _on_cpu(input):
            if layout(input) == torch.contiguous_format or input.shape[1] < VALUES:
                return NotImplemented
            return ops.maxpool(input, kernel, steps, edges, holes, ceil_mode)
        if not takes_first(_CALLS[axes], axes, layout(input)):
            return NotImplemented
        return _MaxPool.apply(input, kernel, steps, edges, holes, ceil_mode)  # type: ignore[no-untyped-call]

    return max_pool


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


def _adaptive_max_pool(axes: int, pool: Callable[..., Any]) -> Callable[..., Any]:
    def adaptive_max_pool(input: Tensor, output_size: Any) -> Any:
        if not _served(input, axes):
            return NotImplemented
        return _AdaptiveMaxPool.apply(input, output_size, pool)  # type: ignore[no-untyped-call]

    return adaptive_max_pool


class _Shaped(torch.autograd.Function):
    """A pool whose transpose needs the shape of its input alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pool: Callable[..., Tensor],
        transpose: Callable[..., Tensor],
        options: tuple[Any, ...],
    ) -> Tensor:
        ctx.shape, ctx.transpose, ctx.options = x.shape, transpose, options
        ctx.layout = layout(x)
        return pool(x, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The operators ask for the input and read its shape: one number stands for all.
        shape = grad.new_empty(()).expand(ctx.shape)
        found = ctx.transpose(grad, shape, *ctx.options)
        # As the input lies: activations are slow where values and gradients lie differently.
        return found.contiguous(memory_format=ctx.layout), None, None, None


def _average_pool(
    axes: int, pool: Callable[..., Tensor], transpose: Callable[..., Tensor]
) -> Callable[..., Any]:
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
        steps = kernel if stride is None or stride == [] else each_axis(stride, axes)
        edges = each_axis(padding, axes)
        options = (kernel, steps, edges, ceil_mode, count_include_pad, divisor_override)
        return _Shaped.apply(input, pool, transpose, options)  # type: ignore[no-untyped-call]

    return average_pool


def _adaptive_average_pool(
    axes: int, pool: Callable[..., Tensor], transpose: Callable[..., Tensor]
) -> Callable[..., Any]:
    def adaptive_average_pool(input: Tensor, output_size: Any) -> Any:
        if not _served(input, axes):
            return NotImplemented
        sizes = zip(each_axis(output_size, axes), input.shape[2:], strict=True)
        wanted = [own if size is None else size for size, own in sizes]
        return _Shaped.apply(input, pool, lambda g, x, _: transpose(g, x), (wanted,))  # type: ignore[no-untyped-call]

    return adaptive_average_pool


def _avg_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:
    if not _served(input, 1):
        return NotImplemented
    # PyTorch, too, pools a series as an image of one line.
    kernel, edges = each_axis(kernel_size, 1), each_axis(padding, 1)
    sizes = ([1, *kernel], [1, *each_axis(stride or kernel, 1)], [0, *edges])
    return LEAN[_nn.avg_pool2d](input.unsqueeze(2), *sizes, ceil_mode, count_include_pad).squeeze(2)


def _adaptive_avg_pool1d(input: Tensor, output_size: Sizes) -> Any:
    if not _served(input, 1):
        return NotImplemented
    size = [1, *each_axis(output_size, 1)]
    return LEAN[_nn.adaptive_avg_pool2d](input.unsqueeze(2), size).squeeze(2)


def _served(x: Tensor, axes: int) -> bool:
    return x.dim() == axes + 2 and x.dtype in DTYPES


_aten, _nn = torch.ops.aten, torch._C._nn

LEAN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.max_pool1d: _max_pool(1),
    torch.max_pool2d: _max_pool(2),
    torch.max_pool3d: _max_pool(3),
    torch.adaptive_max_pool1d: _adaptive_max_pool(1, torch.adaptive_max_pool1d),
    _nn.adaptive_max_pool2d: _adaptive_max_pool(2, _nn.adaptive_max_pool2d),
    _nn.adaptive_max_pool3d: _adaptive_max_pool(3, _nn.adaptive_max_pool3d),
    torch.avg_pool1d: _avg_pool1d,
    _nn.avg_pool2d: _average_pool(2, _nn.avg_pool2d, _aten.avg_pool2d_backward),
    _nn.avg_pool3d: _average_pool(3, _nn.avg_pool3d, _aten.avg_pool3d_backward),
    torch.adaptive_avg_pool1d: _adaptive_avg_pool1d,
    _nn.adaptive_avg_pool2d: _adaptive_average_pool(
        2, _nn.adaptive_avg_pool2d, _aten._adaptive_avg_pool2d_backward
    ),
    _nn.adaptive_avg_pool3d: _adaptive_average_pool(
        3, _nn.adaptive_avg_pool3d, _aten._adaptive_avg_pool3d_backward
    ),
}
