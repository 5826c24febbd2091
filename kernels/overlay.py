"""Overlay: the exact percentile of a map's magnitudes, and its colours over the image."""

import math

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on

# Triton counts a histogram with warp votes, whose work grows with the bins: 8 bits a pass.
BITS = 8


@triton.jit
def _count(values, prefix, counts, rows, numel, SHIFT: tl.constexpr, MAGNITUDE: tl.constexpr,
           BITS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads the map once a pass (from L2 after the first); adds 2**BITS counters a program.
    # Layout: values [rows, numel] contiguous, the bits of floats; counts [rows, 2**BITS].
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * (TILES * BLOCK) + tl.arange(0, BLOCK)
    known = tl.load(prefix + row)
    digit = tl.arange(0, 1 << BITS)
    found = tl.zeros((1 << BITS,), tl.int32)
    for _ in tl.static_range(TILES):
        inside = at < numel
        magnitude = tl.load(values + row * numel + at, mask=inside, other=0) & MAGNITUDE
        high = magnitude >> SHIFT
        inside &= (high >> BITS) == known
        found += tl.histogram((high & ((1 << BITS) - 1)).to(tl.int32), 1 << BITS, mask=inside)
        at += BLOCK
    place = counts + row * (1 << BITS) + digit
    tl.atomic_add(place, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit
def _narrow(prefix, left, counts, BITS: tl.constexpr):
    # Reads 2**BITS counters of a row and moves its prefix on by one digit.
    # Layout: prefix, left [rows]; counts [rows, 2**BITS]. One program a row.
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(counts + row * (1 << BITS) + tl.arange(0, 1 << BITS))
    below = tl.cumsum(found, 0) - found
    smaller = tl.load(left + row)
    reached = below <= smaller
    digit = tl.sum(reached.to(tl.int32), 0) - 1
    known = tl.load(prefix + row)
    tl.store(prefix + row, (known << BITS) | digit.to(known.dtype))
    tl.store(left + row, smaller - tl.max(tl.where(reached, below, 0), 0))


@triton.jit
def _overlay(image, values, scale, colors, out, rows, positions, opacity, TINY: tl.constexpr,
             SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads the map and the image once, writes the frame once.
    # Layout: image, out uint8 [rows, positions, 3], values [rows, positions] contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    at += row * positions
    value = tl.load(values + at, mask=inside, other=0.0)
    limit = tl.maximum(tl.load(scale + row), TINY)
    # In float32 the plain division is approximate.
    ratio = value / limit if value.dtype == tl.float64 else tl.div_rn(value, limit)
    # tl.clamp to (-1, 1) does not compile for float64 on sm_86 and later (Triton 3.6).
    ratio = tl.minimum(tl.maximum(ratio, -1.0), 1.0).to(tl.float32)
    shade = 0.5 + 0.5 * ratio if SIGNED else tl.abs(ratio)
    entry = tl.floor(shade * 255.0 + 0.5).to(tl.int32)
    blend = opacity * tl.abs(ratio)
    for channel in tl.static_range(3):
        color = tl.load(colors + entry * 3 + channel).to(tl.float32)
        under = tl.load(image + at * 3 + channel, mask=inside, other=0).to(tl.float32)
        mixed = tl.floor(under * (1.0 - blend) + color * blend + 0.5)
        tl.store(out + at * 3 + channel, mixed.to(tl.uint8), mask=inside)


def magnitude_percentile(values, percentile):
    """The op `magnitude_percentile`: [B], by radix select over the bits of |values|, which order
    like the magnitudes themselves.
    """
    rows, numel = len(values), values[0].numel()
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.contiguous().view(integer)
    rank = min(numel - 1, math.ceil(percentile / 100.0 * (numel - 1)))
    left = torch.full((rows,), rank, dtype=torch.int64, device=values.device)
    prefix = torch.zeros(rows, dtype=integer, device=values.device)
    shifts = range(8 * integer.itemsize - BITS, -1, -BITS)
    counts = left.new_zeros((len(shifts), rows, 1 << BITS))
    chosen, narrow = (configuration(f"overlay.{name}", bits) for name in ("count", "narrow"))
    grid = (rows * triton.cdiv(numel, chosen.tiles * chosen.elements),)
    with on(values):
        for found, shift in zip(counts, shifts, strict=True):
            _count[grid](bits, prefix, found, rows, numel, SHIFT=shift,
                         MAGNITUDE=torch.iinfo(integer).max, BITS=BITS, TILES=chosen.tiles,
                         BLOCK=chosen.elements, num_warps=chosen.warps)  # fmt: skip
            _narrow[rows,](prefix, left, found, BITS=BITS, num_warps=narrow.warps)
    return prefix.view(values.dtype)


def overlay(image, values, scale, colors, signed, opacity):
    """The op `overlay`: uint8 [B, P, 3]."""
    values = values.contiguous()
    out = torch.empty(image.shape, dtype=torch.uint8, device=image.device)
    rows, positions = values.shape
    chosen = configuration("overlay.overlay", values)
    grid = (rows * triton.cdiv(positions, chosen.elements),)
    with on(image):
        # Without fused multiply-adds the bytes equal the reference's.
        _overlay[grid](image.contiguous(), values, scale.contiguous(), colors.contiguous(), out,
                       rows, positions, opacity, TINY=torch.finfo(values.dtype).tiny,
                       SIGNED=signed, BLOCK=chosen.elements, num_warps=chosen.warps,
                       enable_fp_fusion=False)  # fmt: skip
    return out
