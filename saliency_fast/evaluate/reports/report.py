"""Report: many metrics of many methods on the same examples, in one call."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saliency_fast.engine.baselines import Baseline
from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.agreement import Agreement, agreement
from saliency_fast.evaluate.outcome import Interval, Outcome, bootstrap
from saliency_fast.evaluate.reports.judge import (
    Judged,
    Missing,
    judge,
    read_metrics,
)
from saliency_fast.evaluate.reports.origin import origin
from saliency_fast.evaluate.reports.rows import Given, read_rows
from saliency_fast.evaluate.reports.suite import Suite
from saliency_fast.evaluate.scores import Running
from saliency_fast.evaluate.subject import Model, Subject, read_subject
from saliency_fast.model.targets import PREDICTED, Target

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1
FEW = 20
"""Examples below which a bootstrap interval is clearly too narrow."""


@dataclass(frozen=True, eq=False, repr=False)
class Report:
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
        return self._intervals.get((method, metric))

    def best(self, metric: str) -> str | None:
        """The method (no control) with the best mean; None where several share it, or where
        neither direction is better.
        """
        self._known(None, metric)
        better = self.metrics[metric].better
        found = {
            name: one.mean
            for name in self.methods
            if (one := self._intervals.get((name, metric))) is not None and one.count
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
            for interval in (self._intervals[method, metric],)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it but the maps, as what JSON can hold; NaN becomes None."""
        from saliency_fast.evaluate.reports.show.plain import plain, plain_interval, plain_outcome
        from saliency_fast.evaluate.reports.show.words import verdicts

        return {
            "schema": SCHEMA,
            "title": self.title,
            "names": list(self.names),
            "controls": list(self.controls),
            "metrics": list(self.metrics),
            "passed": self.passed,
            "verdicts": [text for _, text in verdicts(self)],
            "best": {metric: self.best(metric) for metric in self.metrics},
            "outcomes": {
                method: {
                    metric: plain_outcome(outcome, self._intervals[method, metric])
                    for metric, outcome in found.items()
                }
                for method, found in self.outcomes.items()
            },
            "comparisons": {
                method: {metric: plain_interval(gap) for metric, gap in gaps.items()}
                for method, gaps in self.comparisons().items()
            },
            "agreement": plain(self.agreement),
            "unmeasured": plain(self.unmeasured),
            "caveats": list(self.caveats),
            "seconds": plain(self.seconds),
            "confidence": self.confidence,
            "seed": self.seed,
            "provenance": plain(self.provenance),
        }

    def json(self, indent: int | None = 1) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def html(self) -> str:
        """One page that needs nothing else; without matplotlib it has no curves and says so."""
        from saliency_fast.evaluate.reports.show.page import page

        return page(self)

    def curves(self, folder: str | Path) -> list[Path]:
        """Writes a PNG for each metric with a curve and returns the paths; needs matplotlib."""
        from saliency_fast.evaluate.reports.show.figures import write_curves

        return write_curves(self, Path(folder))

    def save(self, folder: str | Path) -> list[Path]:
        """Writes index.html, report.json and curves/*.png; without matplotlib no curves."""
        from saliency_fast.evaluate.reports.show.files import save

        return save(self, Path(folder))

    def show(self) -> None:
        """Prints the tables."""
        from saliency_fast.evaluate.reports.show.table import show

        show(self)

    def __str__(self) -> str:
        from saliency_fast.evaluate.reports.show.table import text

        return text(self)

    def __repr__(self) -> str:
        return f"<Report {', '.join(self.names)}: {', '.join(self.metrics)}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from saliency_fast.evaluate.reports.show.table import tables

        yield from tables(self, options.max_width)

    @cached_property
    def _intervals(self) -> dict[tuple[str, str], Interval]:
        return {
            (method, metric): outcome.mean(self.confidence, seed=self.seed)
            for method, found in self.outcomes.items()
            for metric, outcome in found.items()
        }

    def _known(self, method: str | None, metric: str | None) -> None:
        for what, name, valid in (("method", method, self.names), ("metric", metric, self.metrics)):
            if name is not None and name not in valid:
                raise InputError(f"{what} must be one of {', '.join(valid)}: got {name!r}")


