"""Philox4x32-10 (Salmon et al., 2011), the only source of random numbers in the library.

A draw is keyed by (the example's seed, sample, element, stream) and by nothing else, so it depends
neither on how points were split into launches nor on the device. The counter is
(element // 4 low, element // 4 high, sample, stream) and the key is the seed's two halves; the
four words of a block belong to elements 4q to 4q + 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define

NOISE, LINE, BASELINE, MASK, COALITION, ORDER = range(6)
"""Streams: noise of points, draws of random lines, random baselines, random masks, coalitions of
features, orders of features or examples."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def blocks(seed: Tensor, sample: Tensor, block: Tensor, stream: int) -> Tensor:
    """Philox words of `block` for each row: int64 [R, Q, 4] in [0, 2**32). seed, sample: int64 [R];
    block: int64 [Q], the element's number divided by four.
    """
    rows, count = seed.numel(), block.numel()
    word0 = (block & _MASK).expand(rows, count)
    word1 = ((block >> 32) & _MASK).expand(rows, count)
    word2 = (sample & _MASK)[:, None].expand(rows, count)
    word3 = torch.full_like(word0, stream)
    key0, key1 = (seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None]
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack((word0, word1, word2, word3), dim=-1)


def _span(seed: Tensor, count: int, first_element: int) -> tuple[Tensor, slice]:
    """The blocks of `count` elements, and where these lie among the words of the blocks."""
    start, stop = first_element // 4, (first_element + count + 3) // 4
    skip = first_element - 4 * start
    return torch.arange(start, stop, device=seed.device), slice(skip, skip + count)


def _bits(seed: Tensor, sample: Tensor, count: int, first_element: int, stream: int) -> Tensor:
    block, inside = _span(seed, count, first_element)
    return blocks(seed, sample, block, stream).flatten(1)[:, inside].contiguous()


def _samples() -> Iterator[Sample]:
    for count, first in ((1, 0), (5, 3), (64, 0), (1031, 4 * 2**32 - 2)):
        seed = torch.tensor([0, 7, -1, 2**62 + 5])
        sample = torch.tensor([0, 1, 2**32 - 1, 12])
        yield Sample((seed, sample, count, first, NOISE))


random_bits = define(
    schema="random_bits(Tensor seed, Tensor sample, int count, int first_element, int stream)"
    " -> Tensor",
    reference=_bits,
    fake=lambda seed, sample, count, *_: seed.new_empty((seed.numel(), count)),
    samples=_samples,
    triton="philox",
)
"""random_bits(seed [R], sample [R], count, first_element, stream) -> int64 [R, count]."""


def normals(seed: Tensor, sample: Tensor, count: int, first_element: int) -> Tensor:
    """Standard normals by Box-Muller from 24-bit uniforms: float64 [R, count]. Words (0, 1) and (2,
    3) of a block give the normals of elements (0, 1) and (2, 3): radius from u = (word >> 8) + 1
    over 2**24, in (0, 1], angle from 2 pi (word >> 8) / 2**24. Every number up to the logarithm is
    exact in float32 too, so both precisions draw the same noise; the largest magnitude is 5.77.
    """
    block, inside = _span(seed, count, first_element)
    words = (blocks(seed, sample, block, NOISE) >> 8).double()
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2] + 1.0) * 2.0**-24))
    angle = words[..., 1::2] * (2.0 * torch.pi * 2.0**-24)
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pair.flatten(1)[:, inside]


def line_draw(seed: Tensor, sample: Tensor, baselines: int) -> tuple[Tensor, Tensor]:
    """The random line of each row: baseline number int64 [R] and alpha float64 [R]. From words 0
    and 1 of block 0 in the stream LINE: (word0 * baselines) >> 32, and ((word1 >> 9) + 0.5) /
    2**23: the middle of its cell, never 0 or 1, exact in float32.
    """
    block = torch.zeros(1, dtype=torch.int64, device=seed.device)
    words = blocks(seed, sample, block, LINE)[:, 0]
    return (words[:, 0] * baselines) >> 32, ((words[:, 1] >> 9).double() + 0.5) * 2.0**-23
