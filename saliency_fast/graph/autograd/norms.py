"""Normalisations: with frozen statistics a scale that keeps nothing; RMS its input alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.gradients import differentiable
from saliency_fast.graph.opinfo import lean


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


def _moving(*parameters: Tensor | None) -> bool:
    """Whether one of a layer's parameters depends on the points."""
    return any(one is not None and one.requires_grad for one in parameters)
