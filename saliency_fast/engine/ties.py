"""Ties: what of a call's maps hangs on values that are equal up to rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.plan import MARGIN, Plan
from saliency_fast.engine.recipe import Recipe
from saliency_fast.engine.way import Model, function_of
from saliency_fast.model.preserve import uncompiled
from saliency_fast.model.ties import Ties, may_tie

SHARED, LEAST = 128, 32
"""Points of a call for each example that is looked at, and of calls in which one is; one is in a
first call of a kind. A point as it is takes as long as three or four in a launch. In float64 all
examples are looked at."""


@dataclass(frozen=True)
class Tied:
    """share [B]: of the gradient at a point of each example, what passes ties; NaN where nobody
    looked. rounded: the largest share of ties that rounding decides. apart: whether points
    must go through the model one by one: PyTorch's kernels round rows of a batch otherwise than one
    alone, and rounding may decide, in pools as in sorts, rectifiers of differences and `where`.
    """

    share: Tensor
    rounded: float = 0.0
    apart: bool = False

    @classmethod
    def of_all(cls, several: list[Tied]) -> Tied | None:
        """The mean over several baselines."""
        if not several:
            return None
        share = torch.stack([one.share for one in several]).mean(0)
        apart = any(one.apart for one in several)
        return cls(share, max(one.rounded for one in several), apart)


def find_ties(
    model: Model, call: Call, recipe: Recipe, baselines: Inputs, plan: Plan, maxima: list[bool]
) -> Tied | None:
    """Looks at one point of some examples by the model as it is; None where that would cost more
    than it is worth, and for methods that are no sum over points. maxima: whether the model takes
    any, empty until that is known.
    """
    exact = torch.float64 in call.dtypes
    affordable = 2 * MARGIN * plan.saved_before <= plan.budget
    summed = recipe.gradients and recipe.rules is None and recipe.rounds is None
    count = recipe.count * call.batch
    few = int(not maxima or count >= LEAST)
    many = call.batch if exact else max(count // SHARED, few)
    if not (summed and affordable and many):
        return None
    share = torch.full((call.batch,), math.nan, dtype=torch.float64, device="cpu")
    if maxima == [False] and not exact:
        return Tied(share.zero_())
    level, source = recipe.levels[0].to(call.device), recipe.family.bind(call.inputs, baselines)
    order = level.place.argsort()
    spots = [int(order[level.count // 2])]
    if exact and level.count > 1 and float(level.place[order[0]]) == 0.0:
        # At the baseline all may be flat.
        spots.append(int(order[0]))
    largest, apart = 0.0, False
    for example in range(call.batch):
        item = torch.full((1,), example, device=call.device)
        several = [source.write(level.rows(item, spot, spot + 1)) for spot in spots]
        tying = [may_tie(points) for points in several]
        # On the way: by pools, sorts, rectifiers of differences, where() and whatever else chooses.
        apart |= exact and tying[0]
        if not any(tying) or maxima == [False]:
            share[example] = 0.0
        elif many > 0:
            many, share[example] = many - 1, 0.0
            for number, points in enumerate(several):
                if not tying[number]:
                    continue
                tied, rounded = _shares(Ties(model), call, points, item, maxima)
                apart |= exact and rounded > 0
                if number == 0:
                    share[example], largest = tied, max(largest, rounded)
    return Tied(share, largest, apart)


def _shares(
    ties: Ties, call: Call, points: Inputs, item: Tensor, maxima: list[bool]
) -> tuple[float, float]:
    """The shares of the gradient at a point that pass ties, and ties that rounding decides."""
    try:
        with uncompiled():
            function_of(ties, call).gradients(points, item)
    except (RuntimeError, MemoryError):
        # What is not known is not told; the launches say what fails.
        return math.nan, 0.0
    maxima[:] = [ties.met]
    return ties.shares()
