"""Finish: accumulated gradients times the input's distance, their sums and their maps."""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on


@triton.jit
def _finish(total, x, baseline, values, partial, slots, share, baselines, channels, positions,
            SCALED: tl.constexpr, SHIFTED: tl.constexpr, REDUCTION: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    # Reads total, x and baseline once; writes values once and one float64 per program.
    # Layout: total [slots, channels, positions], x [slots / share, ...] alike, contiguous.
    program = tl.program_id(0)
    slot = (program % slots).to(tl.int64)
    at = (program // slots).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    size = tl.cast(channels, tl.int64) * positions
    total += slot * size
    x += (slot // share) * size
    baseline += (slot // share) % baselines * size
    summed = tl.zeros((BLOCK,), tl.float64)
    kept = tl.zeros((BLOCK,), total.dtype.element_ty)
    here = at
    for _ in range(channels):
        value = tl.load(total + here, mask=inside, other=0.0)
        if SCALED:
            length = tl.load(x + here, mask=inside, other=0.0)
            if SHIFTED:
                length -= tl.load(baseline + here, mask=inside, other=0.0)
            value *= length.to(value.dtype)
        summed += value.to(tl.float64)
        if REDUCTION == "none":
            kept = value
        elif REDUCTION == "sum":
            kept += value
        elif REDUCTION == "absmax":
            kept = tl.maximum(kept, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        else:
            kept += value * value
        here += positions
    if REDUCTION == "l2":
        kept = tl.sqrt(kept)
    tl.store(values + slot * positions + at, kept, mask=inside)
    tl.store(partial + slot * tl.cdiv(positions, BLOCK) + program // slots, tl.sum(summed, 0))


def finish(total, x, baseline, reduction):
    """The op `finish`: (values, sums float64 [S])."""
    total = total.contiguous()
    x = None if x is None else x.contiguous()
    baseline = None if x is None or baseline is None else baseline.contiguous()
    slots, channels = total.shape[:2]
    shape = total.shape if reduction == "none" else (slots, *total.shape[2:])
    values = torch.empty(shape, dtype=total.dtype, device=total.device)
    positions = values[0].numel()
    chosen = configuration("finish.finish", total)
    tiles = triton.cdiv(positions, chosen.elements)
    partial = torch.empty((slots, tiles), dtype=torch.float64, device=total.device)
    with on(total):
        _finish[slots * tiles,](
            total, total if x is None else x, total if baseline is None else baseline, values,
            partial, slots, 1 if x is None else slots // len(x),
            1 if baseline is None else len(baseline), 1 if reduction == "none" else channels,
            positions, SCALED=x is not None, SHIFTED=baseline is not None, REDUCTION=reduction,
            BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return values, partial.sum(1)
