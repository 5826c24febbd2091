"""Layer normalisation of a sum, and its input gradient, in one pass each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define

LARGEST = 8192
"""Numbers of a row that the kernels keep in registers."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def _check(x: Tensor, other: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() < 2 or x.shape != other.shape or not 1 <= x.shape[-1] <= LARGEST:
        raise ValueError(
            f"both tensors must have one shape [*, N] with N up to {LARGEST}: "
            f"got {list(x.shape)} and {list(other.shape)}"
        )
    for one in (weight, bias):
        if one is not None and one.shape != x.shape[-1:]:
            raise ValueError(f"parameters must be [{x.shape[-1]}]: got {list(one.shape)}")


def _add_layer_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, added, weight, bias)
    total = (x + added).contiguous()
    z = _wide(total)
    mean = z.mean(-1, keepdim=True)
    scale = torch.rsqrt((z - mean).square().mean(-1, keepdim=True) + eps)
    y = (z - mean) * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return total, y.to(dtype), mean.flatten(), scale.flatten()


def _fake(
    x: Tensor,
    added: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, added.dtype))
    wide = torch.float32 if total.dtype.itemsize == 2 else total.dtype
    mean = x.new_empty(x.shape[:-1].numel(), dtype=wide)
    return total, x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


def _backward(
    grad: Tensor,
    passed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check(total, grad, weight, None)
    each = (*total.shape[:-1], 1)
    scale, g = scale.view(each), _wide(grad).to(mean.dtype)
    g = g if weight is None else g * weight
    normal = (_wide(total) - mean.view(each)) * scale
    along = (g * normal).mean(-1, keepdim=True)
    found = (g - g.mean(-1, keepdim=True) - normal * along) * scale
    found = found if passed is None else found + passed
    second = grad.new_empty(0, dtype=dtype) if dtype == total.dtype else found.to(dtype)
    return found.to(total.dtype).contiguous(), second.contiguous()


def _fake_backward(
    grad: Tensor,
    passed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    second = (0,) if dtype == total.dtype else total.shape
    return total.new_empty(total.shape), total.new_empty(second, dtype=dtype)


_SHAPES = ((1, 1), (3, 7), (2, 5, 33), (2, 3, 768), (4, 1025))


def _samples() -> Iterator[Sample]:
    types = (*((one, one, one) for one in DTYPES), (torch.float32, torch.float16, torch.float16),
             (torch.bfloat16, torch.float32, torch.bfloat16))  # fmt: skip
    for number, (shape, (a, b, y)) in enumerate(product(_SHAPES, types)):
        wide = torch.float64 if torch.float64 in (a, b) else torch.float32
        weight, bias = torch.randn(2, shape[-1], dtype=wide)
        given = ((weight, bias), (weight, None), (None, None))[number % 3]
        x, added = torch.randn(shape).to(a), torch.randn(shape).to(b)
        yield Sample((x, added, *given, (1e-5, 1e-6)[number % 2], y))
    x = torch.randn(2, 3, 40, 6).mT
    yield Sample((x, torch.randn(2, 3, 6, 40), None, torch.randn(40), 1e-5, torch.float32))


def _backward_samples() -> Iterator[Sample]:
    for number, sample in enumerate(_samples()):
        x, added, weight, bias, eps, dtype = sample.args
        total, y, mean, scale = _add_layer_norm(x, added, weight, bias, eps, dtype)
        passed = torch.randn_like(total) if number % 2 else None
        yield Sample((torch.randn_like(y), passed, total, mean, scale, weight, added.dtype))


add_layer_norm = define(
    schema="add_layer_norm(Tensor x, Tensor added, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_add_layer_norm,
    fake=_fake,
    samples=_samples,
    triton="norms",
)
"""add_layer_norm(x [*, N], added like x, weight [N] | None, bias [N] | None, eps, dtype) -> (sum,
y, mean [R], scale [R]): the sum of both in the wider of their types, and y, its layer normalisation
over the last axis in `dtype` (Ba et al., 2016). scale is 1 over the deviation; rows are R in all;
mean and scale are float32 for half types."""

add_layer_norm_backward = define(
    schema="add_layer_norm_backward(Tensor grad, Tensor? passed, Tensor sum, Tensor mean,"
    " Tensor scale, Tensor? weight, ScalarType dtype) -> (Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    samples=_backward_samples,
    triton="norms",
)
"""add_layer_norm_backward(grad [*, N] of y, passed [*, N] of the sum | None, sum, mean, scale,
weight, dtype) -> (gradient of the sum, in its type, and the same in `dtype`; empty [0] where that
is its type)."""
