"""Rows and accumulators of maps: examples [B] with K targets each, in S = B * K slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import RoundContext


def every_row(context: RoundContext, count: int) -> tuple[Tensor, Tensor]:
    """(example, number) int64 of `count` points of every example, points outermost."""
    batch = len(context.inputs[0])
    row = torch.arange(batch * count, device=context.inputs[0].device)
    return row % batch, row // batch


def at_inputs(context: RoundContext) -> Callable[[Tensor, Tensor], Inputs]:
    return lambda example, _: tuple(x[example] for x in context.inputs)


def on_lines(context: RoundContext) -> Callable[[Tensor, Tensor], Inputs]:
    """Writes the points baseline + alpha (x - baseline)."""
    ends = list(zip(context.inputs, context.baselines, strict=True))
    return lambda example, alpha: tuple(
        ops.line_points(x, baseline, example, alpha) for x, baseline in ends
    )


def accumulators(tensors: Inputs, slots: int) -> Inputs:
    """Accumulators of zeros [slots, *] for tensors [R, *], float32 at least."""
    return tuple(
        torch.zeros(
            (slots, *one.shape[1:]),
            dtype=torch.float64 if one.dtype == torch.float64 else torch.float32,
            device=one.device,
        )
        for one in tensors
    )


def by_example(totals: Inputs, targets: int) -> Inputs:
    """Accumulators [B * K, *] as values [B, K, *]."""
    return tuple(one.view(-1, targets, *one.shape[1:]) for one in totals)


def unknown_error(context: RoundContext) -> Tensor:
    """The error [B, K] of maps for which there is no estimate: NaN."""
    return torch.full_like(context.scores, torch.nan)
