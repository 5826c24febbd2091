"""Norms: layer normalisation of a sum and its input gradient; a program owns a row."""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on


@triton.jit
def _forward(x, added, weight, bias, total, y, mean, scale, numel, EPS: tl.constexpr,
             WEIGHTED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads x and added once, writes their sum and y, and two numbers a row.
    # Layout: x, added, total, y [rows, numel] contiguous.
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < numel
    here = row * numel + at
    wide = mean.dtype.element_ty
    z = tl.load(x + here, mask=inside, other=0.0).to(wide)
    z += tl.load(added + here, mask=inside, other=0.0).to(wide)
    rounded = z.to(total.dtype.element_ty)
    tl.store(total + here, rounded, mask=inside)
    z = rounded.to(wide)
    middle = tl.sum(z, 0) / numel
    z = tl.where(inside, z - middle, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(z * z, 0) / numel + EPS)
    z *= factor
    if WEIGHTED:
        z *= tl.load(weight + at, mask=inside, other=0.0).to(wide)
    if BIASED:
        z += tl.load(bias + at, mask=inside, other=0.0).to(wide)
    tl.store(y + here, z.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle)
    tl.store(scale + row, factor)


@triton.jit
def _backward(grad, passed, total, mean, scale, weight, first, second, numel,
              WEIGHTED: tl.constexpr, PASSED: tl.constexpr, BOTH: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    # Reads both gradients and the sum once, writes one gradient, or two where BOTH.
    # Layout: grad, passed, total, first, second [rows, numel] contiguous.
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < numel
    here = row * numel + at
    wide = mean.dtype.element_ty
    g = tl.load(grad + here, mask=inside, other=0.0).to(wide)
    if WEIGHTED:
        g *= tl.load(weight + at, mask=inside, other=0.0).to(wide)
    factor = tl.load(scale + row)
    z = (tl.load(total + here, mask=inside, other=0.0).to(wide) - tl.load(mean + row)) * factor
    along = tl.sum(tl.where(inside, g * z, 0.0), 0) / numel
    g = (g - tl.sum(g, 0) / numel - z * along) * factor
    if PASSED:
        g += tl.load(passed + here, mask=inside, other=0.0).to(wide)
    tl.store(first + here, g.to(first.dtype.element_ty), mask=inside)
    if BOTH:
        tl.store(second + here, g.to(second.dtype.element_ty), mask=inside)


def add_layer_norm(x, added, weight, bias, eps, dtype):
    """The op `add_layer_norm`: (sum, y, mean, scale)."""
    x, added = x.contiguous(), added.contiguous()
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    y, numel = torch.empty_like(x, dtype=dtype), x.shape[-1]
    wide = torch.float32 if total.dtype.itemsize == 2 else total.dtype
    mean, scale = (torch.empty(x.numel() // numel, dtype=wide, device=x.device) for _ in range(2))
    chosen = configuration("norms.forward", total)
    if x.numel() > 0:
        with on(x):
            _forward[len(mean),](
                x, added, x if weight is None else weight.contiguous(),
                x if bias is None else bias.contiguous(), total, y, mean, scale, numel, EPS=eps,
                WEIGHTED=weight is not None, BIASED=bias is not None,
                BLOCK=triton.next_power_of_2(numel), num_warps=chosen.warps,
            )  # fmt: skip
    return total, y, mean, scale


def add_layer_norm_backward(grad, passed, total, mean, scale, weight, dtype):
    """The op `add_layer_norm_backward`: gradients of the sum and, in `dtype`, of a part."""
    grad, total = grad.contiguous(), total.contiguous()
    first, both = torch.empty_like(total), dtype != total.dtype
    second = torch.empty_like(total, dtype=dtype) if both else total.new_empty(0)
    chosen = configuration("norms.backward", total)
    if total.numel() > 0:
        with on(total):
            _backward[len(mean),](
                grad, total if passed is None else passed.contiguous(), total, mean, scale,
                total if weight is None else weight.contiguous(), first,
                second if both else first, total.shape[-1], WEIGHTED=weight is not None,
                PASSED=passed is not None, BOTH=both,
                BLOCK=triton.next_power_of_2(total.shape[-1]), num_warps=chosen.warps,
            )  # fmt: skip
    return first, second
