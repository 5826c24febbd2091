"""Occlusion: what the score loses where a sliding window hides the input."""

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
from saliency_fast.model.axes import Layouts
from saliency_fast.ops import window_points

Window = int | tuple[int, ...] | tuple[int | tuple[int, ...] | None, ...] | None


@dataclass(frozen=True)
class Occlusion:
    """The score less the score with a window of the input at its baseline; each element gets the
    mean over the windows that cover it (Zeiler, 2014).

    window, stride: a number for every spatial axis, one number per spatial axis (channels go
    together) or per axis behind the batch, or a tuple of these per input. None is an eighth of each
    axis, a 64th of the only one of a series or a table, and half of the window. The last window of
    an axis is cut at the edge.

    hierarchy: levels of coarser windows that are looked at first, each twice as wide per axis; only
    the share `keep` of them with the largest effects is split into finer ones, and the others'
    effects are spread evenly over theirs. Small effects that cancel out in a coarse window are
    missed.
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
        rounds = partial(occluded, method=self)
        return RoundsRecipe(rounds, self.points, baseline="fill", gradients=False)

    def points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        """Windows of an example, the most where there is a hierarchy."""
        total = 0
        for grid in read_windows(self.window, self.stride, layouts):
            levels = hierarchy(grid, self.hierarchy)[::-1]
            total += (looked := levels[0].count)
            for coarse, fine in itertools.pairwise(levels):
                axes = sum(n > m for n, m in zip(fine.shape, coarse.shape, strict=True))
                split = math.ceil(self.keep * looked) * 2**axes
                total += (looked := min(fine.count, split))
        return total


def occluded(asked: RoundContext, method: Occlusion) -> Rounds:
    """The rounds of occlusion: one, or one for each level of windows, coarse ones first."""
    device, batch = asked.scores.device, len(asked.scores)
    grids = read_windows(method.window, method.stride, asked.layouts)
    each = [hierarchy(grid.to(device), method.hierarchy) for grid in grids]
    levels = list(zip(*each, strict=True))
    coarse: tuple[Grid, ...] = ()
    chosen: list[Tensor] = []
    effects: list[Tensor] = []
    for level in reversed(levels):
        if not coarse:
            chosen = [
                torch.ones(batch, one.count, dtype=torch.bool, device=device) for one in level
            ]
            effects = [asked.scores.new_zeros(*asked.scores.shape, one.count) for one in level]
        else:
            parents = [one.parents() for one in level]
            parts = list(zip(coarse, level, parents, effects, chosen, strict=True))
            chosen = [_largest(e, own, method.keep)[:, p] for _, _, p, e, own in parts]
            # The effect of a window that stays whole is spread evenly over its elements.
            effects = [e[..., p] * (g.volume() / c.volume()[p]) for c, g, p, e, _ in parts]
        yield _round(asked, level, chosen, effects)
        coarse = level
    values = tuple(
        grid.mean(effect.view(*asked.scores.shape, *grid.shape), tuple(x.shape[1:])).to(
            # Scores of inputs that are whole numbers keep all their digits.
            x.dtype if x.is_floating_point() else torch.float64
        )
        for x, grid, effect in zip(asked.inputs, levels[0], effects, strict=True)
    )
    return Maps(values)


def _round(
    asked: RoundContext, grids: tuple[Grid, ...], chosen: list[Tensor], effects: list[Tensor]
) -> Round:
    """Points without the chosen windows [B, n] of each input; `effects` [B, K, n] takes answers."""
    first, pairs = 0, []
    firsts = []
    for own in chosen:
        place, item = own.T.nonzero().unbind(1)
        pairs.append((place + first, item))
        firsts.append(first)
        first += own.shape[1]
    place, item = (torch.cat(one) for one in zip(*pairs, strict=True))

    def write(item: Tensor, place: Tensor) -> Inputs:
        found = []
        for x, fill, grid, before in zip(asked.inputs, asked.baselines, grids, firsts, strict=True):
            start, stop = grid.boxes((place - before).clamp(0, grid.count - 1))
            # Windows of other inputs leave this one whole.
            own = (place >= before) & (place < before + grid.count)
            found.append(
                window_points(x, fill, item, start, torch.where(own[:, None], stop, start))
            )
        return tuple(found)

    def each(rows: slice, found: RoundResult) -> None:
        lost = asked.scores[item[rows]] - found.scores
        for effect, before in zip(effects, firsts, strict=True):
            index = place[rows] - before
            own = (index >= 0) & (index < effect.shape[2])
            effect[item[rows][own], :, index[own]] = lost[own]

    return Round(write, item, place, each=each)


def _largest(effect: Tensor, chosen: Tensor, share: float) -> Tensor:
    """Of the chosen windows [B, n] the share whose effect [B, K, n] is the largest for any target,
    relative to the largest of that target.
    """
    size = effect.abs()
    tiny = torch.finfo(size.dtype).tiny
    weight = (size / size.amax(2, keepdim=True).clamp_min(tiny)).amax(1)
    order = torch.where(chosen, weight, -1.0).argsort(dim=1, descending=True, stable=True)
    wanted = (share * chosen.sum(1, keepdim=True)).ceil()
    return torch.zeros_like(chosen).scatter(
        1, order, torch.arange(chosen.shape[1], device=order.device) < wanted
    )
