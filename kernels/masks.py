"""Masks: rectifiers and their gradients, with one bit per element between them.

Programs take flat tiles in memory order, [groups, 8]: eight elements side by side make one byte.
"""

import math

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on

NARROW = 2**31 - 2**16
"""Elements below which 32-bit numbers tell them apart, tiles that overhang included."""
RULES = ("standard", "guided", "deconv")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@triton.jit
def elements(GROUPS: tl.constexpr, WIDE: tl.constexpr):
    """Numbers of a program's groups [GROUPS], and of its elements [GROUPS, 8]."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    group = program * GROUPS + tl.arange(0, GROUPS)
    return group, group[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def packed(flags, group, numel):
    """Bool [GROUPS, 8] to bytes [GROUPS], little end first; bits past the last element are 0."""
    byte = tl.sum(flags.to(tl.int32) << tl.arange(0, 8)[None, :], 1)
    padding = tl.minimum(tl.maximum((group + 1) * 8 - numel, 0), 8).to(tl.int32)
    return (byte & (255 >> padding)).to(tl.uint8)


@triton.jit
def quotient(number, magic, shift):
    """Quotients of numbers below 2**31, by the product that `_magic` made of the divisor."""
    number = number.to(tl.uint32)
    high = tl.umulhi(number, number * 0 + tl.cast(magic, tl.uint32))
    return (high + number) >> tl.cast(shift, tl.uint32)


@triton.jit
def parameter(source, group, at, numel, inner, inner_magic, inner_shift, channels, channels_magic,
              channels_shift, AFFINE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The numbers of a parameter of channels [C] for the elements `at`, in the arithmetic's type.

    AFFINE "one": a group has one channel; "row": eight in a row, `channels` counts these rows;
    "any": each element has its own.
    """
    unit = at if AFFINE == "any" else group * 8 if AFFINE == "one" else group
    if WIDE:
        size: tl.constexpr = group.shape[0] if AFFINE == "row" else group.shape[0] * 8
        before = tl.program_id(0).to(tl.int64) * size // inner
        here = unit - before * inner
        # Of planes longer than a tile it ends one at most; in shorter ones 32 bits suffice.
        ended = tl.where(inner > size, (here >= inner).to(tl.uint32),
                         quotient(here, inner_magic, inner_shift))  # fmt: skip
        plane = (before % channels).to(tl.uint32) + ended
    else:
        plane = quotient(unit, inner_magic, inner_shift)
    channel = plane - quotient(plane, channels_magic, channels_shift) * channels
    channel = channel.to(tl.int32)
    if AFFINE == "one":
        first = tl.load(source + channel, mask=group * 8 < numel)
        found = tl.broadcast_to(first[:, None], at.shape)
    elif AFFINE == "row":
        found = tl.load(source + channel[:, None] * 8 + tl.arange(0, 8)[None, :], mask=at < numel)
    else:
        found = tl.load(source + channel, mask=at < numel)
    return found if found.dtype == tl.float64 else found.to(tl.float32)


@triton.jit(do_not_specialize=("inner", "inner_magic", "inner_shift", "channels",
                               "channels_magic", "channels_shift"))  # fmt: skip
