"""Completeness: whether a map's values add up to what the score gained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from saliency_fast.engine.baselines import choices, read_baseline_set
from saliency_fast.engine.recipe import Method, Recipe, Starting, WeightedSum
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metric import Metric, check_output
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.substrates import Substrate, check_substrate, named, substrate_of


@dataclass(frozen=True)
class Completeness(Metric):
    """How far the sum of a map's values is from what the score gained over the baseline's, relative
    to that gain (Sundararajan, 2017): 0 where everything is explained, 1 for a zero map.

    substrate: the baseline; None is the one that the maps were made with, zeros where it is not
    known. Of several baselines the mean score counts. output: the score that the maps explain.
    tolerance: passes where no example is further off. seed: of a uniform substrate. Details:
    `gap` = sum - gain and `gain`, in units of the score. NaN where the score gained nothing.
    """

    substrate: Substrate | None = None
    output: str = "logit"
    tolerance: float | None = None
    seed: int = 0
    name: ClassVar[str] = "completeness"
    better: ClassVar[str] = "lower"
    needs: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        if self.substrate is not None:
            check_substrate(self.substrate)
        check_output(self.output)
        given = self.tolerance
        if given is None:
            return
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise InputTypeError(f"tolerance must be a number: got {given!r}")
        if not 0.0 <= given < math.inf:
            raise InputError(f"tolerance must be 0 or more, finite: got {given}")

    def _judge(self, subject: Subject) -> Outcome:
        fills, stated = self._baselines(subject)
        gain = self._gain(subject, fills)
        gap = subject.values.double().flatten(1).sum(1) - gain
        nothing = gain == 0
        values = (gap.abs() / gain.abs()).masked_fill(nothing, math.nan)
        count = int(nothing.sum())
        told = f"{count} of {len(gain)} examples score as their baseline does and count as unknown"
        passed = None
        if self.tolerance is not None and not bool(nothing.all()):
            passed = bool((values <= self.tolerance)[~nothing].all())
        return self._outcome(
            values,
            passed=passed,
            threshold=self.tolerance,
            details={"gap": gap, "gain": gain},
            parameters={"substrate": stated},
            caveats=(told,) if count else (),
        )

    def _baselines(self, subject: Subject) -> tuple[list[Tensor], Any]:
        """What scores are compared with, each [B | 1, *], and how results state it."""
        x = subject.inputs
        if self.substrate is not None:
            return [subject.fill(self.substrate, self.seed)], named(self.substrate)
        given, recipe = subject.baseline, _recipe(subject)
        if isinstance(recipe, WeightedSum) and isinstance(recipe.family, Starting):
            return [recipe.family.start((x,))[0]], "the path's start"
        if recipe is not None and recipe.baseline == "set":
            rows = read_baseline_set(given, (x,))[0]
            return [row[None] for row in rows], _named(given)
        several = choices(given[0] if isinstance(given, tuple) and len(given) == 1 else given)
        fills = [
            substrate_of(0.0 if one is None else one, x, number)
            for number, one in enumerate(several)
        ]
        return fills, _named(given)

    def _gain(self, subject: Subject, fills: list[Tensor]) -> Tensor:
        """The scores less the mean of the baselines' scores, float64 [B]."""
        x, table = subject.inputs, torch.cat(fills)
        sizes = torch.tensor([len(one) for one in fills], device=x.device)
        starts = sizes.cumsum(0) - sizes

        def write(item: Tensor, place: Tensor) -> Tensor:
            return table[starts[place] + item % sizes[place]]

        item = torch.arange(len(x), device=x.device).repeat(len(fills))
        number = torch.arange(len(fills), device=x.device).repeat_interleave(len(x))
        first, at = subject.scorer.at(write, item, number)
        return first.of(self.output) - at.of(self.output).view(len(fills), -1).mean(0)


def _recipe(subject: Subject) -> Recipe | None:
    """How the maps were made, where a method made them."""
    make = getattr(subject.method, "recipe", None)
    return None if make is None else cast(Method, subject.method).recipe()


def _named(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [_named(one) for one in given]
    return "zero" if given is None else named(given)
