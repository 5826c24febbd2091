"""Findings: what every metric found of every method and control, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.agreement import Agreement
from saliency_fast.evaluate.outcome import Interval, Outcome
from saliency_fast.evaluate.reports.judge import Missing

FEW = 20
"""Examples below which a bootstrap interval is clearly too narrow."""


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """What every metric found of every method and control.

    outcomes: by method and metric, controls behind the methods. metrics: by name, in the order of
    the tables. controls: the names of rows that know nothing of the model. unmeasured: what could
    not be measured, and why. seconds: by method and metric, "maps" for explaining. maps: float
    [B, *spatial] by method. inputs, classes, boxes: what was explained, int64 [B] and masks bool,
    None where there are none. agreement: between the maps, None where there is one. provenance:
    what it all rests on.
    """

    title: str
    outcomes: Mapping[str, Mapping[str, Outcome]]
    metrics: Mapping[str, Metric]
    controls: tuple[str, ...]
    unmeasured: tuple[Missing, ...]
    caveats: tuple[str, ...]
    seconds: Mapping[str, Mapping[str, float]]
    provenance: Mapping[str, Any]
    inputs: Tensor
    maps: Mapping[str, Tensor]
    classes: Tensor | None
    boxes: Tensor | None
    labels: Mapping[int, str]
    agreement: Agreement | None
    confidence: float
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Methods and then controls."""
        return tuple(self.outcomes)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(name for name in self.outcomes if name not in self.controls)

    @property
    def passed(self) -> bool | None:
        """Whether all checks that give a verdict passed for all methods; None without one."""
        found = [
            outcome.passed
            for name in self.methods
            for outcome in self.outcomes[name].values()
            if outcome.passed is not None
        ]
        return all(found) if found else None

    def interval(self, method: str, metric: str) -> Interval | None:
        """The mean with its bootstrap interval; None where it was not measured."""
        self._known(method, metric)
        return self.intervals.get((method, metric))

    def best(self, metric: str) -> str | None:
        """The method (no control) with the best mean; None where several share it, or where
        neither direction is better.
        """
        self._known(None, metric)
        better = self.metrics[metric].better
        found = {
            name: one.mean
            for name in self.methods
            if (one := self.intervals.get((name, metric))) is not None and one.count
        }
        if not better or not found:
            return None
        top = (max if better == "higher" else min)(found.values())
        # Means of the same numbers may differ by rounding.
        first = [name for name, mean in found.items() if math.isclose(mean, top)]
        return first[0] if len(first) == 1 else None

    def gap(self, method: str, other: str, metric: str) -> Interval | None:
        """How much larger a method's mean is than another's on the same examples, paired."""
        self._known(method, metric)
        self._known(other, metric)
        if metric not in self.outcomes[method] or metric not in self.outcomes[other]:
            return None
        one, two = self.outcomes[method][metric], self.outcomes[other][metric]
        found = one.over(two, self.confidence, seed=self.seed)
        return found if found.count else None

    def comparisons(self, reference: str | None = None) -> dict[str, dict[str, Interval]]:
        """Every method against one of them (the first), by method and metric."""
        first = self.methods[0] if reference is None else reference
        self._known(first, None)
        others = [name for name in self.methods if name != first]
        return {
            name: {
                metric: gap
                for metric in self.metrics
                if (gap := self.gap(name, first, metric)) is not None
            }
            for name in others
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method and metric that was measured, as data frames take them."""
        return [
            {
                "method": method,
                "control": method in self.controls,
                "metric": metric,
                "better": outcome.better,
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "count": interval.count,
                "passed": outcome.passed,
                "best": self.best(metric) == method,
                "seconds": self.seconds[method][metric],
            }
            for method, found in self.outcomes.items()
            for metric, outcome in found.items()
            for interval in (self.intervals[method, metric],)
        ]

    @cached_property
    def intervals(self) -> dict[tuple[str, str], Interval]:
        return {
            (method, metric): outcome.mean(self.confidence, seed=self.seed)
            for method, found in self.outcomes.items()
            for metric, outcome in found.items()
        }

    def _known(self, method: str | None, metric: str | None) -> None:
        for what, name, valid in (("method", method, self.names), ("metric", metric, self.metrics)):
            if name is not None and name not in valid:
                raise InputError(f"{what} must be one of {', '.join(valid)}: got {name!r}")
