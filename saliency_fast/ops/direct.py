"""Direct convolutions of images of few channels, with their rectifier and maximum pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saliency_fast.ops.pools import pooled_size
from saliency_fast.ops.registry import Op, Sample, define
from saliency_fast.ops.winograd import CHANNELS

FEW = 4
"""Channels of an image, at most."""
_ONE = (1, 1)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
    pool: Sequence[int],
) -> Tensor:
    _check(x, weight, bias, stride, padding, pool)
    y = F.conv2d(x, weight, bias, list(stride), list(padding))
    if relu:
        y = y.relu()
    if pool:
        y = F.max_pool2d(y, list(pool[:2]), list(pool[2:4]), list(pool[4:]))
    return y.contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    pool: Sequence[int],
) -> None:
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [N, C, H, W] and weight [D, C, h, w]: got {list(x.shape)} and"
            f" {list(weight.shape)}"
        )
    if not 1 <= x.shape[1] <= FEW or len(weight) < 1 or len(weight) % CHANNELS:
        raise ValueError(
            f"there must be 1 to {FEW} channels, and a multiple of {CHANNELS} results: got weight"
            f" {list(weight.shape)}"
        )
    if any(one is not None and one.dtype != torch.float32 for one in (x, weight, bias)):
        raise ValueError(f"x, weight and bias must be float32: got {x.dtype}, {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}]: got {list(bias.shape)}")
    if len(stride) != 2 or len(padding) != 2 or min(stride) < 1 or min(padding) < 0:
        raise ValueError(
            "stride and padding must be two numbers each, positive and not negative: got"
            f" {list(stride)}, {list(padding)}"
        )
    if len(pool) not in (0, 6):
        raise ValueError(
            f"pool must be empty, or kernel, stride and padding, two numbers each: got {list(pool)}"
        )
    _size(x, weight, stride, padding, pool)


def _size(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    pool: Sequence[int],
) -> list[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in axes]
    if any(count < 1 for count in size):
        raise ValueError(f"no window of {list(weight.shape[2:])} fits into {list(x.shape)}")
    if pool:
        size = pooled_size(size, pool[:2], pool[2:4], pool[4:], _ONE, False)
    return size


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
    pool: Sequence[int],
) -> Tensor:
    shape = (len(x), len(weight), *_size(x, weight, stride, padding, pool))
    form = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _samples() -> Iterator[Sample]:
    cases = (
        # x, results, kernel, stride, padding, pool
        ((2, 1, 8, 8), 16, (3, 3), (1, 1), (1, 1), (2, 2, 2, 2, 0, 0)),
        ((3, 3, 21, 38), 64, (7, 7), (2, 2), (3, 3), (3, 3, 2, 2, 1, 1)),
        ((1, 2, 5, 40), 48, (1, 5), (1, 2), (0, 0), ()),
        ((2, 4, 30, 9), 80, (5, 2), (3, 1), (2, 1), (1, 2, 3, 1, 0, 1)),
        ((2, 3, 9, 9), 32, (3, 3), (1, 1), (0, 1), (1, 1, 2, 2, 0, 0)),
        ((1, 1, 3, 3), 16, (3, 3), (1, 1), (0, 0), (1, 1, 1, 1, 0, 0)),
        ((5, 1, 64, 50), 16, (4, 4), (4, 4), (0, 0), (4, 3, 1, 1, 2, 1)),
        ((2, 1, 4, 3), 16, (1, 2), (1, 2), (2, 3), ()),
        ((0, 3, 8, 8), 16, (3, 3), (1, 1), (1, 1), ()),
    )
    for number, (shape, results, kernel, stride, padding, pool) in enumerate(cases):
        x = torch.randn(shape)
        if number % 3 == 1:
            x = x.contiguous(memory_format=torch.channels_last)
        elif number % 3 == 2:
            x = torch.randn(*shape[:3], 2 * shape[3])[..., ::2]
        weight = torch.randn(results, shape[1], *kernel) / 4
        bias = torch.randn(results) if number % 4 < 2 else None
        note = f"{list(shape)} to {results} by {kernel}, pool {pool}"
        args = (x, weight, bias, stride, padding, number % 2 == 0, pool)
        yield Sample(args, note=note)


direct = define(
    Op(
        schema="direct(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
        " bool relu, int[] pool) -> Tensor",
        reference=_convolved,
        fake=_fake,
        samples=_samples,
        moved=lambda *args: 4 * (args[0].numel() + args[1].numel() + _fake(*args).numel()),
    )
)
"""direct(x [N, C, H, W], weight [D, C, h, w], bias [D] | None, stride (2), padding (2), relu, pool)
-> [N, D, *] channels last: a convolution in float32 of 1 to 4 channels, with its rectifier where
`relu` says so, and with its maximum pool unless `pool` is empty: kernel, stride and padding (6).
What lies between them is not written to memory. D is a multiple of 16. An image's result does not
depend on its launch. GPUs take the reference: cuDNN has its own."""
