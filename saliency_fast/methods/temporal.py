"""Temporal saliency rescaling: which steps matter, and within these which features."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Accumulators
from saliency_fast.engine.recipe import (
    Maps,
    Method,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    Rows,
    WeightedSum,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.neighbours import unknown
from saliency_fast.model.axes import Layouts


@dataclass(frozen=True)
class TemporalRescaling:
    """How much the map of a method changes when a step is masked, times how much when one of its
    features is (Ismail, 2020). For a series [B, T, F], or [B, F, T] with `axis` 2.

    base: a method, or its name, whose maps are sums of gradients. above: the quantile of the steps'
    relevance from which on features are told apart; values of other steps are zero. What is masked
    takes the baseline's value. Costs T + (1 - above) T F maps of the base.
    """

    base: Method | str = "gradient"
    axis: int = 1
    above: float = 0.55
    name = "temporal_rescaling"

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or self.axis not in (1, 2):
            raise InputError(f"axis must be 1 or 2, that of time: got {self.axis!r}")
        checks.share("above", self.above)
        base = self._base()
        sums = isinstance(base, WeightedSum) and base.rules is None and base.baseline != "set"
        if not sums or len(base.levels) > 1 or hasattr(base.family, "start"):
            raise InputError(
                "base must be a gradient, InputXGradient, IntegratedGradients without a tolerance, "
                f"SmoothGrad or one of its kin: got {self.base!r}"
            )

    def _base(self) -> WeightedSum:
        from saliency_fast.methods import read_method

        return cast(WeightedSum, read_method(self.base).recipe())

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self._points, baseline="fill")

    def _points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        """About how many an example gets."""
        if len(inputs) != 1 or inputs[0].dim() != 3:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise InputError(
                f"temporal rescaling takes one series [B, T, F]: got {shapes}; pass what is none "
                "through forward_args"
            )
        steps, others = inputs[0].shape[self.axis], inputs[0].shape[-self.axis]
        maps = 2 + steps + (1.0 - self.above) * steps * others
        return math.ceil(maps) * self._base().count

    def _rounds(self, asked: RoundContext) -> Rounds:
        series = _Series(asked, self._base(), self.axis)
        batch, steps, features = series.x.shape
        every = torch.ones(batch, steps, dtype=torch.bool, device=series.x.device)
        times = yield from series.changes(every, range(1))
        least = times.quantile(self.above, dim=2, keepdim=True)
        chosen = times >= least if self.above == 0 else times > least
        each = yield from series.changes(chosen.any(1), range(1, features + 1))
        values = times[..., None] * each.view(*times.shape, features) * chosen[..., None]
        values = values.to(series.x.dtype)
        error = None if series.base.at_input else unknown(asked)
        return Maps((values if self.axis == 1 else values.mT,), error)


@dataclass
class _Series:
    """Maps of copies of a series in which a step, or one feature of it, is masked."""

    asked: RoundContext
    base: WeightedSum
    axis: int

    @property
    def x(self) -> Tensor:
        """[B, T, F]"""
        return self._steps_first(self.asked.inputs[0])

    def _steps_first(self, x: Tensor) -> Tensor:
        return x if self.axis == 1 else x.mT

    def changes(self, steps: Tensor, masks: range) -> Generator[Round | Maps, RoundResult, Tensor]:
        """L1 change of the map for each mask of the steps [B, T]: float64 [B, K, T * masks]. Mask 0
        is the whole step, mask f its feature f - 1; zero where `steps` is False.
        """
        batch, count = steps.shape
        # Maps of this many variants are held beside each launch.
        maps, size = self.asked.scores.shape[1], max(1, self.asked.size // 4)
        device = steps.device
        whole = yield from self._maps(torch.arange(batch, device=device), self.x)
        whole = whole.view(batch, maps, -1)
        found = torch.zeros(batch, count, len(masks), maps, dtype=torch.float64, device=device)
        item, step = steps.nonzero(as_tuple=True)
        item, step = (one.repeat_interleave(len(masks)) for one in (item, step))
        mask = torch.arange(masks.start, masks.stop, device=device)
        mask = mask.repeat(len(item) // len(masks))
        for start in range(0, len(item), size):
            one, at, which = (column[start : start + size] for column in (item, step, mask))
            part = yield from self._maps(one, self._masked(one, at, which))
            change = (part.view(len(one), maps, -1) - whole[one]).abs().sum(2, dtype=torch.float64)
            found[one, at, which - masks.start] = change
        return found.flatten(1, 2).mT

    def _masked(self, item: Tensor, step: Tensor, mask: Tensor) -> Tensor:
        """Copies of the examples `item`, each with a step or one of its features masked."""
        x = self.x[item]
        start = self._steps_first(self.asked.baselines[0])
        start = start[item % len(start)]
        feature = torch.arange(x.shape[2], device=x.device)
        here = (mask == 0)[:, None] | (feature == mask[:, None] - 1)
        row = torch.arange(len(x), device=x.device)
        x[row, step] = torch.where(here, start[row, step], x[row, step])
        return x

    def _maps(self, item: Tensor, x: Tensor) -> Generator[Round | Maps, RoundResult, Tensor]:
        """The base method's maps [V * K, ...] of variants [V, T, F] of the examples `item`."""
        base, inputs = self.base, (self._steps_first(x).contiguous(),)
        start = self.asked.baselines[0]
        baselines: Inputs = (start if len(start) == 1 else start[item],)
        folds = Accumulators(base, inputs, baselines, self.asked.scores.shape[1])
        source, level = base.family.bind(inputs, baselines), base.levels[0].to(x.device)
        number = torch.arange(len(item), device=x.device)
        rows = level.rows(number, 0, level.count * len(item))

        def write(_: Tensor, place: Tensor) -> Inputs:
            columns = (rows.item, rows.place, rows.weight, rows.fold)
            return source.write(Rows(*(one[place] for one in columns)))

        def each(part: slice, found: RoundResult) -> None:
            folds.add(rows.part(part.start, part.stop), found.grads, source)

        place = torch.arange(len(rows.item), device=x.device)
        yield Round(write, item[rows.item], place, gradients=True, each=each)
        return folds.estimate().values[0]
