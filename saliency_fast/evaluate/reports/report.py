"""Reports: many metrics of many methods on the same examples, beside controls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.errors import InputError, InputTypeError, SaliencyError
from saliency_fast.evaluate.controls import CONTROLS
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Explainer,
    Model,
    describe,
    is_method,
    read_evaluation_input,
    read_maps,
)
from saliency_fast.evaluate.metric import Metric, Suite, make_metric, plain_name
from saliency_fast.evaluate.metrics.agreement import agreement
from saliency_fast.evaluate.outcome import RESAMPLES, Outcome, bootstrap, caveats_of
from saliency_fast.evaluate.reports.result import FEW, MAPS, Missing, Report
from saliency_fast.evaluate.scores import RunOptions
from saliency_fast.methods import read_method
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import PREDICTED, Target, read_targets
from saliency_fast.record import describe_target, tensor_sha256, versions, weights_sha256

Given = Explainer | Attribution | Tensor
"""What makes the maps of a row, or the maps themselves."""
EXPECTED = (
    "a method, its name, a function (model, inputs, target) -> maps, an Attribution or a tensor of "
    "maps"
)


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
    """Evaluates methods by metrics on the same examples, beside controls that ignore the model.

    A metric that is undefined for a method is reported with the reason and stops nothing.

    Args:
        model: The model.
        inputs: [B, C, *spatial] or [B, F] in the model's layout.
        methods: Methods, their names, attributions, functions (model, inputs, target) -> maps, or
            a mapping from names to these or to tensors of maps.
        metrics: Metrics, their names, a mapping from names, or a `Suite`; None for all possible.
        target: One class per example as in `explain`; None for models that return one number.
        baseline: The baseline of the methods that take one.
        boxes: [B, 2 D], or masks bool [B, *spatial]: where the object is.
        controls: Names of `CONTROLS`, or functions; () for none.
        confidence: The level of the bootstrap intervals.
        seed: The seed of the bootstrap, and of the metrics of a default suite.
        forward_args, forward_kwargs, memory_budget, points_per_launch, progress, layout: As in a
            metric's call.
        title: The page's title.
        labels: The classes' names.

    Raises:
        InputError: If an argument is invalid, or if nothing could be measured.
        InputTypeError: If an argument has the wrong type.

    Example:
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> report(model, x, methods="gradient", metrics=["deletion"]).names
        ('gradient', 'edge_detector', 'random', 'centre')
    """
    rows = _read_rows(methods, controls)
    # Invalid options are found now, not after minutes.
    bootstrap(torch.zeros(1, device="cpu"), confidence, seed=seed)
    base = read_evaluation_input(
        *(model, inputs, inputs.detach() * 0.0 if isinstance(inputs, Tensor) else inputs),
        target=target,
        boxes=boxes,
        baseline=baseline,
        running=RunOptions(forward_args, forward_kwargs, memory_budget, points_per_launch),
        layout=layout,
    )
    chosen = _read_metrics(metrics, seed, boxes is not None, base.first.probabilities is not None)
    results = _Results()
    with tqdm(total=len(rows) * (len(chosen) + 1), disable=not progress, leave=False) as bar:
        for row in rows:
            results.measure(row, base, chosen, bar)
    results.check()
    return Report(
        title=title,
        outcomes=results.outcomes,
        metrics=chosen,
        controls=tuple(row.name for row in rows if row.control),
        unmeasured=tuple(results.unmeasured),
        caveats=(*_caveats(base), *results.caveats),
        seconds=results.seconds,
        provenance=_provenance(base, target, results.about),
        inputs=base.inputs,
        maps=results.maps,
        classes=base.classes if isinstance(base.classes, Tensor) else None,
        boxes=base.masks,
        labels=labels if isinstance(labels, Mapping) else dict(enumerate(labels or ())),
        agreement=agreement(results.maps, base.inputs) if len(results.maps) > 1 else None,
        confidence=confidence,
        seed=seed,
    )


def _caveats(base: EvaluationInput) -> tuple[str, ...]:
    shares, count = base.first.probabilities, base.batch
    given = shares is not None and bool((shares == base.first.scores).all())
    return base.caveats + caveats_of(
        (
            getattr(base.model, "training", False),
            "the model was given in training mode and evaluated in evaluation mode, in which maps "
            "are made",
        ),
        (given, "the model gives probabilities already: no softmax is taken of them"),
        (
            count < FEW,
            f"bootstrap intervals of fewer than about {FEW} examples are too narrow: "
            f"{'here is 1' if count == 1 else f'here are {count}'}",
        ),
    )


def _provenance(
    base: EvaluationInput, target: Target, methods: Mapping[str, Any]
) -> dict[str, Any]:
    """What the same report needs to be made again. methods: how each row's maps were made."""
    model, x = base.model, base.inputs
    named = not isinstance(model, nn.Module) and hasattr(model, "__qualname__")
    called: Any = model if named else type(model)
    return {
        "model": f"{called.__module__}.{called.__qualname__}",
        "weights_sha256": None if model is None else weights_sha256(model),
        "training_mode": bool(getattr(model, "training", False)),
        "examples": base.batch,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "inputs_sha256": tensor_sha256(x),
        "target": describe_target(read_targets(target, base.batch))[0],
        "classes": base.classes if isinstance(base.classes, (int, list, Tensor)) else None,
        "decisions": base.first.decisions,
        "boxes": base.masks is not None,
        "baseline": describe(base.baseline),
        "memory_budget": base.running.memory_budget,
        "points_per_launch": base.running.points_per_launch,
        "resamples": RESAMPLES,
        "methods": methods,
        "versions": versions(),
    }