def report(
    model: Model,
    inputs: Tensor,
    *,
    methods: Sequence[Given] | Mapping[str, Given] | Given = (
        "gradient",
        "smoothgrad",
        "integrated_gradients",
    ),
    metrics: Suite | Sequence[Metric | str] | Mapping[str, Metric] | None = None,
    target: Target = PREDICTED,
    baseline: Baseline = None,
    boxes: Any = None,
    controls: Sequence[Given] | Mapping[str, Given] = ("edge_detector", "random", "centre"),
    confidence: float = 0.95,
    seed: int = 0,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
    memory_budget: int | str | None = None,
    points_per_launch: int | None = None,
    progress: bool = False,
    title: str = "Are the maps any good?",
    labels: Mapping[int, str] | Sequence[str] | None = None,
) -> Report:
    """Judges methods by metrics on the same examples, beside controls that never ask the model.

    inputs [B, C, *spatial] or [B, F]. methods: methods, their names, attributions, functions
    (model, inputs, target) -> maps, or a mapping from names to these or to tensors of maps.
    metrics: metrics, their names, a mapping from names, or a `Suite`; None for all that what is
    given allows. target: one class per example as in `explain`; None for models that give one
    number. boxes [B, 2 D] or masks [B, *spatial]: where the object is. controls: of `CONTROLS`, or
    functions; () for none. confidence, seed: of the bootstrap intervals, and the seed of a suite's
    metrics. labels: names of classes. Others as in `Engine`.

    What a metric cannot say of a method is told with its reason and stops nothing; raises
    InputError or InputTypeError where the arguments themselves are wrong.
    """
    rows = read_rows(methods, controls)
    # Asked here, not after minutes: the interval, the names and the options.
    bootstrap(torch.zeros(1), confidence, seed=seed)
    running = Running(forward_args, forward_kwargs, memory_budget, points_per_launch)
    base = _base(model, inputs, target, boxes, baseline, running)
    chosen = read_metrics(metrics, seed, boxes is not None, base.first.probabilities is not None)
    judged = judge(rows, base, chosen, progress)
    classes = base.classes if isinstance(base.classes, Tensor) else None
    return Report(
        title=title,
        outcomes=judged.outcomes,
        metrics=chosen,
        controls=tuple(row.name for row in rows if row.control),
        unmeasured=tuple(judged.unmeasured),
        caveats=_caveats(base, judged),
        seconds=judged.seconds,
        provenance=origin(base, target, judged.about),
        inputs=base.inputs,
        maps=judged.maps,
        classes=classes,
        boxes=base.masks,
        labels=_labels(labels),
        agreement=agreement(judged.maps, base.inputs) if len(judged.maps) > 1 else None,
        confidence=confidence,
        seed=seed,
    )


def _base(
    model: Model, inputs: Any, target: Target, boxes: Any, baseline: Baseline, running: Running
) -> Subject:
    """The inputs without maps, and what the model says of them."""
    maps = inputs.detach() * 0.0 if isinstance(inputs, Tensor) else inputs
    return read_subject(
        model, inputs, maps, target=target, boxes=boxes, baseline=baseline, running=running
    )


def _caveats(base: Subject, judged: Judged) -> tuple[str, ...]:
    found = list(base.caveats)
    if getattr(base.model, "training", False):
        found.append(
            "the model was handed over in training mode and judged in evaluation mode, as maps are "
            "made"
        )
    shares = base.first.probabilities
    if shares is not None and bool((shares == base.first.scores).all()):
        found.append("the model gives probabilities already: no softmax is taken of them")
    if base.batch < FEW:
        found.append(
            f"bootstrap intervals of fewer than about {FEW} examples are too narrow: "
            f"{'here is 1' if base.batch == 1 else f'here are {base.batch}'}"
        )
    return tuple(found + judged.caveats)


def _labels(labels: Mapping[int, str] | Sequence[str] | None) -> Mapping[int, str]:
    if labels is None:
        return {}
    return dict(labels) if isinstance(labels, Mapping) else dict(enumerate(labels))
