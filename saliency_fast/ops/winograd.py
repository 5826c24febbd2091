"""Winograd's algorithm: 3x3 convolutions with a quarter of the multiplications."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saliency_fast.ops.registry import Sample, define

CHANNELS = 16
"""What the numbers of channels must be multiples of."""

_ENDS = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
_FACTORS = {0.5**0.5: -1 / 1.5, -(0.5**0.5): -1 / 1.5, 2**0.5: 1 / 6, -(2**0.5): 1 / 6}
"""Points between 0 and infinity, and the factors of their rows of G."""
_G = [_ENDS[0], *((f, p * f, p**2 * f) for p, f in _FACTORS.items()), _ENDS[1]]
_LANES = {"AVX512": 16, "AVX2": 8}
"""Floats of a register."""


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], *options: Any
) -> Tensor:
    relu = any(options[:1])
    _check_weight(weight)
    y = F.conv2d(x, weight, bias, padding=list(padding))
    return (y.relu() if relu else y).contiguous(memory_format=torch.channels_last)


def _transformed(weight: Tensor) -> Tensor:
    """G w G^T of every kernel, in parts of up to four registers of results."""
    _check_weight(weight)
    g = torch.tensor(_G, dtype=torch.float64, device="cpu").to(weight.device)
    u = torch.einsum("ah,bw,ochw->abco", g, g, weight.double()).flatten(0, 1)
    lanes = _LANES.get(torch.backends.cpu.get_cpu_capability())
    if lanes is None:
        return u.float()
    registers = len(weight) // lanes
    parts = -(-registers // 4)
    ends_of = [registers * part // parts * lanes for part in range(parts + 1)]
    pieces = [u[..., start:stop].flatten() for start, stop in pairwise(ends_of)]
    return torch.cat(pieces).float().view(u.shape)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be [D, C, 3, 3]: got {list(weight.shape)}")
    if any(count < 1 or count % CHANNELS for count in weight.shape[:2]):
        raise ValueError(
            f"channels must be multiples of {CHANNELS}: got weight {list(weight.shape)}"
        )
    if weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32: got {weight.dtype}")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], *_: Any
) -> Tensor:
    size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    shape = (len(x), len(weight), *size)
    form = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _samples() -> Iterator[Sample]:
    cases = (
        # batch, channels, outputs, height, width, padding
        (2, 16, 16, 8, 8, (1, 1)),
        (1, 32, 48, 5, 7, (1, 1)),
        (3, 48, 64, 4, 4, (0, 0)),
        (2, 16, 80, 3, 9, (0, 2)),
        (1, 64, 112, 13, 6, (2, 1)),
        (5, 16, 32, 1, 1, (1, 1)),
        (7, 32, 16, 6, 11, (3, 0)),
        (0, 16, 16, 8, 8, (1, 1)),
    )
    for number, (batch, channels, outputs, height, width, padding) in enumerate(cases):
        x = torch.randn(batch, channels, height, width)
        if number % 3 < 2:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5)
        if number % 2:
            weight = weight.contiguous(memory_format=torch.channels_last)
        bias = torch.randn(outputs) if number % 4 < 2 else None
        ready = winograd_weights(weight) if number % 3 else None
        yield Sample((x, weight, bias, padding, number % 2 == 1, ready))


def _weights() -> Iterator[Sample]:
    for results, channels in ((16, 16), (48, 32), (80, 16), (112, 48), (144, 16)):
        weight = torch.randn(results, channels, 3, 3)
        if channels == 16:
            weight = weight.contiguous(memory_format=torch.channels_last)
        yield Sample((weight,))


winograd_weights = define(
    schema="winograd_weights(Tensor weight) -> Tensor",
    reference=_transformed,
    fake=lambda weight: weight.new_empty((36, weight.shape[1], len(weight))),
    samples=_weights,
)
"""winograd_weights(weight [D, C, 3, 3]) -> [36, C, D] float32: transformed for `winograd`, in an
order of its own."""


winograd = define(
    schema="winograd(Tensor x, Tensor weight, Tensor? bias, int[] padding, bool relu=False,"
    " Tensor? ready=None) -> Tensor",
    reference=_convolved,
    fake=_fake,
    samples=_samples,
)
"""winograd(x [N, C, H, W], weight [D, C, 3, 3], bias [D] | None, padding (2), relu=False,
ready=None) -> [N, D, *] channels last: the convolution of stride 1 in float32, with its rectifier
where `relu` says so, by F(4x4, 3x3) (Winograd, 1980; Lavin and Gray, 2016) at the points 0,
+-sqrt(1/2), +-sqrt(2) and infinity, which keep its error near that of a direct one (Barabasz et
al., 2020). ready: `winograd_weights(weight)`, which spares their transform. Errors are shares of
the largest number of a tile of 6x6 pixels, and NaN or infinity spreads over its 4x4 outputs. C and
D are multiples of 16. An image's result does not depend on its launch. GPUs take the reference:
cuDNN has its own."""
