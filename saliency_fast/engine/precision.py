"""What a precision costs a map, measured by a few of its points' gradients in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Accumulators, norm_of
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.recipe import Level, Recipe, Rows, Source

ROOM = 2.0**10
"""What the largest gradient at the input is scaled to, in float16: a 64th of what overflows, since
gradients inside of the model may be larger."""
ALIKE = 2.0
"""The ratio of two errors that are alike, and of what is allowed to one that is well below it."""
LEAST_SCALE, MOST_SCALE = 2.0**-24, 2.0**15
"""The cotangent itself must fit float16."""


@dataclass(frozen=True)
class PrecisionError:
    """How far the maps of a few points in a half type are from those in float32.

    Args:
        examples: int64 [E], those that were measured.
        gap: float64 [E, K], the L2 distance of their maps.
        norm: float64 [E, K], of the maps in float32.
        underflow: The share of gradients that became zero.
        other: The relative error of examples that were not measured, unless their largest.
    """

    examples: Tensor
    gap: Tensor
    norm: Tensor
    underflow: float = 0.0
    other: float | None = None

    def of(self, whole: Tensor) -> Tensor:
        """Relative L2 float64 [B, K], for whole maps of the norms `whole` [B, K].

        A few points average less than all do, so this is more than the truth, as a rule.
        """
        norm = torch.maximum(self.norm, whole[self.examples])
        relative = self.gap / norm.clamp_min(torch.finfo(torch.float64).tiny)
        other = relative.max() if self.other is None else relative.new_tensor(self.other)
        error = torch.ones_like(whole) * other
        error[self.examples] = relative
        return error


@dataclass
class PrecisionErrors:
    """A cache of what a precision cost in the calls so far. steady: whether the last two errors
    were alike, and half of what is allowed at most.
    """

    last: float | None = None
    underflow: float = 0.0
    since: int = 0
    steady: bool = False

    def cached(
        self,
        points: int,
        maps: int,
        device: torch.device,
        config: EngineConfig,
        *,
        rarely: bool = False,
    ) -> PrecisionError | None:
        """The error of a call of so many points; None where it is to be measured again. rarely: as
        launches are captured, beside which measurements take longer than all points.
        """
        self.since += points
        rarely = rarely and self.steady
        many = points >= config.precision_alone and not rarely
        many |= self.since >= (config.precision_rarely if rarely else config.precision_every)
        if self.last is None or many:
            return None
        return everywhere(self.last, maps, device, self.underflow)

    def note(self, error: Tensor, underflow: float, limit: float = math.inf) -> None:
        before, self.last = self.last, float(error.max())
        low, high = sorted((math.inf if before is None else before, self.last))
        self.steady = high <= ALIKE * low and ALIKE * high <= limit
        self.underflow, self.since = underflow, 0


def everywhere(
    error: float, maps: int, device: torch.device, underflow: float = 0.0
) -> PrecisionError:
    """The same relative error for all examples, where none was measured."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    empty = torch.zeros(0, maps, dtype=torch.float64, device=device)
    return PrecisionError(none, empty, empty, underflow, error)


def measured_points(recipe: Recipe, batch: int, config: EngineConfig) -> tuple[int, int]:
    """How many examples of a call are measured, and how many points of each."""
    examples = min(batch, max(1, recipe.count * batch // config.precision_every))
    return examples, min(config.precision_nodes, recipe.measured.levels[0].count)


def spread(level: Level, examples: Tensor, count: int) -> Rows:
    """`count` points of each example, from one end of the path to the other: what half types lose
    is often lost near the baseline, where layers normalise what hardly varies.
    """
    order = level.node.argsort()
    last = max(1, count - 1)
    chosen = order[torch.arange(count, device=order.device) * (len(order) - 1) // last]
    if count == 1:
        chosen = order[len(order) // 2 :][:1]
    point, example = chosen.repeat_interleave(len(examples)), examples.repeat(count)
    return Rows(example, level.node[point], level.weight[point], level.replicate[point])


def compared(
    totals: Accumulators,
    inputs: Inputs,
    source: Source,
    rows: Rows,
    half: tuple[list[Inputs], float],
    exact: list[Inputs],
) -> PrecisionError:
    """What separates gradients in a half type, with their scale, from exact ones.

    rows: as many points of each example, points outermost.
    """
    examples, maps_of = torch.unique(rows.example, return_inverse=True)
    each, recipe = len(rows.example) // len(examples), totals.recipe
    ones = replace(
        rows, weight=torch.ones_like(rows.weight), replicate=torch.zeros_like(rows.replicate)
    )
    # One replicate, whose map is the sum of its rows. A few points have no variance of their own;
    # that of many comes from squares.
    kind = "square" if recipe.reduction == "variance" else recipe.reduction
    one, maps = recipe.levels[:1], list[Inputs]()
    plain = replace(recipe, levels=one, tolerance=None, refinement=None, at_input=True)
    plain = replace(plain, reduction=kind)
    for gradients, scale in (half, (exact, 1.0)):
        few = (inputs, totals.baselines, totals.maps, totals.prefix, examples)
        part = Accumulators(plain, *few)
        part.add(ones, gradients, source, scale, maps_of)
        maps.append(part.estimate().values)
    shape = (len(examples), totals.maps)
    gaps = tuple(mine - theirs for mine, theirs in zip(*maps, strict=True))
    gap, norm = [norm_of(one).view(shape) / each for one in (gaps, maps[1])]
    return PrecisionError(examples, gap, norm, _underflow(half[0], exact))


def first_scale(exact: Sequence[Inputs]) -> float:
    """The power of two that brings the largest of these gradients to `ROOM`."""
    largest = max(float(one.abs().max()) for gradients in exact for one in gradients)
    if not 0.0 < largest < math.inf:
        return 1.0
    return min(max(2.0 ** math.floor(math.log2(ROOM / largest)), LEAST_SCALE), MOST_SCALE)


def finite(gradients: Sequence[Inputs]) -> Tensor:
    """Whether no gradient is infinite or NaN, as a bool scalar; one pass over them."""
    # A sum that overflows float32 is taken for one: the scale is too large then, too.
    sums = torch.stack([one.sum(dtype=torch.float32) for part in gradients for one in part])
    return sums.isfinite().all()


def _underflow(half: Sequence[Inputs], exact: Sequence[Inputs]) -> float:
    lost = seen = 0
    for mine, theirs in zip(half, exact, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            there = b != 0
            seen += int(there.sum())
            lost += int((there & (a == 0)).sum())
    return lost / seen if seen else 0.0
