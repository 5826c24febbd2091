"""Occlusion: the change of the score where a sliding window hides the input."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.windows import Grid, check_whole, hierarchy, read_windows
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import window_points

Window = int | tuple[int, ...] | tuple[int | tuple[int, ...] | None, ...] | None


@dataclass(frozen=True)
class Occlusion:
    """Score less the score with a window of the input at its baseline (Zeiler, 2014).

    Each element gets the mean over the windows that cover it. The last window of an axis is cut at
    the edge.

    Args:
        window: Size of the window in elements: an int for every spatial axis, one int per spatial
            axis (a window covers all channels) or per axis behind the batch, or a tuple of these
            per input. None is an eighth of each axis, or a 64th of the only spatial axis.
        stride: Step of the window, in the same forms. None is half of the window.
        hierarchy: Levels of coarser windows that are evaluated first, each twice as wide per axis.
            Effects that cancel out in a coarse window are missed.
        keep: Share of the coarse windows, those with the largest effects, that are split into finer
            ones; the effects of the others are spread evenly over theirs.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.Occlusion(window=2, stride=1)
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[3., 4., 5.]])
    """

    window: Window = None
    stride: Window = None
    hierarchy: int = 0
    keep: float = 0.25
    name = "occlusion"

    def __post_init__(self) -> None:
        check_whole("window", self.window)
        check_whole("stride", self.stride)
        checks.whole("hierarchy", self.hierarchy, 0)
        checks.positive("keep", self.keep)
        if self.keep > 1:
            raise InputError(f"keep is a share, at most 1: got {self.keep}")

    def recipe(self) -> Recipe:
        rounds = partial(occlusion_rounds, method=self)
        return RoundsRecipe(rounds, self.points, baseline="fill", gradients=False)

    def points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        """Windows of an example, the most where there is a hierarchy."""
        total = 0
        for grid in read_windows(self.window, self.stride, layouts):
            levels = hierarchy(grid, self.hierarchy)[::-1]
            total += (evaluated := levels[0].count)
            for coarse, fine in itertools.pairwise(levels):
                axes = sum(n > m for n, m in zip(fine.shape, coarse.shape, strict=True))
                split = math.ceil(self.keep * evaluated) * 2**axes
                total += (evaluated := min(fine.count, split))
        return total


def occlusion_rounds(context: RoundContext, method: Occlusion) -> Rounds:
    """One round for each level of windows, coarse levels first."""
    device, shape = context.scores.device, context.scores.shape
    grids = read_windows(method.window, method.stride, context.layouts)
    each = [hierarchy(grid.to(device), method.hierarchy) for grid in grids]
    coarse: tuple[Grid, ...] = ()
    chosen: list[Tensor] = []
    effects: list[Tensor] = []
    for level in reversed(list(zip(*each, strict=True))):
        if not coarse:
            chosen = [torch.ones(shape[0], g.count, dtype=torch.bool, device=device) for g in level]
            effects = [context.scores.new_zeros(*shape, g.count) for g in level]
        else:
            parents = [one.parents() for one in level]
            parts = list(zip(coarse, level, parents, effects, chosen, strict=True))
            chosen = [_largest(e, own, method.keep)[:, p] for _, _, p, e, own in parts]
            # The effect of a window that stays whole is spread evenly over its elements.
            effects = [e[..., p] * (g.volume() / c.volume()[p]) for c, g, p, e, _ in parts]
        yield _round(context, level, chosen, effects)
        coarse = level
    values = []
    for x, grid, effect in zip(context.inputs, coarse, effects, strict=True):
        # Scores of inputs that are whole numbers keep all their digits.
        dtype = x.dtype if x.is_floating_point() else torch.float64
        values.append(grid.mean(effect.view(*shape, *grid.shape), tuple(x.shape[1:])).to(dtype))
    return Maps(tuple(values))


def _round(
    context: RoundContext, grids: tuple[Grid, ...], chosen: list[Tensor], effects: list[Tensor]
) -> Round:
    """Points without the chosen windows [B, n] of each input, whose effects go to `effects`
    [B, K, n]. Windows are numbered on from input to input.
    """
    firsts = [0, *itertools.accumulate(own.shape[1] for own in chosen)][:-1]
    pairs = [own.T.nonzero().unbind(1) for own in chosen]
    window = torch.cat([own + first for (own, _), first in zip(pairs, firsts, strict=True)])
    example = torch.cat([own for _, own in pairs])

    def write(example: Tensor, window: Tensor) -> Inputs:
        points = []
        parts = zip(context.inputs, context.baselines, grids, firsts, strict=True)
        for x, baseline, grid, first in parts:
            start, stop = grid.boxes((window - first).clamp(0, grid.count - 1))
            # Windows of other inputs leave this one whole.
            own = (window >= first) & (window < first + grid.count)
            stop = torch.where(own[:, None], stop, start)
            points.append(window_points(x, baseline, example, start, stop))
        return tuple(points)

    def each(rows: slice, result: RoundResult) -> None:
        lost = context.scores[example[rows]] - result.scores
        for effect, first in zip(effects, firsts, strict=True):
            index = window[rows] - first
            own = (index >= 0) & (index < effect.shape[2])
            effect[example[rows][own], :, index[own]] = lost[own]

    return Round(write, example, window, each=each)


def _largest(effect: Tensor, chosen: Tensor, share: float) -> Tensor:
    """The share of the chosen windows bool [B, n] with the largest effect [B, K, n] for any target.

    Effects are relative to the largest one of their target.
    """
    size = effect.abs()
    tiny = torch.finfo(size.dtype).tiny
    weight = (size / size.amax(2, keepdim=True).clamp_min(tiny)).amax(1)
    order = torch.where(chosen, weight, -1.0).argsort(dim=1, descending=True, stable=True)
    wanted = (share * chosen.sum(1, keepdim=True)).ceil()
    rank = torch.arange(chosen.shape[1], device=order.device)
    return torch.zeros_like(chosen).scatter(1, order, rank < wanted)
