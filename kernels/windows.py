"""Windows: points of which a box is taken from elsewhere. A program writes one tile of elements of
several rows: where an element lies along the axes is found once for all of them.
"""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on

NARROW = 2**31 - 2**16
"""Elements below which 32-bit numbers tell them apart, tiles that overhang included."""
MOST_AXES = 5
LONGEST = NARROW
"""The longest axis: places along axes are 32-bit numbers always."""


@triton.jit
def places(left, carry, size):
    """(places along an axis, carried to the axis before it, what is left there of the tile's first
    element): elements are told apart by 32-bit divisions, only the first one by one of its width.
    """
    place = (left % size).to(tl.int32) + carry
    return place % size, place // size, left // size


@triton.jit
def within(start, stop, row, place, axis: tl.constexpr, AXES: tl.constexpr):
    """How far places along an axis lie within the row's box, whose corners 32 bits hold once cut;
    negative outside. A number stays in vector registers, of which there are more than of flags.
    """
    first = tl.maximum(tl.load(start + row * AXES + axis), 0)
    last = tl.maximum(tl.load(stop + row * AXES + axis), 0)
    first, last = tl.minimum(first, 2147483647), tl.minimum(last, 2147483647)
    return tl.minimum(place - first.to(tl.int32), last.to(tl.int32) - 1 - place)


@triton.jit
def _window(x, fill, examples, start, stop, out, rows, fills, numel, size_b, size_c, size_d, size_e,
            AXES: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    # Reads x and fill once (from L2 for further rows), writes rows * numel points.
    # Layout: x [B, numel], fill [fills, numel], out [rows, numel], start, stop [rows, AXES].
    groups = tl.cdiv(rows, TILES)
    first = tl.program_id(0) % groups * TILES
    left = tl.program_id(0) // groups
    if WIDE:
        left = left.to(tl.int64)
    left = left * BLOCK
    carry = tl.arange(0, BLOCK)
    at = left + carry
    inside = at < numel
    e, carry, left = places(left, carry, size_e)
    d, carry, left = places(left, carry, size_d)
    c, carry, left = places(left, carry, size_c)
    b, carry, left = places(left, carry, size_b)
    a = left.to(tl.int32) + carry
    for row in range(first, tl.minimum(first + TILES, rows)):
        depth = within(start, stop, row, e, AXES - 1, AXES)
        if AXES > 1:
            depth = tl.minimum(depth, within(start, stop, row, d, AXES - 2, AXES))
        if AXES > 2:
            depth = tl.minimum(depth, within(start, stop, row, c, AXES - 3, AXES))
        if AXES > 3:
            depth = tl.minimum(depth, within(start, stop, row, b, AXES - 4, AXES))
        if AXES > 4:
            depth = tl.minimum(depth, within(start, stop, row, a, AXES - 5, AXES))
        example = tl.load(examples + row)
        seen = tl.load(x + example * numel + at, mask=inside)
        hidden = tl.load(fill + example % fills * numel + at, mask=inside)
        point = tl.where(depth >= 0, hidden, seen)
        tl.store(out + tl.cast(row, tl.int64) * numel + at, point, mask=inside)


def window_points(x, fill, examples, start, stop):
    """The op `window_points`: [R, *]."""
    x, fill = x.contiguous(), fill.contiguous()
    axes, rows, numel = x.dim() - 1, len(examples), x[0].numel()
    if not 1 <= axes <= MOST_AXES or max(x.shape[1:]) > LONGEST:
        raise ValueError(
            f"x must have 1 to {MOST_AXES} axes behind the batch, none longer than {LONGEST}: got"
            f" {list(x.shape)}"
        )
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    chosen = configuration("windows.window", x)
    grid = triton.cdiv(rows, chosen.tiles) * triton.cdiv(numel, chosen.elements)
    sizes = (*(1,) * (MOST_AXES - axes), *x.shape[1:])
    with on(x):
        _window[grid,](x, fill, examples.contiguous(), start.contiguous(), stop.contiguous(), out,
                       rows, len(fill), numel, *sizes[1:], AXES=axes, WIDE=numel > NARROW,
                       TILES=chosen.tiles, BLOCK=chosen.elements,
                       num_warps=chosen.warps)  # fmt: skip
    return out
