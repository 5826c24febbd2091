"""Calls of the CUDA C++ ops beyond their samples: odd sizes, misaligned starts, layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from saliency_fast.ops import OPS, Op, masks


@dataclass(frozen=True)
class Case:
    """Arguments whose memory begins `shift` elements after an aligned address; see `placed`."""

    op: Op
    args: tuple[Any, ...]
    shift: int = 0

    def placed(self) -> tuple[Any, ...]:
        """Fresh copies of the arguments, strides kept, each at the end of its own memory, so that
        AddressSanitizer finds whatever is read or written past it.
        """
        # Some arguments stay aligned, since kernels decide on each of them.
        shifts = (self.shift * factor for factor in cycle((1, 1, 0, 2)))
        return tuple(map(_placed, self.args, shifts))


def _placed(value: Any, shift: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    span = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    memory = torch.empty((span if value.numel() else 0) + shift, dtype=value.dtype)
    return memory.as_strided(value.shape, value.stride(), shift).copy_(value)


def _mask_shapes() -> list[tuple[int, ...]]:
    sizes = (1, 2, 3, 5, 7, 8, 9, 16, 17)
    planes = [(1, channels, size) for channels, size in product((1, 2, 3, 7, 8, 9, 16), sizes)]
    others = [(2, 5, 3, 7), (2, 8, 33, 31), (1, 2048, 1, 1), (5, 24, 1, 3)]
    return planes + [(3, channels) for channels in (1, 5, 8, 16, 24, 40)] + others


def _masks() -> Iterator[Case]:
    rectifiers = ((0.0, math.inf), (0.01, math.inf), (0.0, 6.0))
    for dtype, shape in product(masks.DTYPES, _mask_shapes()):
        x, residual, grad = (3 * torch.randn(3, *shape)).to(dtype)
        scale, shift = torch.randn(2, shape[1]).to(dtype)
        _, mask = OPS["relu_mask"].reference(x, None, None, None, 0.0, math.inf)
        for by in (0, 1, 3) if math.prod(shape) < 400 else (0, 1):
            parts = ((None, None, None), (scale, shift, None), (scale, shift, residual))
            for part, rectifier in product(parts, rectifiers):
                yield Case(OPS["relu_mask_"], (x, *part, *rectifier), by)
                yield Case(OPS["relu_mask"], (x, *part, *rectifier), by)
            for rule, both in product(masks.RULES, (False, True)):
                factor = scale if both else None
                yield Case(
                    OPS["relu_mask_backward"], (grad, mask, factor, 0.2, rule, both, False), by
                )


def _channels_last() -> Iterator[Case]:
    shapes = ((2, 5, 3, 7), (1, 8, 5, 5), (2, 24, 1, 3), (3, 16, 2, 2, 3), (2, 7, 3, 3, 3))
    for dtype, shape, by in product(masks.DTYPES, shapes, (0, 1)):
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x = (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
        residual, grad = torch.randn(2, *shape).to(dtype)
        scale, shift = torch.randn(2, shape[1]).to(dtype)
        yield Case(OPS["relu_mask"], (x, scale, shift, None, 0.0, math.inf), by)
        yield Case(OPS["relu_mask_"], (x, scale, shift, residual, 0.0, 6.0), by)
        _, mask = OPS["relu_mask"].reference(x, None, None, None, 0.0, math.inf)
        for last in (True, False):
            yield Case(
                OPS["relu_mask_backward"], (grad, mask, scale, 0.0, "standard", True, last), by
            )


def _flags() -> Iterator[Case]:
    for size, by in product((*range(1, 70), 4095, 4096, 4097), (0, 1, 8, 15)):
        yield Case(OPS["pack_mask"], (torch.rand(size) < 0.5,), by)


def _numbers() -> Iterator[Case]:
    for size, by in product((*range(1, 70), 4095, 4096, 4097), (0, 1, 8, 15)):
        numbers = torch.randn(size).relu().to(masks.DTYPES[size % 4])
        yield Case(OPS["pack_mask"], (numbers,), by)


def _noise() -> Iterator[Case]:
    sizes = (1, 2, 3, 4, 5, 7, 8, 31, 64, 1023, 1024, 1025, 4100)
    firsts = (0, 1, 2, 3, 4, 5, 4003, 2**33 + 2)
    sigma, seed = torch.tensor([0.1, 2.0]).double(), torch.tensor([5, -7])
    example, sample = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 2, 3, 2**31 - 1])
    dtypes = (torch.float32, torch.float64)
    for dtype, size, first, by in product(dtypes, sizes, firsts, (0, 1)):
        x = torch.randn(2, size, dtype=dtype)
        args = (x, sigma, seed, example, sample, size % 2 == 0, first)
        yield Case(OPS["noise_points"], args, by)


def _percentiles() -> Iterator[Case]:
    shapes = ((1, 1), (3, 1), (1, 2), (2, 511), (5, 512), (2, 513), (3, 8191), (2, 8192), (2, 8193),
              (1, 40_000), (4, 3))  # fmt: skip
    for dtype, (rows, numel) in product((torch.float32, torch.float64), shapes):
        normal = torch.randn(rows, numel, dtype=dtype)
        infinite = normal.clone()
        infinite[:, 0] = math.inf
        sparse = normal * (torch.rand(rows, numel) < 0.1)
        few = torch.randint(-2, 3, (rows, numel)).to(dtype)
        kinds = (normal, infinite, sparse, few, torch.full_like(normal, -1.5))
        for values, percentile in product(kinds, (0.0, 50.0, 99.0, 100.0)):
            yield Case(OPS["magnitude_percentile"], (values, percentile), numel % 2)


def racing() -> list[Case]:
    """Percentiles by two blocks of a row, which add to all of its counters, again and again."""
    order = torch.arange(30_000) * 7919 % 30_000
    values = torch.logspace(-37, 37, 30_000)[order].view(2, -1)
    return 6 * [Case(OPS["magnitude_percentile"], (values, 50.0))]


def further() -> Iterator[Case]:
    """All of them, drawn from one fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for cases in (_masks, _channels_last, _flags, _noise, _percentiles, _numbers):
            yield from cases()
