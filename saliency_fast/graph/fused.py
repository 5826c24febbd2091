"""Operators that passes put in the place of several calls of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.autograd.activations import ramp
from saliency_fast.graph.autograd.norms import affine_of
from saliency_fast.graph.intercept import lean_call

Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
"""(weight, bias, mean, variance, eps) of a batch normalisation with frozen statistics."""


def folded_weights(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution and the batch normalisation behind it in one."""
    scale, shift = affine_of(*norm)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Callable[..., Any],
    options: tuple[Any, ...],
    norm: Norm,
) -> Any:
    """A convolution and the batch normalisation `norm` behind it, as one convolution."""
    return lean_call(convolution, (x, *folded_weights(weight, bias, norm), *options), {})


def partial_convolution(
    x: Tensor,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    convolution: Callable[..., Any],
    options: tuple[Any, ...],
    start: int,
) -> Any:
    """Adds to `total` the convolution of the channels from `start` onwards, which are `x`."""
    part = weight.narrow(1, start, x.shape[1])
    found = lean_call(convolution, (x, part, bias, *options), {})
    return found if total is None else total.add_(found)


def rectified(
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    slope: float,
    upper: float,
    inplace: bool,
) -> Tensor:
    """The rectifier of norm(x) + residual; `inplace` writes into x."""
    if residual is not None and residual.dtype != x.dtype:
        # As an addition would: where half types meet float32, float32 remains.
        common = torch.promote_types(residual.dtype, x.dtype)
        inplace = inplace and common == x.dtype
        x, residual = x.to(common), residual.to(common)
    affine = (None, None) if norm is None else affine_of(*norm)
    scale, shift = [None if one is None else one.to(x.dtype) for one in affine]
    found = ramp(x, scale, shift, residual, slope=slope, upper=upper, inplace=inplace)
    if found is NotImplemented:
        raise TypeError(f"no fused rectifier for {x.dtype}")
    assert isinstance(found, Tensor)
    return found
