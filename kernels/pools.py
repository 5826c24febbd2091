"""Pools: max pooling with each maximum's place in its window, and gradients gathered back by it.
Memory is [outer, d, h, w, inner]: channels are outer where it is contiguous, inner where last.
"""

import math

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on

NARROW = 2**31 - 2**16
"""Elements below which 32-bit numbers tell them apart, tiles that overhang included."""
PLACES = 256
"""The most places of a window that a byte can number."""


@triton.jit
def place_in(at, inner, size_d, size_h, size_w):
    """(outer, d, h, w, inner) of the elements `at` of a tensor."""
    pixel = at // inner
    row = pixel // size_w
    picture = row // size_h
    return picture // size_d, picture % size_d, row % size_h, pixel % size_w, at % inner


@triton.jit
def _maxpool(x, values, index, count, inner, in_d, in_h, in_w, out_d, out_h, out_w,
             KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
             DILATION: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads x once (overlapping windows from the caches), writes a number and a byte per output.
    # Layout: x [outer, in_*, inner], values and index [outer, out_*, inner], all dense.
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    at = at * BLOCK + tl.arange(0, BLOCK)
    outer, od, oh, ow, channel = place_in(at, inner, out_d, out_h, out_w)
    id = od * STRIDE[0] - PADDING[0]
    ih = oh * STRIDE[1] - PADDING[1]
    iw = ow * STRIDE[2] - PADDING[2]
    half: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    best = tl.full((BLOCK,), -float("inf"), tl.float32 if half else x.dtype.element_ty)
    place = tl.full((BLOCK,), -1, tl.int32)
    for k in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        d = id + k // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        h = ih + k // KERNEL[2] % KERNEL[1] * DILATION[1]
        w = iw + k % KERNEL[2] * DILATION[2]
        inside = (at < count) & (d >= 0) & (h >= 0) & (w >= 0)
        inside &= (d < in_d) & (h < in_h) & (w < in_w)
        here = (((outer * in_d + d) * in_h + h) * in_w + w) * inner + channel
        value = tl.load(x + here, mask=inside, other=-float("inf")).to(best.dtype)
        # The first of equal numbers stays and the last NaN, as in PyTorch.
        taken = inside & ((value > best) | (value != value) | (place < 0))
        best = tl.where(taken, value, best)
        place = tl.where(taken, k, place)
    tl.store(values + at, best.to(values.dtype.element_ty), mask=at < count)
    tl.store(index + at, tl.maximum(place, 0).to(tl.uint8), mask=at < count)


@triton.jit
def first_window(at, REACH: tl.constexpr, STRIDE: tl.constexpr):
    """The first window that reaches elements `at`, counted from the start of the padding."""
    return tl.maximum(at - REACH + STRIDE, 0) // STRIDE


@triton.jit
def _maxpool_backward(grad, index, out, count, inner, in_d, in_h, in_w, out_d, out_h, out_w,
                      KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
                      DILATION: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    # Reads the index once (from the caches for further elements) and gradients where they belong,
    # writes each element of the result once; windows are added in row-major order.
    # Layout: grad and index [outer, out_*, inner], out [outer, in_*, inner], all dense.
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    at = at * BLOCK + tl.arange(0, BLOCK)
    outer, d, h, w, channel = place_in(at, inner, in_d, in_h, in_w)
    d, h, w = d + PADDING[0], h + PADDING[1], w + PADDING[2]
    reach_d: tl.constexpr = DILATION[0] * (KERNEL[0] - 1) + 1
    reach_h: tl.constexpr = DILATION[1] * (KERNEL[1] - 1) + 1
    reach_w: tl.constexpr = DILATION[2] * (KERNEL[2] - 1) + 1
    # As many windows as may reach one element.
    many_d: tl.constexpr = (reach_d - 1) // STRIDE[0] + 1
    many_h: tl.constexpr = (reach_h - 1) // STRIDE[1] + 1
    many_w: tl.constexpr = (reach_w - 1) // STRIDE[2] + 1
    first_d = first_window(d, reach_d, STRIDE[0])
    first_h = first_window(h, reach_h, STRIDE[1])
    first_w = first_window(w, reach_w, STRIDE[2])
    half: tl.constexpr = out.dtype.element_ty.primitive_bitwidth == 16
    total = tl.zeros((BLOCK,), tl.float32 if half else out.dtype.element_ty)
    for window in range(many_d * many_h * many_w):
        od = first_d + window // (many_h * many_w)
        oh = first_h + window // many_w % many_h
        ow = first_w + window % many_w
        # Within a window 32 bits suffice, whatever numbers its place takes.
        kd = (d - od * STRIDE[0]).to(tl.int32)
        kh = (h - oh * STRIDE[1]).to(tl.int32)
        kw = (w - ow * STRIDE[2]).to(tl.int32)
        inside = (at < count) & (od < out_d) & (oh < out_h) & (ow < out_w)
        inside &= (kd >= 0) & (kh >= 0) & (kw >= 0)
        inside &= (kd % DILATION[0] == 0) & (kh % DILATION[1] == 0) & (kw % DILATION[2] == 0)
        place = (kd // DILATION[0] * KERNEL[1] + kh // DILATION[1]) * KERNEL[2] + kw // DILATION[2]
        here = (((outer * out_d + od) * out_h + oh) * out_w + ow) * inner + channel
        named = tl.load(index + here, mask=inside, other=0)
        mine = inside & (named.to(tl.int32) == place)
        total += tl.load(grad + here, mask=mine, other=0.0).to(total.dtype)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


def maxpool_index(x, kernel, stride, padding, dilation, ceil_mode):
    """The op `maxpool_index`: (values, index uint8)."""
    _check(kernel, stride, padding, dilation)
    sizes = [
        _windows(*axis, ceil_mode)
        for axis in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(f"no window of {list(kernel)} fits into {list(x.shape[2:])}")
    form, shape = _layout(x), (*x.shape[:2], *sizes)
    x = x.contiguous(memory_format=form)
    values = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    index = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=form)
    chosen = configuration("pools.maxpool", x)
    with on(x):
        _maxpool[triton.cdiv(values.numel(), chosen.elements),](
            x, values, index, values.numel(), *_sizes(x, values, form),
            *_window(kernel, stride, padding, dilation), WIDE=_wide(x, values),
            BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return values, index


def maxpool_index_backward(grad, index, size, kernel, stride, padding, dilation):
    """The op `maxpool_index_backward`: [N, C, *size]."""
    _check(kernel, stride, padding, dilation)
    form = _layout(index)
    grad = grad.contiguous(memory_format=form)
    index = index.contiguous(memory_format=form)
    out = torch.empty(
        (*grad.shape[:2], *size), dtype=grad.dtype, device=grad.device, memory_format=form
    )
    chosen = configuration("pools.maxpool_backward", grad)
    with on(grad):
        _maxpool_backward[triton.cdiv(out.numel(), chosen.elements),](
            grad, index, out, out.numel(), *_sizes(out, grad, form),
            *_window(kernel, stride, padding, dilation), WIDE=_wide(out, grad),
            BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return out


def _check(kernel, stride, padding, dilation):
    if math.prod(kernel) > PLACES:
        raise ValueError(f"a window may have {PLACES} elements: got {list(kernel)}")
    if min(*kernel, *stride, *dilation, 1) < 1 or min(padding) < 0:
        raise ValueError("kernel, stride and dilation must be positive, padding not negative")


def _windows(n, k, s, p, d, ceil_mode):
    spare = n + 2 * p - d * (k - 1) - 1
    count = (spare + (s - 1 if ceil_mode else 0)) // s + 1
    return count - 1 if ceil_mode and (count - 1) * s >= n + p else count


def _layout(x):
    """Channels last where x is, else contiguous; the op's reference has the same rule."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.stride(-1) == x.shape[1] > 1 and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def _three(numbers, fill):
    return (*(fill,) * (3 - len(numbers)), *numbers)


def _sizes(large, small, form):
    """(inner, the input's three sizes, the output's)."""
    inner = 1 if form == torch.contiguous_format else large.shape[1]
    return inner, *_three(large.shape[2:], 1), *_three(small.shape[2:], 1)


def _window(kernel, stride, padding, dilation):
    return _three(kernel, 1), _three(stride, 1), _three(padding, 0), _three(dilation, 1)


def _wide(large, small):
    return max(large.numel(), small.numel()) > NARROW