@dataclass(frozen=True, eq=False)
class _Row:
    """A method, or a control, before it has explained."""

    name: str
    given: Given
    control: bool = False

    def explained(self, base: EvaluationInput) -> tuple[EvaluationInput, list[str], dict[str, Any]]:
        """The evaluation input with this row's maps, their caveats, and how they were made."""
        given, model, running = self.given, cast(Model, base.model), base.running
        if isinstance(given, Attribution):
            _check_target(given, base)
            own = read_evaluation_input(
                None, running.back(base.inputs), given, layout=running.letters
            )
            past = own.baseline if base.baseline is None else base.baseline
            return (base.beside(own.values, own.method, past), *_about(given))
        method: Explainer | None = None
        axes, caveats, about = running.axes, list[str](), dict[str, Any](kind="maps")
        if isinstance(given, Tensor):
            maps: object = given
        elif is_method(given):
            method = read_method(given)
            found = base.attribution(method, base.inputs, model)
            if found.many:
                raise InputError(
                    f"{self.name} gave several maps per example, and a report needs one: pass "
                    "target= one class, or int64 [B]"
                )
            maps = found.values
            caveats, about = _about(found)
        else:
            method, x = given, running.cast(base.inputs)
            # The library's controls take channels first.
            if given in CONTROLS.values():
                axes, x = None, base.inputs
            maps = cast(Callable[..., Tensor], given)(model, x, base.classes)
            about = {"kind": "control" if self.control else "function", "function": _name_of(given)}
        return base.beside(read_maps(maps, base.inputs, axes), method), caveats, about


def _about(found: Attribution) -> tuple[list[str], dict[str, Any]]:
    """The caveats of an attribution, and how it was made."""
    past, caveats = found.provenance, []
    if found.converged is not None and not bool(found.converged.all()):
        count = int((~found.converged).sum())
        caveats.append(f"{count} of {len(found.converged)} maps are not within their tolerance")
    return caveats, {
        "kind": "method",
        "method": past.method,
        "parameters": past.parameters,
        "baseline": past.baseline,
        "at": past.at,
        "error": float(found.error.max()),
        "explained_in_seconds": past.seconds,
    }


def _check_target(found: Attribution, base: EvaluationInput) -> None:
    classes = base.classes
    if found.classes is None or found.many or not isinstance(classes, (int, list, Tensor)):
        return
    target = torch.as_tensor(classes, device=found.classes.device)
    if target.shape not in ((), found.classes.shape) or not bool((found.classes == target).all()):
        raise InputError(
            f"the attribution by {found.provenance.method} explains other classes than the "
            "report's target: pass target=attribution.classes"
        )


def _read_rows(methods: Any, controls: Any) -> list[_Row]:
    """Methods and then controls, with names that differ; raises for what is neither."""
    rows = [_row(*one) for one in _named(methods, "methods")]
    if not rows:
        raise InputError(f"methods must hold one at least: got {methods!r}; expected {EXPECTED}")
    for name, one in _named(controls, "controls"):
        if isinstance(one, str) and one not in CONTROLS:
            raise InputError(
                f"controls must be of {', '.join(CONTROLS)}, or functions (model, inputs, "
                f"target) -> maps: got {one!r}"
            )
        rows.append(_row(name, CONTROLS[one] if isinstance(one, str) else one, True))
    counts = Counter(row.name for row in rows)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(
            f"methods and controls must have names of their own: {', '.join(twice)} is there twice;"
            " pass a mapping from names"
        )
    return rows


