"""Temporal saliency rescaling: which time steps matter, and which of their features."""

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
    with_fixed_nodes,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import unknown_error
from saliency_fast.model.layout import Layouts


@dataclass(frozen=True)
class TemporalRescaling:
    """Change of a method's map when a time step, and then each feature of it, is masked.

    The value of a feature at a step is the product of both changes (Ismail, 2020), for a series
    [B, T, F], or [B, F, T] with `axis` 2. Masked elements take the baseline's value. Costs
    T + (1 - above) T F maps of the base method.

    Args:
        base: A method, or its name, whose maps are weighted sums of gradients.
        axis: Axis of time, 1 or 2.
        above: Quantile of the steps' relevance above which features are masked one by one; values
            of other steps are zero.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = lambda x: (x**2).sum((1, 2)), torch.rand(2, 5, 3)
        >>> sf.explain(model, x, method=sf.TemporalRescaling(), layout="BTF").values.shape
        torch.Size([2, 5, 3])
    """

    base: Method | str = "gradient"
    axis: int = 1
    above: float = 0.55
    name = "temporal_rescaling"

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or self.axis not in (1, 2):
            raise InputError(f"axis must be 1 or 2, that of time: got {self.axis!r}")
        checks.fields(self, above=checks.fraction)
        base = self._base()
        sums = isinstance(base, WeightedSum) and base.rules is None and base.baseline != "set"
        own_nodes = sums and base.refinement is not None
        if not sums or own_nodes or len(base.levels) > 1 or hasattr(base.family, "start"):
            raise InputError(
                "base must be a gradient, InputXGradient, IntegratedGradients with a fixed rule "
                f"and no tolerance, SmoothGrad or a variant of it: got {self.base!r}"
            )

    def _base(self) -> WeightedSum:
        from saliency_fast.methods import read_method

        return cast(WeightedSum, with_fixed_nodes(read_method(self.base)).recipe())

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self._points, baseline="fill")

    def _points(self, inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
        """About how many points an example gets."""
        if len(inputs) != 1 or inputs[0].dim() != 3:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise InputError(
                f"temporal rescaling takes one series [B, T, F]: got {shapes}; pass what is none "
                "through forward_args"
            )
        steps, others = inputs[0].shape[self.axis], inputs[0].shape[-self.axis]
        maps = 2 + steps + (1.0 - self.above) * steps * others
        return math.ceil(maps) * self._base().count

    def _rounds(self, context: RoundContext) -> Rounds:
        series = _Series(context, self._base(), self.axis)
        batch, steps, features = series.x.shape
        every = torch.ones(batch, steps, dtype=torch.bool, device=series.x.device)
        times = yield from series.changes(every, range(1))
        least = times.quantile(self.above, dim=2, keepdim=True)
        chosen = times >= least if self.above == 0 else times > least
        each = yield from series.changes(chosen.any(1), range(1, features + 1))
        values = times[..., None] * each.view(*times.shape, features) * chosen[..., None]
        values = values.to(series.x.dtype)
        error = None if series.base.at_input else unknown_error(context)
        return Maps((values if self.axis == 1 else values.mT,), error)


class _Series:
    """Maps of a series [B, T, F] in which a step, or one feature of it, is masked."""

    def __init__(self, context: RoundContext, base: WeightedSum, axis: int) -> None:
        self.context, self.base, self.axis = context, base, axis
        self.x = self._swapped(context.inputs[0])
        self.baseline = self._swapped(context.baselines[0])

    def _swapped(self, x: Tensor) -> Tensor:
        return x if self.axis == 1 else x.mT

    def changes(self, steps: Tensor, masks: range) -> Generator[Round | Maps, RoundResult, Tensor]:
        """L1 change of the map for each mask of the steps bool [B, T]: float64 [B, K, T * masks].
        Mask 0 is the whole step, mask f its feature f - 1; changes are zero where `steps` is False.
        """
        (batch, count), device = steps.shape, steps.device
        # The maps of so many variants are held beside each launch.
        targets, size = self.context.scores.shape[1], max(1, self.context.size // 4)
        original = yield from self._maps(torch.arange(batch, device=device), self.x)
        original = original.view(batch, targets, -1)
        changes = torch.zeros(batch, count, len(masks), targets, dtype=torch.float64, device=device)
        rows = steps[..., None].expand(-1, -1, len(masks)).nonzero()
        for start in range(0, len(rows), size):
            example, step, mask = rows[start : start + size].unbind(1)
            x = self._masked(example, step, mask + masks.start)
            part = yield from self._maps(example, x)
            gap = (part.view(len(x), targets, -1) - original[example]).abs()
            changes[example, step, mask] = gap.sum(2, dtype=torch.float64)
        return changes.flatten(1, 2).mT

    def _masked(self, example: Tensor, step: Tensor, mask: Tensor) -> Tensor:
        """Copies of the examples, each with a step or one of its features masked."""
        x, start = self.x[example], self.baseline[example % len(self.baseline)]
        feature = torch.arange(x.shape[2], device=x.device)
        here = (mask == 0)[:, None] | (feature == mask[:, None] - 1)
        row = torch.arange(len(x), device=x.device)
        x[row, step] = torch.where(here, start[row, step], x[row, step])
        return x

    def _maps(self, example: Tensor, x: Tensor) -> Generator[Round | Maps, RoundResult, Tensor]:
        """The base method's maps [V * K, ...] of variants [V, T, F] of the examples."""
        base, inputs = self.base, (self._swapped(x).contiguous(),)
        start = self.context.baselines[0]
        baselines: Inputs = (start if len(start) == 1 else start[example],)
        accumulators = Accumulators(base, inputs, baselines, self.context.scores.shape[1])
        source, level = base.family.bind(inputs, baselines), base.levels[0].to(x.device)
        variants = torch.arange(len(example), device=x.device)
        rows = level.rows(variants, 0, level.count * len(example))

        def write(_: Tensor, row: Tensor) -> Inputs:
            columns = (rows.example, rows.node, rows.weight, rows.replicate)
            return source.write(Rows(*(one[row] for one in columns)))

        def each(part: slice, result: RoundResult) -> None:
            accumulators.add(rows.part(part.start, part.stop), result.grads, source)

        row = torch.arange(len(rows.example), device=x.device)
        yield Round(write, example[rows.example], row, gradients=True, each=each)
        return accumulators.estimate().values[0]
