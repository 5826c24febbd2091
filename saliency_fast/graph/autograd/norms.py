"""Normalisations: with frozen statistics a scale that keeps nothing; RMS its input alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def affine_of(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale [C], shift [C]) of a batch normalisation with frozen statistics."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        scale, _ = affine_of(weight, None, mean, variance, eps)
        ctx.save_for_backward(scale)
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        wide = scale.to(grad.dtype).view(-1, *(1,) * (grad.dim() - 2))
        return grad * wide, *(None,) * 5


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
    if training or running_mean is None or running_var is None or moving(weight, bias):
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axes: tuple[int, ...], weight: Tensor | None, eps: float
    ) -> Tensor:
        scale = torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.axes = axes
        y = x * scale
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        grad = grad if weight is None else grad * weight
        along = (grad * x).mean(ctx.axes, keepdim=True) * scale.pow(3)
        return torch.addcmul(grad * scale, x, along, value=-1), None, None, None


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    # Half types are normalised in float32 by rules of PyTorch's own.
    if moving(weight) or input.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _RMSNorm.apply(input, axes, weight, eps)  # type: ignore[no-untyped-call]


def moving(*parameters: Tensor | None) -> bool:
    """Whether one of a layer's parameters depends on the points."""
    return any(one is not None and one.requires_grad for one in parameters)


LEAN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.batch_norm: _batch_norm,
    torch.rms_norm: _rms_norm,
}
