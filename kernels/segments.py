"""Segments: points that keep some parts of an example. A program writes one tile of positions of
one row in all channels, which share what is kept there.
"""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on


@triton.jit
def choose(kept, x, fill, out, at, inside, positions, repeats):
    """Writes one tile of positions of a row: x's where they are kept, in all channels."""
    for _ in range(repeats):
        seen, hidden = tl.load(x + at, mask=inside), tl.load(fill + at, mask=inside)
        tl.store(out + at, tl.where(kept, seen, hidden), mask=inside)
        at += positions


@triton.jit
def _segment(x, fill, segment, present, examples, coalitions, out, rows, fills, segmented, features,
             positions, repeats, BLOCK: tl.constexpr):  # fmt: skip
    # Reads x, fill and segment once (from L2 for further rows), writes rows * numel points.
    # Layout: x, fill, out [*, repeats, positions], segment [segmented, positions], present
    # [*, features] of bytes, all contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    example = tl.load(examples + row)
    part = tl.load(segment + example % segmented * positions + at, mask=inside, other=0)
    kept = tl.load(present + tl.load(coalitions + row) * features + part, mask=inside, other=0) != 0
    numel = tl.cast(positions, tl.int64) * repeats
    x += example * numel
    fill += example % fills * numel
    choose(kept, x, fill, out + row * numel, at, inside, positions, repeats)


@triton.jit
def _mask(x, fill, mask, examples, numbers, out, rows, fills, positions, repeats,
          BLOCK: tl.constexpr):  # fmt: skip
    # Reads x, fill and mask once (from L2 for further rows), writes rows * numel points.
    # Layout: x, fill, out [*, repeats, positions], mask [*, positions], all contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    example = tl.load(examples + row)
    kept = tl.load(mask + tl.load(numbers + row) * positions + at, mask=inside)
    numel = tl.cast(positions, tl.int64) * repeats
    x += example * numel
    fill += example % fills * numel
    out += row * numel
    for _ in range(repeats):
        seen, hidden = tl.load(x + at, mask=inside), tl.load(fill + at, mask=inside)
        tl.store(out + at, hidden + kept * (seen - hidden), mask=inside)
        at += positions


def segment_points(x, fill, segment, present, examples, coalitions):
    """The op `segment_points`: [R, *]; segments out of range are not looked for."""
    x, fill, segment = x.contiguous(), fill.contiguous(), segment.contiguous()
    present = present.contiguous().view(torch.uint8)
    out, positions, repeats = numbered(x, examples, segment)
    chosen = configuration("segments.segment", x)
    with on(x):
        _segment[len(out) * triton.cdiv(positions, chosen.elements),](
            x, fill, segment, present, examples.contiguous(), coalitions.contiguous(), out,
            len(out), len(fill), len(segment), present.shape[1], positions, repeats,
            BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return out


def mask_points(x, fill, mask, examples, numbers):
    """The op `mask_points`: [R, *]."""
    x, fill, mask = x.contiguous(), fill.contiguous(), mask.to(x.dtype).contiguous()
    out, positions, repeats = numbered(x, examples, mask)
    chosen = configuration("segments.mask", x)
    with on(x):
        _mask[len(out) * triton.cdiv(positions, chosen.elements),](
            x, fill, mask, examples.contiguous(), numbers.contiguous(), out, len(out), len(fill),
            positions, repeats, BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return out


def numbered(x, examples, named):
    """(empty points, positions that `named` numbers, how often an example repeats them)."""
    positions = named.shape[1]
    if x[0].numel() % positions != 0:
        raise ValueError(f"an example of {x[0].numel()} is no multiple of {positions} elements")
    out = torch.empty((len(examples), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return out, positions, x[0].numel() // positions
