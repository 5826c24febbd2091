"""Report: many metrics of many methods on the same examples, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saliency_fast.engine.baselines import Baseline
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.agreement import agreement
from saliency_fast.evaluate.outcome import bootstrap
from saliency_fast.evaluate.reports.findings import FEW, Findings
from saliency_fast.evaluate.reports.judge import Judged, judge, read_metrics
from saliency_fast.evaluate.reports.origin import origin
from saliency_fast.evaluate.reports.rows import Given, read_rows
from saliency_fast.evaluate.reports.suite import Suite
from saliency_fast.evaluate.scores import Running
from saliency_fast.evaluate.subject import Model, Subject, read_subject
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import PREDICTED, Target

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Report(Findings):
    """Findings, with the ways to show and keep them."""

    def to_dict(self) -> dict[str, Any]:
        """All of it but the maps, as what JSON can hold; NaN becomes None."""
        from saliency_fast.evaluate.reports.show.plain import plain_findings

        return plain_findings(self)

    def json(self, indent: int | None = 1) -> str:
        from saliency_fast.evaluate.reports.show.plain import as_json

        return as_json(self, indent)

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
    layout: LayoutLike = None,
) -> Report:
    """Judges methods by metrics on the same examples, beside controls that never ask the model.

    inputs [B, C, *spatial] or [B, F]. methods: methods, their names, attributions, functions
    (model, inputs, target) -> maps, or a mapping from names to these or to tensors of maps.
    metrics: metrics, their names, a mapping from names, or a `Suite`; None for all that what is
    given allows. target: one class per example as in `explain`; None for models that give one
    number. boxes [B, 2 D] or masks [B, *spatial]: where the object is. controls: of `CONTROLS`, or
    functions; () for none. confidence, seed: of the bootstrap intervals, and the seed of a suite's
    metrics. labels: names of classes. layout: of the
    inputs, as in `explain`; a report holds them and its maps as [B, C, *spatial]. Others as in
    `Engine`.

    What a metric cannot say of a method is told with its reason and stops nothing; raises
    InputError or InputTypeError where the arguments themselves are wrong.
    """
    rows = read_rows(methods, controls)
    # Asked here, not after minutes: the interval, the names and the options.
    bootstrap(torch.zeros(1, device="cpu"), confidence, seed=seed)
    running = Running(forward_args, forward_kwargs, memory_budget, points_per_launch)
    base = _base(model, inputs, target, boxes, baseline, running, layout)
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
    model: Model,
    inputs: Any,
    target: Target,
    boxes: Any,
    baseline: Baseline,
    running: Running,
    layout: LayoutLike,
) -> Subject:
    """The inputs without maps, and what the model says of them."""
    maps = inputs.detach() * 0.0 if isinstance(inputs, Tensor) else inputs
    return read_subject(
        *(model, inputs, maps),
        target=target,
        boxes=boxes,
        baseline=baseline,
        running=running,
        layout=layout,
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
