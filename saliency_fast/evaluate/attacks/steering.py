"""Steering: how inputs must move for their map to move, by second derivatives of a smooth model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.points import Line, Noise
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    Rows,
    WeightedSum,
)
from saliency_fast.rules import Softplus

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly however many they are."""


def steerable(recipe: Recipe) -> TypeGuard[WeightedSum]:
    """Whether maps are sums of gradients whose points follow the input in a known way."""
    return (
        isinstance(recipe, WeightedSum)
        and recipe.rules is None
        and recipe.reduction == "sum"
        and recipe.factor in ("none", "input", "difference")
        and isinstance(recipe.family, (Line, Noise))
    )


@dataclass(frozen=True, eq=False)
class Steering:
    """A method whose map is the gradient, at the input, of another's map times `direction`.

    of: the recipe of that map, which must be `steerable`. direction [B, C | 1, *]. points: of the
    recipe's own, so many are taken, others for each `turn`. softplus: the steepness of the softplus
    functions that stand in ReLU's place, since its second derivative is zero (Dombrowski, 2019).
    """

    of: WeightedSum
    direction: Tensor
    points: int
    turn: int
    softplus: float
    name = "steering"

    def recipe(self) -> Recipe:
        baseline = "none" if self.of.baseline == "none" else "fill"
        rules = Softplus(self.softplus)
        return RoundsRecipe(self._rounds, self._count, baseline=baseline, rules=rules, second=True)

    @property
    def _count(self) -> int:
        return min(self.points, self.of.levels[0].count)

    def _rounds(self, asked: RoundContext) -> Rounds:
        (x,), (start,) = asked.inputs, asked.baselines
        factor = {"none": torch.ones_like(x[:1]), "input": x, "difference": x - start}
        push = (self.direction.to(x) * factor[self.of.factor]).expand_as(x)
        source = self.of.family.bind(asked.inputs, asked.baselines)
        level = self.of.levels[0].to(x.device)
        spread = torch.arange(self._count, device=x.device) + (self.turn * GOLDEN) % 1.0
        chosen = (spread * (level.count / self._count)).long().clamp_max(level.count - 1)
        weight = level.weight[chosen] / level.weight[chosen].sum()
        # A point on the line to the input follows it by alpha, a noisy copy as a whole.
        follows = weight * level.place[chosen] if self.of.family.straight else weight
        moved, total = torch.zeros_like(x), torch.zeros_like(x)
        item = torch.arange(len(x), device=x.device).repeat(self._count)
        number = torch.arange(self._count, device=x.device).repeat_interleave(len(x))

        def write(item: Tensor, number: Tensor) -> Inputs:
            at = chosen[number]
            return source.write(Rows(item, level.place[at], level.weight[at], level.fold[at]))

        def projected(grads: Inputs, item: Tensor) -> Tensor:
            return (grads[0] * push[item]).flatten(1).sum(1, keepdim=True)

        def each(rows: slice, found: RoundResult) -> None:
            _, _, gradient, product = found.grads[0]
            for sums, parts, by in ((moved, product, follows), (total, gradient, weight)):
                scaled = parts * by[number[rows]].to(x).view(-1, *(1,) * (x.dim() - 1))
                sums.index_add_(0, item[rows], scaled.to(x))

        yield Round(write, item, number, project=projected, each=each)
        if self.of.factor != "none":
            # The factor follows the input, too.
            moved = moved + self.direction.to(x) * total
        return Maps((moved[:, None],))
