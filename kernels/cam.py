"""Class activation maps in two kernels: weighted sums of some channels each, then the resize."""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on
from .pools import place_in

NARROW = 2**31 - 2**16
"""Numbers that 32 bits hold, tiles that overhang included."""


@triton.jit
def _weigh(activations, weights, partial, channels, positions, EACH: tl.constexpr,
           TILES: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads activations and weights once; writes a float64 sum per position and split of channels.
    # Layout: activations [B, channels, positions], weights alike where EACH, else [B, channels],
    # partial [B, splits, positions], all contiguous.
    splits = tl.cdiv(channels, TILES * AHEAD)
    tiles = tl.cdiv(positions, BLOCK)
    program = tl.program_id(0)
    split = program % splits
    at = program // splits % tiles * BLOCK + tl.arange(0, BLOCK)
    example = (program // splits // tiles).to(tl.int64)
    inside = at < positions
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(split * TILES * AHEAD, (split + 1) * TILES * AHEAD, AHEAD):
        for ahead in tl.static_range(AHEAD):
            channel = example * channels + first + ahead
            there = first + ahead < channels
            here = channel * positions + at
            value = tl.load(activations + here, mask=inside & there, other=0.0).to(tl.float64)
            if EACH:
                weight = tl.load(weights + here, mask=inside & there, other=0.0)
            else:
                weight = tl.load(weights + channel, mask=there, other=0.0)
            total += weight.to(tl.float64) * value
    tl.store(partial + (example * splits + split) * positions + at, total, mask=inside)


@triton.jit
def neighbours(place, small, large):
    """The two places of `small` that places of `large` lie between, and the share of the second:
    counted in halves, so that it is rounded once.
    """
    halves = tl.maximum((2 * place + 1) * small - large, 0)
    low = halves // (2 * large)
    return low, tl.minimum(low + 1, small - 1), halves % (2 * large)


@triton.jit
def read(total, at, inside, RECTIFY: tl.constexpr, KIND: tl.constexpr):
    """Elements of the small map, in the type of the large one."""
    value = tl.load(total + at, mask=inside, other=0.0)
    if RECTIFY:
        value = tl.where(value < 0, 0.0, value)
    return value.to(KIND)


@triton.jit
def line(total, row, low, high, share, inside, RECTIFY: tl.constexpr, KIND: tl.constexpr):
    """Along the last axis of the small map."""
    first = read(total, row + low, inside, RECTIFY, KIND)
    return first + share * (read(total, row + high, inside, RECTIFY, KIND) - first)


@triton.jit
def plane(total, slice, low, high, share, w, x_low, x_high, x_share, inside, AXES: tl.constexpr,
          RECTIFY: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Along the last two."""
    value = line(total, (slice + low) * w, x_low, x_high, x_share, inside, RECTIFY, KIND)
    if AXES > 1:
        row = (slice + high) * w
        value += share * (line(total, row, x_low, x_high, x_share, inside, RECTIFY, KIND) - value)
    return value


@triton.jit
def _resize(total, out, count, in_d, in_h, in_w, out_d, out_h, out_w, AXES: tl.constexpr,
            RECTIFY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads the small map once (from the caches for further outputs), writes the large one.
    # Layout: total float64 [B, in_*], out [B, out_*], contiguous.
    at = tl.program_id(0)
    if WIDE:
        at = at.to(tl.int64)
    at = at * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    kind: tl.constexpr = out.dtype.element_ty
    example, z, y, x, _ = place_in(at, 1, out_d, out_h, out_w)
    x_low, x_high, x_rest = neighbours(x, in_w, out_w)
    y_low, y_high, y_rest = neighbours(y, in_h, out_h)
    z_low, z_high, z_rest = neighbours(z, in_d, out_d)
    x_share = x_rest.to(kind) / (2 * out_w)
    y_share = y_rest.to(kind) / (2 * out_h)
    near, far = (example * in_d + z_low) * in_h, (example * in_d + z_high) * in_h
    value = plane(total, near, y_low, y_high, y_share, in_w, x_low, x_high, x_share, inside,
                  AXES, RECTIFY, kind)  # fmt: skip
    if AXES > 2:
        other = plane(total, far, y_low, y_high, y_share, in_w, x_low, x_high, x_share, inside,
                      AXES, RECTIFY, kind)  # fmt: skip
        value += z_rest.to(kind) / (2 * out_d) * (other - value)
    tl.store(out + at, value, mask=inside)


def cam(activations, weights, size, rectify):
    """The op `cam`: [B, *size]."""
    activations, weights = activations.contiguous(), weights.contiguous()
    small = activations.shape[2:]
    if not 1 <= len(small) <= 3 or len(small) != len(size):
        raise ValueError(f"size must have a number for each of 1 to 3 axes: got {list(size)}")
    examples, channels, positions = len(activations), activations.shape[1], small.numel()
    chosen = configuration("cam.weigh", activations)
    splits = triton.cdiv(channels, chosen.tiles * chosen.ahead)
    partial = activations.new_empty((examples, splits, positions), dtype=torch.float64)
    with on(activations):
        _weigh[examples * triton.cdiv(positions, chosen.elements) * splits,](
            activations, weights, partial, channels, positions, EACH=weights.dim() > 2,
            TILES=chosen.tiles, AHEAD=chosen.ahead, BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    total = partial.sum(1)
    double = activations.dtype == torch.float64
    out = total.new_empty((examples, *size), dtype=torch.float64 if double else torch.float32)
    chosen = configuration("cam.resize", out)
    longest = max(2 * a * b for a, b in zip(small, size, strict=True))
    fill = (1,) * (3 - len(small))
    with on(out):
        _resize[triton.cdiv(out.numel(), chosen.elements),](
            total, out, out.numel(), *fill, *small, *fill, *size, AXES=len(small),
            RECTIFY=rectify, WIDE=max(out.numel(), longest) > NARROW, BLOCK=chosen.elements,
            num_warps=chosen.warps,
        )  # fmt: skip
    return out
