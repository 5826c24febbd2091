"""Philox4x32-10 (Salmon et al., 2011) and its normals, in registers. Bit for bit ops/philox.py."""

import torch
import triton
import triton.language as tl

from .configurations import configuration
from .launch import on

NOISE = tl.constexpr(0)
LINE = tl.constexpr(1)


@triton.jit
def words(seed, sample, block, stream: tl.constexpr):
    """The four words of each block number: uint32, shaped like block (int64)."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, sample.to(tl.uint32), stream)


@triton.jit
def in_order(word0, word1, word2, word3):
    """Four tensors [N] as one [4 N], a thread's four side by side: one 16-byte access."""
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def place(tile, first_block, skip, BLOCKS: tl.constexpr):
    """Numbers of a tile's Philox blocks, and of its elements within the tensor. The tensor's
    first element is word `skip` of `first_block`, so that the first tile starts at -skip.
    """
    start = tile.to(tl.int64) * BLOCKS
    block = first_block + start + tl.arange(0, BLOCKS)
    return block, start * 4 + tl.arange(0, 4 * BLOCKS) - skip


@triton.jit
def minus_two_log(fraction, dtype: tl.constexpr):
    """-2 log((fraction + 1) / 2**24) of a 24-bit fraction: mantissa in [sqrt(1/2), sqrt(2)), so
    that nothing cancels near 1. No special cases, which the library's logarithm would test for.
    """
    bits = (fraction + 1).to(tl.float32).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    halvings = (151 - (bits >> 23)).to(dtype)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = mantissa.to(dtype) - 1.0
    if dtype == tl.float64:
        s = f / (2.0 + f)  # log(1 + f) = 2 atanh(s)
        z = s * s
        p = 0.146164496850434059
        p = p * z + 0.153317216005560413
        p = p * z + 0.181828891252617221
        p = p * z + 0.222222111347950799
        p = p * z + 0.285714286259754849
        p = p * z + 0.399999999998995045
        p = p * z + 0.666666666666666969
        return halvings * 1.3862943611198906188 - 2.0 * (2.0 * s + s * (z * p))
    else:
        p = -0.0790274377
        p = p * f + 0.126223198
        p = p * f - 0.129981838
        p = p * f + 0.142144959
        p = p * f - 0.166412815
        p = p * f + 0.200010451
        p = p * f - 0.250003064
        p = p * f + 0.333333307
        z = f * f
        logarithm = f + (z * (f * p) - 0.5 * z)
        # 2 log(2) in two parts; the product with the first has no rounding.
        return halvings * 1.38671875 + (halvings * -4.2438889e-4 - 2.0 * logarithm)


@triton.jit
def wave(turn):
    """(cos, sin) of `turn` turns in [-1/8, 1/8]. The library's functions would reduce the angle
    again, by a slow path through local memory.
    """
    z = turn * turn
    if turn.dtype == tl.float64:
        s = 3.78086895930229552
        s = s * z - 15.0938042099871135
        s = s * z + 42.058685020160894
        s = s * z - 76.7058597042745506
        s = s * z + 81.6052492759480352
        s = s * z - 41.3417022403996362
        s = s * z + 6.28318530717958646
        c = -1.69903439406606364
        c = c * z + 7.90320691156967843
        c = c * z - 26.4262532758547214
        c = c * z + 60.2446413527020089
        c = c * z - 85.4568172066438042
        c = c * z + 64.9393940226682427
        c = c * z - 19.7392088021787172
        return 1.0 + c * z, turn * s
    else:
        s = -75.4016127
        s = s * z + 81.5925429
        s = s * z - 41.3416626
        s = s * z + 0.283185288
        c = 59.424106
        c = c * z - 85.4488201
        c = c * z + 64.9393691
        c = c * z - 19.7392088
        # 2 pi as 6 + 0.283...: 6 * turn has no rounding, so one rounding remains.
        return 1.0 + c * z, 6.0 * turn + turn * s


@triton.jit
def normal_pair(radius_word, angle_word, dtype: tl.constexpr):
    """Two normals of two words (Box and Muller, 1958). Up to the logarithm and the polynomials
    all numbers are 24-bit fractions and exact, in float32 too.
    """
    radius = tl.sqrt(minus_two_log((radius_word >> 8).to(tl.int32), dtype))
    angle = (angle_word >> 8).to(tl.int32)
    quarter = (angle + (1 << 21)) >> 22
    cosine, sine = wave((angle - (quarter << 22)).to(dtype) * (1.0 / 16777216))
    odd = (quarter & 1) != 0
    first = radius * tl.where(odd, sine, cosine)
    second = radius * tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    return first, tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def normals(seed, sample, block, dtype: tl.constexpr):
    """The normals of each block's four elements, in order: [4 N] from [N]."""
    word0, word1, word2, word3 = words(seed, sample, block, NOISE)
    first, second = normal_pair(word0, word1, dtype)
    third, fourth = normal_pair(word2, word3, dtype)
    return in_order(first, second, third, fourth)


@triton.jit
def line_draw(seed, sample, baselines):
    """A row's random line: its baseline's number and float64 alpha, never 0 or 1."""
    block = tl.zeros((), tl.int64)
    word0, word1, _, _ = words(seed, sample, block, LINE)
    number = (word0.to(tl.int64) * baselines) >> 32
    return number, ((word1 >> 9).to(tl.float64) + 0.5) * (1.0 / 8388608)


@triton.jit
def _bits(seed, sample, out, rows, count, first_block, skip, STREAM: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    # Writes rows * count int64; reads nothing but the two columns.
    # Layout: out [rows, count] contiguous; programs run row by row within a tile.
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    block, at = place(program // rows, first_block, skip, BLOCKS)
    drawn = words(tl.load(seed + row), tl.load(sample + row), block, STREAM)
    bits = in_order(drawn[0], drawn[1], drawn[2], drawn[3]).to(tl.int64)
    tl.store(out + row * count + at, bits, mask=(at >= 0) & (at < count))


def random_bits(seed, sample, count, first_element, stream):
    """The op `random_bits`: int64 [R, count]."""
    out = torch.empty((seed.numel(), count), dtype=torch.int64, device=seed.device)
    first_block, skip = divmod(first_element, 4)
    chosen = configuration("philox.bits", out)
    grid = (len(out) * triton.cdiv(count + skip, chosen.elements),)
    with on(seed):
        _bits[grid](seed.contiguous(), sample.contiguous(), out, len(out), count, first_block, skip,
                    STREAM=stream, BLOCKS=chosen.elements // 4, num_warps=chosen.warps)  # fmt: skip
    return out
