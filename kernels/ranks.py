"""Ranks: points of which the elements that come first in a ranking are replaced. A program writes
one tile of positions of one row in all channels, which share what is replaced there.
"""

import triton
import triton.language as tl

from .configurations import configuration
from .launch import on
from .segments import choose, numbered


@triton.jit
def _rank(x, fill, rank, examples, count, out, rows, fills, ranked, positions, repeats,
          BLOCK: tl.constexpr):  # fmt: skip
    # Reads x, fill and rank once (from L2 for further rows), writes rows * numel points.
    # Layout: x, fill, out [*, repeats, positions], rank [ranked, positions], all contiguous.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    at = (program // rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    example = tl.load(examples + row)
    place = tl.load(rank + example % ranked * positions + at, mask=inside)
    # 32 bits hold every bound but those beyond all ranks.
    bound = tl.load(count + row)
    limit = tl.minimum(tl.maximum(bound, -2147483648), 2147483647).to(tl.int32)
    kept = (place >= limit) & (bound <= 2147483647)
    numel = tl.cast(positions, tl.int64) * repeats
    x += example * numel
    fill += example % fills * numel
    choose(kept, x, fill, out + row * numel, at, inside, positions, repeats)


def rank_points(x, fill, rank, examples, count):
    """The op `rank_points`: [R, *]."""
    x, fill, rank = x.contiguous(), fill.contiguous(), rank.contiguous()
    out, positions, repeats = numbered(x, examples, rank)
    chosen = configuration("ranks.rank", x)
    with on(x):
        _rank[len(out) * triton.cdiv(positions, chosen.elements),](
            x, fill, rank, examples.contiguous(), count.contiguous(), out, len(out), len(fill),
            len(rank), positions, repeats, BLOCK=chosen.elements, num_warps=chosen.warps,
        )  # fmt: skip
    return out
