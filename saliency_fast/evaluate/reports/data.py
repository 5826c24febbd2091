"""What a report holds: outcomes by method and metric, their intervals, and comparisons."""

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

FEW = 20
"""Examples below which a bootstrap interval is clearly too narrow."""
MAPS = "maps"
"""Stands for a metric where a method's maps could not be made."""


@dataclass(frozen=True)
class Missing:
    """A cell that was not measured, and why; metric is "maps" where a method gave no maps."""

    method: str
    metric: str
    why: str


@dataclass(frozen=True, eq=False, repr=False)
class ReportData:
    """The outcomes of metrics for methods and controls, and what follows from them.

    Args:
        title: The page's title.
        outcomes: By method and metric, controls behind the methods.
        metrics: By name, in the order of the tables.
        controls: The names of rows that do not depend on the model.
        unmeasured: What could not be measured, and why.
        caveats: Sentences that a reader must know.
        seconds: By method and metric, "maps" for explaining.
        provenance: All that the outcomes depend on.
        inputs: [B, C, *spatial] or [B, F].
        maps: [B, *spatial] by method.
        classes: The explained classes, int64 [B], where the target is a class.
        boxes: Masks of the objects, bool [B, *spatial], where they are given.
        labels: Names of classes.
        agreement: Between the maps, where there are several.
        confidence: The intervals' level.
        seed: The bootstrap's seed.
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
        """The names of the rows that are no controls."""
        return tuple(name for name in self.outcomes if name not in self.controls)

    @property
    def passed(self) -> bool | None:
        """Whether all checks that give a verdict passed for all methods; None without one."""
        outcomes = (one for name in self.methods for one in self.outcomes[name].values())
        verdicts = [one.passed for one in outcomes if one.passed is not None]
        return all(verdicts) if verdicts else None

    def interval(self, method: str, metric: str) -> Interval | None:
        """The mean with its bootstrap interval; None where it was not measured."""
        self._check_names(method, metric)
        return self.intervals.get((method, metric))

    def best(self, metric: str) -> str | None:
        """The method (no control) with the best mean; None where several share it, or where
        neither direction is better.
        """
        self._check_names(None, metric)
        better = self.metrics[metric].better
        means = {
            name: one.mean
            for name in self.methods
            if (one := self.intervals.get((name, metric))) is not None and one.count
        }
        if not better or not means:
            return None
        top = (max if better == "higher" else min)(means.values())
        # Means of the same values may differ by rounding.
        first = [name for name, mean in means.items() if math.isclose(mean, top)]
        return first[0] if len(first) == 1 else None

    def gap(self, method: str, other: str, metric: str) -> Interval | None:
        """The mean of the paired differences from another method on the same examples; None where
        either was not measured.
        """
        self._check_names(method, metric)
        self._check_names(other, metric)
        one, two = self.outcomes[method].get(metric), self.outcomes[other].get(metric)
        if one is None or two is None:
            return None
        interval = one.over(two, self.confidence, seed=self.seed)
        return interval if interval.count else None

    def comparisons(self, reference: str | None = None) -> dict[str, dict[str, Interval]]:
        """The gaps of every method to one of them (the first), by method and metric."""
        first = self.methods[0] if reference is None else reference
        self._check_names(first, None)
        gaps: dict[str, dict[str, Interval]] = {name: {} for name in self.methods if name != first}
        for name, found in gaps.items():
            for metric in self.metrics:
                gap = self.gap(name, first, metric)
                if gap is not None:
                    found[metric] = gap
        return gaps

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method and metric that was measured, for data frames."""
        return [
            {
                "method": method,
                "control": method in self.controls,
                "metric": metric,
                "better": outcome.better,
                **{part: getattr(interval, part) for part in ("mean", "low", "high", "count")},
                "passed": outcome.passed,
                "best": self.best(metric) == method,
                "seconds": self.seconds[method][metric],
            }
            for method, by_metric in self.outcomes.items()
            for metric, outcome in by_metric.items()
            for interval in (self.intervals[method, metric],)
        ]

    @cached_property
    def intervals(self) -> dict[tuple[str, str], Interval]:
        """By method and metric, of what was measured."""
        return {
            (method, metric): outcome.mean(self.confidence, seed=self.seed)
            for method, by_metric in self.outcomes.items()
            for metric, outcome in by_metric.items()
        }

    def _check_names(self, method: str | None, metric: str | None) -> None:
        for what, name, valid in (("method", method, self.names), ("metric", metric, self.metrics)):
            if name is not None and name not in valid:
                raise InputError(f"{what} must be one of {', '.join(valid)}: got {name!r}")
