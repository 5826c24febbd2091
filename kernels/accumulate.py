"""Accumulate: gradients of a launch folded into their slots' accumulators.

A program owns one tile of one slot and folds that slot's rows in their order: no atomics, and an
element's sum does not depend on how rows were split into launches. Rows come AHEAD at a time,
their loads in flight together; a load of another slot's row is masked and moves nothing.
"""

import triton
import triton.language as tl

from .configurations import configuration
from .launch import contiguous, on
from .philox import place
from .points import random_line


@triton.jit
def any_of(slot, mine, first, rows, AHEAD: tl.constexpr):
    """Whether any of the next AHEAD rows belongs to the slot `mine`."""
    found = tl.load(slot + first) == mine
    for ahead in tl.static_range(1, AHEAD):
        found |= tl.load(slot + first + ahead, mask=first + ahead < rows, other=-1) == mine
    return found


@triton.jit
def _accumulate(total, grads, slot, weight, slots, rows, numel, KIND: tl.constexpr,
                AHEAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # Reads each gradient once; reads and writes total once.
    # Layout: total [slots, numel], grads [rows, numel] contiguous.
    program = tl.program_id(0)
    mine = (program % slots).to(tl.int64)
    at = (program // slots).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    wide = tl.cast(numel, tl.int64)
    kept = tl.load(total + mine * wide + at, mask=inside)
    for first in range(0, rows, AHEAD):
        if any_of(slot, mine, first, rows, AHEAD):
            for ahead in tl.static_range(AHEAD):
                row = first + ahead
                chosen = tl.load(slot + row, mask=row < rows, other=-1) == mine
                term = tl.load(grads + row * wide + at, mask=inside & chosen, other=0.0)
                term = term.to(kept.dtype)
                if KIND == "square":
                    term = term * term
                elif KIND == "absolute":
                    term = tl.abs(term)
                kept += tl.load(weight + row, mask=chosen, other=0.0).to(kept.dtype) * term
    tl.store(total + mine * wide + at, kept, mask=inside)


@triton.jit
def _moments(mean, spread, before, count, grads, slot, slots, rows, numel, AHEAD: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    # Reads each gradient once; reads and writes mean and spread once.
    # Layout: mean, spread [slots, numel], grads [rows, numel] contiguous; before: count's old copy.
    program = tl.program_id(0)
    mine = (program % slots).to(tl.int64)
    at = (program // slots).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    wide = tl.cast(numel, tl.int64)
    center = tl.load(mean + mine * wide + at, mask=inside)
    squares = tl.load(spread + mine * wide + at, mask=inside)
    seen = tl.load(before + mine)
    for first in range(0, rows, AHEAD):
        if any_of(slot, mine, first, rows, AHEAD):
            for ahead in tl.static_range(AHEAD):
                row = first + ahead
                chosen = tl.load(slot + row, mask=row < rows, other=-1) == mine
                gradient = tl.load(grads + row * wide + at, mask=inside & chosen, other=0.0)
                gradient = gradient.to(center.dtype)
                seen += tl.where(chosen, 1.0, 0.0)
                step = gradient - center
                moved = center + step * (1.0 / tl.maximum(seen, 1.0)).to(center.dtype)
                squares = tl.where(chosen, squares + step * (gradient - moved), squares)
                center = tl.where(chosen, moved, center)
    tl.store(mean + mine * wide + at, center, mask=inside)
    tl.store(spread + mine * wide + at, squares, mask=inside)
    tl.store(count + mine, seen, mask=program < slots)


@triton.jit
def _random_lines(total, grads, slot, weight, x, baselines, sigma, seed, examples, sample, slots,
                  rows, count, numel, first_block, skip, BLOCKS: tl.constexpr):  # fmt: skip
    # Reads each gradient, x and the drawn baselines once; reads and writes total once.
    # Layout: total [slots, numel], grads [rows, numel], x [B, numel], baselines [count, numel].
    program = tl.program_id(0)
    mine = (program % slots).to(tl.int64)
    block, at = place(program // slots, first_block, skip, BLOCKS)
    inside = (at >= 0) & (at < numel)
    wide = tl.cast(numel, tl.int64)
    kept = tl.load(total + mine * wide + at, mask=inside)
    for row in range(rows):
        if tl.load(slot + row) == mine:
            gradient = tl.load(grads + row * wide + at, mask=inside).to(kept.dtype)
            start, end, _ = random_line(
                x, baselines, sigma, seed, examples, sample, row, count, numel, block, at, inside
            )
            term = gradient * (end - start).to(kept.dtype)
            kept += tl.load(weight + row).to(kept.dtype) * term
    tl.store(total + mine * wide + at, kept, mask=inside)


def accumulate(total, grads, slot, weight, kind):
    """The op `accumulate`: adds to total in place."""
    slots, rows, numel = len(total), len(grads), total[0].numel()
    chosen = configuration("accumulate.accumulate", grads)
    grid = (slots * triton.cdiv(numel, chosen.elements),)
    with on(total), contiguous(total) as (kept,):
        _accumulate[grid](kept, grads.contiguous(), slot.contiguous(), weight.contiguous(), slots,
                          rows, numel, KIND=kind, AHEAD=chosen.ahead, BLOCK=chosen.elements,
                          num_warps=chosen.warps)  # fmt: skip


def accumulate_moments(mean, spread, count, grads, slot):
    """The op `accumulate_moments`: updates mean, spread and count in place."""
    slots, rows, numel = len(mean), len(grads), mean[0].numel()
    chosen = configuration("accumulate.moments", grads)
    grid = (slots * triton.cdiv(numel, chosen.elements),)
    with on(mean), contiguous(mean, spread, count) as (center, squares, seen):
        # Programs of a slot start from its old count at any time, so the new one lies apart.
        _moments[grid](center, squares, seen.clone(), seen, grads.contiguous(), slot.contiguous(),
                       slots, rows, numel, AHEAD=chosen.ahead, BLOCK=chosen.elements,
                       num_warps=chosen.warps)  # fmt: skip


def accumulate_random_lines(total, grads, slot, weight, x, baselines, sigma, seed, examples, sample,
                            first_element):  # fmt: skip
    """The op `accumulate_random_lines`: adds to total in place."""
    slots, rows, numel = len(total), len(grads), total[0].numel()
    first_block, skip = divmod(first_element, 4)
    chosen = configuration("accumulate.random_lines", x)
    grid = (slots * triton.cdiv(numel + skip, chosen.elements),)
    with on(total), contiguous(total) as (kept,):
        _random_lines[grid](kept, grads.contiguous(), slot.contiguous(), weight.contiguous(),
                            x.contiguous(), baselines.contiguous(), sigma.contiguous(),
                            seed.contiguous(), examples.contiguous(), sample.contiguous(), slots,
                            rows, len(baselines), numel, first_block, skip,
                            BLOCKS=chosen.elements // 4, num_warps=chosen.warps)  # fmt: skip