def _forward(x, scale, shift, residual, y, mask, numel, inner, inner_magic, inner_shift, channels,
             channels_magic, channels_shift, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr,
             SLOPE: tl.constexpr, UPPER: tl.constexpr, WIDE: tl.constexpr,
             GROUPS: tl.constexpr):  # fmt: skip
    # Reads x and the residual once, writes y (which may be x) and a bit per element.
    # Layout: x, residual, y flat in one memory order; mask [ceil(numel / 8)].
    group, at = elements(GROUPS, WIDE)
    inside = at < numel
    z = tl.load(x + at, mask=inside)
    if z.dtype != tl.float64:
        z = z.to(tl.float32)
    if AFFINE != "none":
        factor = parameter(scale, group, at, numel, inner, inner_magic, inner_shift, channels,
                           channels_magic, channels_shift, AFFINE, WIDE)  # fmt: skip
        offset = parameter(shift, group, at, numel, inner, inner_magic, inner_shift, channels,
                           channels_magic, channels_shift, AFFINE, WIDE)  # fmt: skip
        z = factor * z + offset
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside).to(z.dtype)
    low = z <= 0.0  # false for NaN, which passes through
    within = low == 0
    value = tl.where(low, 0.0 if SLOPE == 0.0 else z * SLOPE, z)
    if UPPER is not None:
        high = z >= UPPER
        within &= high == 0
        value = tl.where(high, UPPER, value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(mask + group, packed(within, group, numel), mask=group * 8 < numel)


@triton.jit(do_not_specialize=("inner", "inner_magic", "inner_shift", "channels",
                               "channels_magic", "channels_shift"))  # fmt: skip
def _backward(grad, mask, scale, scaled, plain, numel, inner, inner_magic, inner_shift, channels,
              channels_magic, channels_shift, AFFINE: tl.constexpr, RULE: tl.constexpr,
              SLOPE: tl.constexpr, BOTH: tl.constexpr, WIDE: tl.constexpr,
              GROUPS: tl.constexpr):  # fmt: skip
    # Reads grad once and a bit per element, writes one gradient, or two where BOTH.
    # Layout: grad, scaled, plain flat in the memory order of the mask's bits.
    group, at = elements(GROUPS, WIDE)
    inside = at < numel
    g = tl.load(grad + at, mask=inside)
    if g.dtype != tl.float64:
        g = g.to(tl.float32)
    kept = inside
    if RULE != "deconv":
        byte = tl.load(mask + group, mask=group * 8 < numel, other=0).to(tl.int32)
        kept = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    if RULE != "standard":
        kept &= (g <= 0.0) == 0  # NaN stays, as in max(grad, 0)
    m = tl.where(kept, g, 0.0 if SLOPE == 0.0 else g * SLOPE)
    if BOTH:
        tl.store(plain + at, m.to(plain.dtype.element_ty), mask=inside)
    if AFFINE != "none":
        factor = parameter(scale, group, at, numel, inner, inner_magic, inner_shift, channels,
                           channels_magic, channels_shift, AFFINE, WIDE)  # fmt: skip
        m = factor * m
    tl.store(scaled + at, m.to(scaled.dtype.element_ty), mask=inside)


@triton.jit
def _pack(flags, mask, numel, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    # Reads each element once, writes a bit.
    # Layout: flags [numel], bytes or numbers; mask [ceil(numel / 8)].
    group, at = elements(GROUPS, WIDE)
    found = tl.load(flags + at, mask=at < numel, other=0)
    tl.store(mask + group, packed(found != 0, group, numel), mask=group * 8 < numel)


def relu_mask(x, scale, shift, residual, slope, upper):
    """The op `relu_mask`: (y like x, mask)."""
    x = x.contiguous() if _layout(x) is None else x
    y = torch.empty_like(x)
    return y, _rectify(x, scale, shift, residual, slope, upper, y)


def relu_mask_(x, scale, shift, residual, slope, upper):
    """The op `relu_mask_`: the mask; y is written over x."""
    if _layout(x) is None:
        raise ValueError(
            "x is changed in place and must be contiguous or channels_last: got strides "
            f"{x.stride()} for shape {tuple(x.shape)}; call relu_mask"
        )
    return _rectify(x, scale, shift, residual, slope, upper, x)


def relu_mask_backward(grad, mask, scale, slope, rule, both, channels_last):
    """The op `relu_mask_backward`: (scale m, m or empty [0]) in the layout of the mask's bits."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}: got {rule!r}")
    layout = _CHANNELS_LAST[grad.dim()] if channels_last else torch.contiguous_format
    grad, both = grad.contiguous(memory_format=layout), both and scale is not None
    scaled = torch.empty_like(grad, memory_format=layout)
    plain = torch.empty_like(scaled) if both else grad.new_empty(0)
    if grad.numel() > 0:
        affine, places = _places(grad, layout, scale)
        chosen = configuration("masks.backward", grad)
        with on(grad):
            _backward[triton.cdiv(grad.numel(), chosen.elements),](
                grad, mask.contiguous(), grad if scale is None else scale.contiguous(), scaled,
                plain if both else scaled, grad.numel(), *places, AFFINE=affine, RULE=rule,
                SLOPE=slope if rule == "standard" else 0.0, BOTH=both,
                WIDE=grad.numel() > NARROW, GROUPS=chosen.elements // 8, num_warps=chosen.warps,
                enable_fp_fusion=False,
            )  # fmt: skip
    return scaled, plain


def pack_mask(flags):
    """The op `pack_mask`: the mask of bool flags, or of numbers that are not 0."""
    flags = flags.contiguous() if _layout(flags) is None else flags
    mask, numel = _empty_mask(flags), flags.numel()
    if numel > 0:
        chosen = configuration("masks.pack", flags)
        with on(flags):
            _pack[triton.cdiv(numel, chosen.elements),](
                flags.view(torch.uint8) if flags.dtype == torch.bool else flags, mask, numel,
                WIDE=numel > NARROW,
                GROUPS=chosen.elements // 8, num_warps=chosen.warps,
            )  # fmt: skip
    return mask


def _rectify(x, scale, shift, residual, slope, upper, y):
    if slope != 0 and math.isfinite(upper):
        raise ValueError(f"slope must be 0 where upper is finite: got slope {slope}, upper {upper}")
    mask, numel, layout = _empty_mask(x), x.numel(), _layout(x)
    if numel == 0:
        return mask
    affine, places = _places(x, layout, scale)
    scale, shift = (x if t is None else t.contiguous() for t in (scale, shift))
    added = x if residual is None else residual.contiguous(memory_format=layout)
    chosen = configuration("masks.forward", x)
    with on(x):
        # Without fused multiply-adds the bits equal the reference's.
        _forward[triton.cdiv(numel, chosen.elements),](
            x, scale, shift, added, y, mask, numel, *places, AFFINE=affine,
            RESIDUAL=residual is not None, SLOPE=slope,
            UPPER=upper if math.isfinite(upper) else None, WIDE=numel > NARROW,
            GROUPS=chosen.elements // 8, num_warps=chosen.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return mask


def _layout(x):
    """The memory format in which x is dense, contiguous or channels_last; None for others."""
    for layout in (torch.contiguous_format, _CHANNELS_LAST.get(x.dim())):
        if layout is not None and x.is_contiguous(memory_format=layout):
            return layout
    return None


def _empty_mask(x):
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def _places(x, layout, scale):
    """How elements find their channel: AFFINE of `parameter`, and its numbers."""
    if scale is None:
        return "none", (1, 0, 0, 1, 0, 0)
    channels = x.shape[1]
    inner = x.shape[2:].numel() if layout is torch.contiguous_format else 1
    affine = "one" if inner % 8 == 0 else "any"
    if inner == 1 and channels % 8 == 0:
        affine, channels = "row", channels // 8
    return affine, (inner, *_magic(min(inner, 2**31 - 1)), channels, *_magic(channels))


def _magic(divisor):
    """(magic, shift) of `quotient`: n // divisor = (n * (2**32 + magic)) >> (32 + shift) below
    2**31 (Granlund and Montgomery, 1994); the magic number as a signed one.
    """
    shift = (divisor - 1).bit_length()
    magic = (2**32 * (2**shift - divisor)) // divisor + 1
    return (magic - 2**32 if magic >= 2**31 else magic), shift
