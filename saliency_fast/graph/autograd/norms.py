"""Normalisations: with frozen statistics a scale that keeps nothing; RMS its input alone; of groups
and instances in the memory format that they get; of layers together with the sum before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast import _torch_compat as compat
from saliency_fast import ops
from saliency_fast.graph.autograd.convolutions import dense_format, on_cpu
from saliency_fast.graph.gradients import differentiable
from saliency_fast.graph.opinfo import lean

_native_group_norm: Any = torch.native_group_norm
_group_norm_backward = compat.backward_operator("native_group_norm")
NARROW = 8
"""Channels of a group below which PyTorch's own takes four to ten times as long with channels
innermost."""


def affine_of(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale [C], shift [C]) of a batch normalisation with frozen statistics."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


@lean(torch.batch_norm)
def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    if training or running_mean is None or running_var is None or _moving(weight, bias):
        return NotImplemented
    norm = (weight, bias, running_mean, running_var)

    def run(x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        scale, _ = affine_of(weight, None, *norm[2:], eps)
        return torch.batch_norm(x, *norm, False, 0.0, eps, False), (scale,)

    def back(grad: Tensor, scale: Tensor) -> Tensor:
        return grad * scale.to(grad.dtype).view(-1, *(1,) * (grad.dim() - 2))

    return differentiable(input, run, back)


@lean(torch.rms_norm)
def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""
    # Half types are normalised in float32 by rules of PyTorch's own.
    if _moving(weight) or input.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps

    def run(x: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        scale = torch.rsqrt(x.square().mean(axes, keepdim=True) + least)
        y = x * scale
        return y if weight is None else y.mul_(weight), (x, scale, weight)

    def back(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        grad = grad if weight is None else grad * weight
        along = (grad * x).mean(axes, keepdim=True) * scale.pow(3)
        return torch.addcmul(grad * scale, x, along, value=-1)

    return differentiable(input, run, back)


@lean(torch.instance_norm)
def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Instance normalisation (Ulyanov et al., 2016) as that of groups of one channel, which
    PyTorch computes in much less time.
    """
    moved = not use_input_stats or running_mean is not None or running_var is not None
    if moved or not _grouped(input, weight, bias):
        return NotImplemented
    if dense_format(input) is not torch.contiguous_format:
        return _channels_last(input, input.shape[1], weight, bias, eps)
    sizes = (*input.shape[:2], input[0, 0].numel(), input.shape[1])

    def run(x: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        x = x.contiguous()
        y, mean, scale = _native_group_norm(x, weight, bias, *sizes, eps)
        return y, (x, mean, scale, weight)

    def back(grad: Tensor, *kept: Tensor | None) -> Tensor:
        found: Tensor = _group_norm_backward(
            grad.contiguous(), *kept, *sizes, [True, False, False]
        )[0]
        return found

    return differentiable(input, run, back)


@lean(torch.group_norm)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Group normalisation (Wu and He, 2018), where PyTorch's own is slow."""
    if not _grouped(input, weight, bias) or input.shape[1] % num_groups:
        return NotImplemented
    plain = dense_format(input) is torch.contiguous_format
    if plain or input.shape[1] // num_groups >= NARROW:
        return NotImplemented
    return _channels_last(input, num_groups, weight, bias, eps)


def _grouped(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether there are several numbers of each channel in float32 on a CPU, and fixed weights."""
    return x.dim() > 2 and x[0, :1].numel() > 1 and on_cpu(x) and not _moving(*parameters)


def _channels_last(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """Each example's groups of channels, less their mean, over their standard deviation, with
    channels innermost: sums over places first, then over a group's channels.
    """
    rows, channels = x.shape[:2]

    def flat(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(rows, -1, channels)

    def means(x: Tensor) -> Tensor:
        """Of each group, for each of its channels [rows, 1, channels]."""
        found = x.mean(1).view(rows, groups, -1).mean(-1, keepdim=True)
        return found.expand(-1, -1, channels // groups).reshape(rows, 1, channels)

    def run(x: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        # No view, which models may not write to, but what views write to.
        result = torch.empty_like(x)
        y, mean = flat(result), means(flat(x))
        torch.sub(flat(x), mean, out=y)
        scale = torch.rsqrt(means(y.square()) + eps)
        y.mul_(scale if weight is None else scale * weight)
        if bias is not None:
            y.add_(bias)
        return result, (x, mean, scale, weight)

    def back(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        flat_grad, centred = flat(grad), flat(x) - mean
        through = flat_grad if weight is None else flat_grad * weight
        along = means(through * centred) * scale.pow(3)
        found = torch.addcmul(-means(through) * scale, through, scale)
        found.addcmul_(centred, along, value=-1)
        return found.view(rows, *x.shape[2:], channels).movedim(-1, 1)

    return differentiable(x, run, back)


class _AddLayerNorm(torch.autograd.Function):
    """ops.add_layer_norm: a sum and its layer normalisation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, *about: Any) -> tuple[Tensor, Tensor]:
        total, y, *kept = ops.add_layer_norm(x, added, *about)
        ctx.save_for_backward(total, *kept, about[0])
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, added.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, passed: Tensor | None, grad: Tensor | None) -> Any:
        total, *kept = ctx.saved_tensors
        narrow = next((one for one in ctx.dtypes if one != total.dtype), total.dtype)
        if grad is not None:
            first, second = ops.add_layer_norm_backward(grad, passed, total, *kept, narrow)
        else:
            first = second = passed
        found = [first if one == total.dtype else second for one in ctx.dtypes]
        return *found, None, None, None, None


def add_layer_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> Any:
    """(sum, its layer normalisation over the last axis), the latter in `dtype` where given."""
    dtype = dtype or torch.promote_types(x.dtype, added.dtype)
    return _AddLayerNorm.apply(x, added, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]


def _moving(*parameters: Tensor | None) -> bool:
    """Whether one of a layer's parameters depends on the points."""
    return any(one is not None and one.requires_grad for one in parameters)
