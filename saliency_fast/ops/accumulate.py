"""Accumulate: gradients of a launch folded into float32 (float64 for float64) accumulators.

Row r goes to accumulator slot[r]. Rows are folded in their order, so an element's sum does not
depend on how rows were split into launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from saliency_fast.ops.points import line_elements, random_line, random_line_samples
from saliency_fast.ops.registry import Sample, define, rows_of

KINDS = ("sum", "square", "absolute")
_SHAPES: tuple[tuple[int, ...], ...] = ((1,), (3, 5, 7), (4099,))


def _accumulate(total: Tensor, grads: Tensor, slot: Tensor, weight: Tensor, kind: str) -> None:
    terms = grads.to(total.dtype)
    if kind == "square":
        terms = terms * terms
    elif kind == "absolute":
        terms = terms.abs()
    elif kind != "sum":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    total.index_add_(0, slot, rows_of(weight.to(total.dtype), total.dim()) * terms)


def _samples() -> Iterator[Sample]:
    slot, weight = torch.tensor([0, 2, 2, 0, 1]), torch.rand(5).double() - 0.3
    for kind in KINDS:
        for dtype, shape in product((torch.float32, torch.float64), _SHAPES):
            total, grads = torch.randn(3, *shape).to(dtype), torch.randn(5, *shape).to(dtype)
            yield Sample((total, grads, slot, weight, kind))
        strided = torch.randn(5, 6, 8, 3).permute(0, 3, 1, 2)
        yield Sample((torch.randn(3, 3, 6, 8), strided, slot, weight, kind))
        for half in (torch.float16, torch.bfloat16):
            grads = torch.randn(5, 33).to(half)
            yield Sample((torch.randn(3, 33), grads, slot, weight, kind))


accumulate = define(
    schema="accumulate(Tensor(a!) total, Tensor grads, Tensor slot, Tensor weight, str kind) -> ()",
    reference=_accumulate,
    fake=lambda *_: None,
    samples=_samples,
    triton="accumulate",
)
"""accumulate(total [S, *], grads [R, *], slot int64 [R], weight float64 [R], kind): adds
weight * g, weight * g**2 or weight * |g| of each row to total[slot], in place."""


def _moments(mean: Tensor, spread: Tensor, count: Tensor, grads: Tensor, slot: Tensor) -> None:
    for row, number in enumerate(slot.tolist()):
        gradient = grads[row].to(mean.dtype)
        count[number] += 1
        before = gradient - mean[number]
        mean[number] += before / count[number].to(mean.dtype)
        spread[number] += before * (gradient - mean[number])


def _moment_samples() -> Iterator[Sample]:
    slot = torch.tensor([0, 2, 2, 0, 1, 2, 2])
    for dtype, shape in product((torch.float32, torch.float64), _SHAPES):
        mean, spread = torch.randn(3, *shape).to(dtype), torch.rand(3, *shape).to(dtype)
        count = torch.tensor([4.0, 0.0, 1.0]).double()
        grads = torch.randn(7, *shape).to(dtype) + 3.0
        yield Sample((mean, spread, count, grads, slot))


accumulate_moments = define(
    schema="accumulate_moments(Tensor(a!) mean, Tensor(b!) spread, Tensor(c!) count,"
    " Tensor grads, Tensor slot) -> ()",
    reference=_moments,
    fake=lambda *_: None,
    samples=_moment_samples,
    triton="accumulate",
)
"""accumulate_moments(mean [S, *], spread [S, *], count float64 [S], grads [R, *], slot int64 [R]):
Welford's update (1962), in place; spread / count is the variance."""


def _random_lines(total: Tensor, grads: Tensor, slot: Tensor, weight: Tensor, *line: Any) -> None:
    start, end, _ = random_line(*line)
    terms = grads.to(total.dtype) * (end - start).to(total.dtype)
    total.index_add_(0, slot, rows_of(weight.to(total.dtype), total.dim()) * terms)


def _random_line_samples() -> Iterator[Sample]:
    slot, weight = torch.tensor([0, 2, 2, 0, 1]), torch.rand(5).double()
    for sample in random_line_samples():
        x = sample.args[0]
        total, grads = torch.randn(3, *x.shape[1:]).to(x), torch.randn(5, *x.shape[1:]).to(x)
        yield Sample((total, grads, slot, weight, *sample.args))


accumulate_random_lines = define(
    schema="accumulate_random_lines(Tensor(a!) total, Tensor grads, Tensor slot,"
    " Tensor weight, Tensor x, Tensor baselines, Tensor sigma, Tensor seed, Tensor example,"
    " Tensor sample, int first_element) -> ()",
    reference=_random_lines,
    fake=lambda *_: None,
    samples=_random_line_samples,
    triton="accumulate",
    least=lambda total, grads, slot, weight, x, baselines, *_: (
        grads.numel() * grads.element_size()
        + 2 * total.numel() * total.element_size()
        + (x.numel() + line_elements(x, baselines, grads)) * x.element_size()
    ),
)
"""accumulate_random_lines(total [S, *], grads [R, *], slot, weight [R], then the arguments of
`random_line_points`): adds weight * g * (end - start) of each row's random line to total[slot],
in place. The lines are drawn again, not stored."""