def _named(given: Any, what: str) -> list[tuple[str, Any]]:
    """Rows with their names; where a method is there twice, with the fields that differ."""
    if isinstance(given, Mapping):
        return [(str(name), one) for name, one in given.items()]
    if isinstance(given, (str, Tensor, Attribution)) or not isinstance(given, Iterable):
        given = [] if given is None else [given]
    rows: list[tuple[str, Any]] = []
    for one in given:
        if isinstance(one, Tensor):
            raise InputTypeError(f"{what} must be named: got a tensor; write {{'mine': maps}}")
        name = _name_of(one)
        if any(name == taken for taken, _ in rows) and is_dataclass(one):
            options = ((part.name, getattr(one, part.name), part.default) for part in fields(one))
            changed = (f"{key}={value}" for key, value, usual in options if value is not usual)
            name = f"{name}({', '.join(changed)})"
        rows.append((name, one))
    return rows


def _name_of(one: Any) -> str:
    if isinstance(one, str):
        return one
    if isinstance(one, Attribution):
        return one.provenance.method
    name = getattr(one, "name", None)
    return name if isinstance(name, str) else str(getattr(one, "__name__", type(one).__name__))


def _row(name: str, one: Any, control: bool = False) -> _Row:
    if is_method(one):
        one = read_method(one)
    elif not isinstance(one, (Attribution, Tensor)) and not callable(one):
        raise InputTypeError(f"{name} must be {EXPECTED}: got {type(one).__name__}")
    return _Row(name, one, control)


def _read_metrics(given: Any, seed: int, boxes: bool, classes: bool) -> dict[str, Metric]:
    """The metrics of a report by name. boxes, classes: whether there are any."""
    if given is None or isinstance(given, Suite):
        suite = Suite(seed=seed) if given is None else given
        metrics = suite.metrics(classes)
        if suite.names is None and not boxes:
            metrics = {name: one for name, one in metrics.items() if "masks" not in one.needs}
    else:
        metrics = _named_metrics(given)
    blind = [name for name, one in metrics.items() if "masks" in one.needs]
    if blind and not boxes:
        raise InputError(
            f"{', '.join(blind)} need to know where the object is: pass boxes=, or leave them out"
        )
    if not metrics:
        raise InputError("metrics must hold one at least: got none")
    return metrics


def _named_metrics(given: Any) -> dict[str, Metric]:
    given = [given] if isinstance(given, (str, Metric)) else given
    if not isinstance(given, (Mapping, Sequence)):
        raise InputTypeError(
            "metrics must be metrics such as Deletion(), their names, a mapping from names, or a "
            f"Suite: got {type(given).__name__}"
        )
    pairs = given.items() if isinstance(given, Mapping) else ((None, one) for one in given)
    metrics: dict[str, Metric] = {}
    for name, one in pairs:
        metric = make_metric(one, {}) if isinstance(one, str) else one
        if not isinstance(metric, Metric):
            made = f"; make one with {one.__name__}()" if isinstance(one, type) else ""
            raise InputTypeError(f"metrics must be metrics such as Deletion(): got {one!r}{made}")
        if name is None:
            name = plain_name(one if isinstance(one, str) else metric.name)
        if name in metrics:
            raise InputError(
                f"metrics must have names of their own: {name} is there twice; pass a mapping "
                "from names"
            )
        metrics[name] = metric
    return metrics


@dataclass
class _Results:
    """The results of the rows so far; a row without maps has no outcomes."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    unmeasured: list[Missing] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def check(self) -> None:
        """Raises the first error where nothing could be measured."""
        if self.errors and not any(self.outcomes.values()):
            raise self.errors[0]

    def measure(
        self, row: _Row, base: EvaluationInput, metrics: Mapping[str, Metric], bar: Any
    ) -> None:
        """Explains and evaluates a row; keeps the reason of what cannot be measured."""
        outcomes = self.outcomes.setdefault(row.name, {})
        with self._step(row.name, MAPS, bar):
            data, caveats, self.about[row.name] = row.explained(base)
            self.maps[row.name] = data.places
            self.caveats += [f"{row.name}: {one}" for one in caveats]
        if row.name not in self.maps:
            bar.update(len(metrics))
            return
        for name, metric in metrics.items():
            with self._step(row.name, name, bar):
                outcomes[name] = metric.evaluate(data)

    @contextmanager
    def _step(self, row: str, metric: str, bar: Any) -> Iterator[None]:
        """Times a step, and keeps its error; a model may raise anything."""
        bar.set_description(row if metric == MAPS else f"{row}, {metric}")
        seconds, begun = self.seconds.setdefault(row, {}), time.perf_counter()
        try:
            yield
            seconds[metric] = time.perf_counter() - begun
        except Exception as error:
            text = " ".join(str(error).split())
            why = text if isinstance(error, SaliencyError) else f"{type(error).__name__}: {text}"
            self.unmeasured.append(Missing(row, metric, why))
            self.errors.append(error)
        bar.update()
