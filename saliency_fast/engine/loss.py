"""Loss: what a precision costs a map, told by a few of its points' gradients in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.folds import Folds, norm_of
from saliency_fast.engine.recipe import Level, Recipe, Rows, Source

POINTS = 3
"""Points of an example that are looked at."""
EVERY = 128
"""Points of a call for each example that is looked at."""
ALONE = 16
"""Points of a call from which it looks for itself, and does not rely on earlier ones."""
ROOM = 2.0**10
"""What the largest gradient at the input is scaled to, in float16: a 64th of what overflows, since
gradients inside of the model may be larger."""
LEAST_SCALE, MOST_SCALE = 2.0**-24, 2.0**15
"""The cotangent itself must fit float16."""


@dataclass(frozen=True)
class Loss:
    """gap, norm: float64 [E, K] for the examples `among`: the L2 distance of the maps of a few
    points in a half type and in float32, and the norm of the latter. other: the relative error of
    examples that were not looked at, their largest unless given. underflow: the share of gradients
    that became zero.
    """

    among: Tensor
    gap: Tensor
    norm: Tensor
    underflow: float = 0.0
    other: float | None = None

    def error(self, whole: Tensor) -> Tensor:
        """Relative L2 float64 [B, K], for whole maps of the norms `whole` [B, K].

        A few points average less than all do, so this is more than the truth, as a rule.
        """
        norm = torch.maximum(self.norm, whole[self.among])
        found = self.gap / norm.clamp_min(torch.finfo(torch.float64).tiny)
        other = found.max() if self.other is None else found.new_tensor(self.other)
        error = torch.ones_like(whole) * other
        error[self.among] = found
        return error


@dataclass
class Losses:
    """What a precision cost in the calls so far."""

    last: float | None = None
    underflow: float = 0.0
    since: int = 0

    def known(self, points: int, maps: int, device: torch.device) -> Loss | None:
        """What is known for a call of so many points; None where it is to look for itself."""
        self.since += points
        if self.last is None or points >= ALONE or self.since >= EVERY:
            return None
        return everywhere(self.last, maps, device, self.underflow)

    def note(self, error: Tensor, underflow: float) -> None:
        self.last, self.underflow, self.since = float(error.max()), underflow, 0


def everywhere(error: float, maps: int, device: torch.device, underflow: float = 0.0) -> Loss:
    """The same relative error for all examples, where none was looked at."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = torch.zeros(0, maps, dtype=torch.float64, device=device)
    return Loss(none, empty, empty, underflow, error)


def looked_at(recipe: Recipe, batch: int) -> tuple[int, int]:
    """How many examples of a call are looked at, and how many points of each."""
    points = recipe.count * batch
    return min(batch, max(1, points // EVERY)), min(POINTS, recipe.levels[0].count)


def spread(level: Level, examples: Tensor, count: int) -> Rows:
    """`count` points of each example, from one end of the path to the other: what half types lose
    is often lost near the baseline, where layers normalise what hardly varies.
    """
    order = level.place.argsort()
    last = max(1, count - 1)
    chosen = order[torch.arange(count, device=order.device) * (len(order) - 1) // last]
    if count == 1:
        chosen = order[len(order) // 2 :][:1]
    point = chosen.repeat_interleave(len(examples))
    item = examples.repeat(count)
    return Rows(item, level.place[point], level.weight[point], level.fold[point])


def loss_of(
    folds: Folds,
    inputs: Inputs,
    source: Source,
    rows: Rows,
    half: tuple[list[Inputs], float],
    exact: list[Inputs],
) -> Loss:
    """What separates gradients in a half type, with their scale, from exact ones.

    rows: as many points of each example, points outermost.
    """
    among, place = torch.unique(rows.item, return_inverse=True)
    each = len(rows.item) // len(among)
    ones = replace(rows, weight=torch.ones_like(rows.weight), fold=torch.zeros_like(rows.fold))
    maps: list[Inputs] = []
    for grads, scale in (half, (exact, 1.0)):
        recipe = _alone(folds.recipe)
        part = Folds(recipe, inputs, folds.baselines, folds.maps, folds.hoist, among)
        part.add(ones, grads, source, scale, place)
        maps.append(part.estimate().values)
    shape = (len(among), folds.maps)
    gaps = tuple(mine - theirs for mine, theirs in zip(*maps, strict=True))
    gap, norm = [norm_of(one).view(shape) / each for one in (gaps, maps[1])]
    return Loss(among, gap, norm, _underflow(half[0], exact))


def _alone(recipe: Recipe) -> Recipe:
    """A recipe whose map is what its rows add up to, in one fold."""
    # A few points have no variance of their own; that of many comes from squares.
    kind = "square" if recipe.reduction == "variance" else recipe.reduction
    levels = recipe.levels[:1]
    return replace(recipe, levels=levels, tolerance=None, at_input=True, reduction=kind)


def first_scale(exact: Sequence[Inputs]) -> float:
    """The power of two that brings the largest of these gradients to `ROOM`."""
    largest = max(float(one.abs().max()) for grads in exact for one in grads)
    if not 0.0 < largest < math.inf:
        return 1.0
    return min(max(2.0 ** math.floor(math.log2(ROOM / largest)), LEAST_SCALE), MOST_SCALE)


def finite(grads: Sequence[Inputs]) -> bool:
    """Whether no gradient is infinite or NaN; one pass over them, on their device."""
    # A sum that overflows float32 is taken for one: the scale is too large then, too.
    sums = torch.stack([one.sum(dtype=torch.float32) for part in grads for one in part])
    return bool(sums.isfinite().all())


def _underflow(half: Sequence[Inputs], exact: Sequence[Inputs]) -> float:
    lost = seen = 0
    for mine, theirs in zip(half, exact, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            there = b != 0
            seen += int(there.sum())
            lost += int((there & (a == 0)).sum())
    return lost / seen if seen else 0.0
