"""Finish: from accumulated gradients to attributions, their sums and their maps, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define

REDUCTIONS = ("none", "sum", "absmax", "l2")


def _finish(
    total: Tensor, x: Tensor | None, baseline: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    values = total.clone(memory_format=torch.contiguous_format)
    if x is not None:
        length = x if baseline is None else x - baseline
        values = values * length.repeat_interleave(len(total) // len(x), dim=0).to(total.dtype)
    sums = values.double().flatten(1).sum(1)
    if reduction == "sum":
        values = values.sum(1)
    elif reduction == "absmax":
        values = values.abs().amax(1)
    elif reduction == "l2":
        values = values.square().sum(1).sqrt()
    elif reduction != "none":
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    return values, sums


def _fake(
    total: Tensor, x: Tensor | None, baseline: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    shape = total.shape if reduction == "none" else (total.shape[0], *total.shape[2:])
    return total.new_empty(shape), total.new_empty(total.shape[0], dtype=torch.float64)


def _samples() -> Iterator[Sample]:
    dtypes, shapes = (torch.float32, torch.float64), ((1, 1), (3, 5, 7), (2, 4099), (5, 1031))
    for reduction, dtype, shape in product(REDUCTIONS, dtypes, shapes):
        total, x = torch.randn(4, *shape).to(dtype), torch.randn(2, *shape).to(dtype)
        yield Sample((total, None, None, reduction))
        yield Sample((total, x, None, reduction))
        yield Sample((total, x, x.flip(0), reduction))
        yield Sample((total, x, x[:1], reduction))


finish = define(
    schema="finish(Tensor total, Tensor? x, Tensor? baseline, str reduction) -> (Tensor, Tensor)",
    reference=_finish,
    fake=_fake,
    samples=_samples,
    triton="finish",
)
"""finish(total [S, C, *], x [B, C, *] | None, baseline [B | 1, C, *] | None, reduction) ->
(values, sums float64 [S]): multiplies by x - baseline (by x where baseline is None; S is a
multiple of B, slots of one example together) and sums each slot for completeness. reduction
"none" returns values [S, C, *]; "sum", "absmax" and "l2" reduce the channels: [S, *]."""
