"""Completeness: whether a map's values sum to the change of the score from the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.engine.baselines import choices, read_baseline_set
from saliency_fast.engine.recipe import Starting, WeightedSum
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Replacement,
    check_replacement,
    describe,
    replacement_of,
)
from saliency_fast.evaluate.maps import check_tolerance
from saliency_fast.evaluate.metric import AXIOMS, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome, caveats_of
from saliency_fast.evaluate.scores import OUTPUTS


@in_suite(AXIOMS, "Sundararajan et al., 2017")
@dataclass(frozen=True)
class Completeness(Metric):
    """The completeness residual: |sum of the map - gain| / |gain|, where the gain is the score less
    the baseline's (Sundararajan, 2017): 0 where the map is complete, 1 for a zero map.

    NaN where the gain is zero. `details`: `gap`, the sum less the gain, and `gain`.

    Args:
        substrate: The baseline; None is that of the maps, or zeros where it is unknown. Of several
            baselines the mean score counts.
        output: The score that the maps explain, "logit" or "softmax".
        tolerance: The largest residual of an example that passes.
        seed: Of a uniform baseline.

    Example:
        >>> model, x = torch.nn.Linear(4, 3, bias=False), torch.ones(1, 4)
        >>> Completeness(tolerance=1e-5)(model, x, x * model.weight[0], target=0).passed
        True
    """

    substrate: Replacement | None = None
    output: str = "logit"
    tolerance: float | None = None
    seed: int = 0
    name = "completeness"
    better = "lower"
    needs = ("model",)

    def __post_init__(self) -> None:
        if self.substrate is not None:
            check_replacement("substrate", self.substrate)
        check_fields(self, output=OUTPUTS)
        if self.tolerance is not None:
            check_tolerance("tolerance", self.tolerance)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        fills, stated = self._baselines(data)
        table, counts = torch.cat(fills), [len(one) for one in fills]
        sizes = torch.tensor(counts, device=table.device)
        starts = sizes.cumsum(0) - sizes

        def write(example: Tensor, number: Tensor) -> Tensor:
            return table[starts[number] + example % sizes[number]]

        first, points = data.scorer.grid(write, len(fills))
        gain = first.of(self.output) - points.of(self.output).mean(1)
        gap = data.values.double().flatten(1).sum(1) - gain
        nothing = gain == 0
        values = (gap.abs() / gain.abs()).masked_fill(nothing, math.nan)
        count = int(nothing.sum())
        what = "examples score as their baseline does and count as unknown"
        passed = None
        if self.tolerance is not None and not bool(nothing.all()):
            passed = bool((values <= self.tolerance)[~nothing].all())
        return self._outcome(
            values,
            passed=passed,
            threshold=self.tolerance,
            details={"gap": gap, "gain": gain},
            parameters={"substrate": stated},
            caveats=caveats_of((count, f"{count} of {len(gain)} {what}")),
        )

    def _baselines(self, data: EvaluationInput) -> tuple[list[Tensor], Any]:
        """The baselines, each [B | 1, *], and how results state them."""
        x, given = data.inputs, data.baseline
        if self.substrate is not None:
            return [data.fill(self.substrate, self.seed)], describe(self.substrate)
        recipe = data.recipe
        if isinstance(recipe, WeightedSum) and isinstance(recipe.family, Starting):
            return [recipe.family.start((x,))[0]], "the path's start"
        stated = "zero" if given is None else describe(given)
        if recipe is not None and recipe.baseline == "set":
            return [row[None] for row in read_baseline_set(given, (x,))[0]], stated
        several = choices(given[0] if isinstance(given, tuple) and len(given) == 1 else given)
        several = [0.0 if one is None else one for one in several]
        return [replacement_of(one, x, number) for number, one in enumerate(several)], stated
