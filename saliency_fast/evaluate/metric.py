"""Metrics: their base class, how they register for the suite of a report, and the suite."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.errors import InputError, warn_deprecated
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Explainer,
    Model,
    Replacement,
    check_replacement,
    describe,
    read_evaluation_input,
)
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.scores import RunOptions
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike
from saliency_fast.model.targets import Target

FAITHFULNESS, LOCALISATION, AXIOMS = "faithfulness", "localisation", "axioms"
SANITY, ROBUSTNESS, FORM, FURTHER = "sanity", "robustness", "form", "further"
GROUPS = {
    FAITHFULNESS: "Does the model depend on what the map marks?",
    LOCALISATION: "Is what the map marks where the object is?",
    AXIOMS: "Do the values add up to what they explain?",
    SANITY: "Does the map depend on the model at all?",
    ROBUSTNESS: "Does the map stay when next to nothing changes?",
    FORM: "What does the map look like?",
    FURTHER: "Further metrics",
}
"""The groups of a report's table in their order, and the question of each."""
CLASS_OUTPUTS = ("softmax", "accuracy")
"""Outputs that need several classes; a suite replaces them by the logit where there are none."""
_NEEDS = {
    "model": "needs model, whose scores it reads: got None; pass the model",
    "masks": "needs boxes or masks, which say where the object is: got None; pass boxes=",
    "method": "needs method, since it explains again, and how these maps were made is unknown: got "
    "None; pass a method, its name or a function (model, inputs, target) -> maps",
}


class Metric:
    """Base of the metrics: frozen dataclasses of options, called with what they evaluate.

    A metric defines `_evaluate(data)`, and registers with `in_suite` where reports should have it.

    Attributes:
        name: The name in tables.
        better: "higher", "lower", or "" where neither is.
        needs: Which of "model", "masks" and "method" the evaluation input must hold.
        takes_missing: Whether inputs and replacements may hold NaN, where the model accepts it.

    Example:
        >>> import torch
        >>> from saliency_fast.evaluate import Sparseness
        >>> Sparseness()(None, torch.ones(1, 4), torch.tensor([[0.0, 0.0, 0.0, 1.0]])).values
        tensor([0.7500], dtype=torch.float64)
    """

    name: ClassVar[str]
    better: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    takes_missing: ClassVar[bool] = False

    def __call__(
        self,
        model: Model | None,
        inputs: Tensor,
        maps: Tensor | Attribution,
        *,
        target: Target = None,
        boxes: Any = None,
        method: Explainer | None = None,
        baseline: Baseline = None,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        memory_budget: int | str | None = None,
        points_per_launch: int | None = None,
        progress: bool = False,
        layout: LayoutLike = None,
    ) -> Outcome:
        """Evaluates maps that explain a model's output for inputs.

        Args:
            model: None for metrics that do not need it.
            inputs: [B, C, *spatial] or [B, F] in the model's layout.
            maps: An `Attribution`, or a tensor [B, C, *spatial], [B, 1, *spatial] or [B, *spatial].
            target: One class per example, as in `explain`; by default the attribution's.
            boxes: [B, 2 D] as (top, left, bottom, right), half-open, or masks bool [B, *spatial].
            method: How the maps were made, for metrics that explain again; by default the
                attribution's. A method, its name, or a function (model, inputs, target) -> maps.
            baseline: The method's baseline; by default the attribution's.
            forward_args, forward_kwargs, layout: As in `explain`.
            memory_budget, points_per_launch, progress: As in `explain`, for each launch of scores.

        Raises:
            InputError: If the metric needs what is not given, or something does not fit.
            InputTypeError: If an argument has the wrong type.
        """
        options = (forward_args, forward_kwargs, memory_budget, points_per_launch, progress)
        data = read_evaluation_input(
            *(model, inputs, maps),
            target=target,
            boxes=boxes,
            method=method,
            baseline=baseline,
            running=RunOptions(*options),
            layout=layout,
        )
        return self.evaluate(data)

    def evaluate(self, data: EvaluationInput) -> Outcome:
        """The outcome for an evaluation input, which was validated."""
        for need in self.needs:
            if getattr(data, need) is None:
                raise InputError(f"{self.name} {_NEEDS[need]}")
        if not self.takes_missing and not data.finite:
            raise InputError(
                f"the input holds NaN or infinity, and {self.name} needs finite numbers; deletion, "
                "insertion, sensitivity-n and faithfulness correlation take values that are missing"
            )
        outcome = self._evaluate(data)
        caveats = (data.caveats if "model" in self.needs else ()) + outcome.caveats
        parameters = {name: describe(getattr(self, name)) for name in fields_of(type(self))}
        parameters |= outcome.parameters
        return dataclasses.replace(outcome, parameters=parameters, caveats=caveats)

    def judge(self, data: EvaluationInput) -> Outcome:
        """Deprecated alias of `evaluate`."""
        warn_deprecated("Metric.judge", "Metric.evaluate")
        return self.evaluate(data)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        raise NotImplementedError

    def _outcome(self, values: Tensor, **further: Any) -> Outcome:
        """An outcome of this metric; see `Outcome`."""
        further.setdefault("parameters", {})
        return Outcome(self.name, values.detach().double(), self.better, **further)


check_fields = checks.fields


@dataclass(frozen=True)
class Entry:
    """A metric of the suite.

    asks: what it measures. quick: fields of a quick run. fields: those that differ from defaults.
    """

    kind: type[Metric]
    group: str
    paper: str
    asks: str
    quick: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}
"""The registered metrics by name, in the order of a report."""
METRICS: dict[str, type[Metric]] = {}
"""The classes of the registered metrics by name."""
_M = TypeVar("_M", bound=type[Metric])


def in_suite(
    group: str,
    paper: str,
    *,
    name: str = "",
    asks: str = "",
    quick: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Callable[[_M], _M]:
    """Registers a metric class for reports and the command line; see `Entry`."""

    def register(kind: _M) -> _M:
        key = name or plain_name(kind.name)
        ENTRIES[key] = Entry(kind, group, paper, asks or _summary(kind), quick or {}, fields or {})
        METRICS[key] = kind
        return kind

    return register


def entry_of(metric: Metric, name: str = "") -> Entry:
    """A metric's entry under a report's name for it or its own; else one made of its docstring."""
    for one in (name, plain_name(metric.name)):
        if one in ENTRIES and type(metric) is ENTRIES[one].kind:
            return ENTRIES[one]
    return Entry(type(metric), FURTHER, "", _summary(type(metric)))


def _summary(kind: type[Metric]) -> str:
    """The first paragraph of a metric's docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def make_metric(name: str, fields: Mapping[str, Any]) -> Metric:
    """A metric of the suite by its name.

    Args:
        name: One of `METRICS`; hyphens and spaces count as underscores.
        fields: Options that differ from the defaults.

    Raises:
        InputError: If the name or a field is unknown.

    Example:
        >>> make_metric("pointing-game", {"tolerance": 2.0})
        PointingGame(tolerance=2.0, smooth=0.0)
    """
    name = plain_name(name)
    entry = _entry(name)
    valid = fields_of(entry.kind)
    for one in fields:
        if one not in valid:
            raise InputError(
                f"{name} has no field {one!r}: expected one of {', '.join(valid) or 'none'}"
            )
    return entry.kind(**{**entry.fields, **fields})


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        near = get_close_matches(str(name), ENTRIES, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise InputError(f"metric must be one of {', '.join(ENTRIES)}: got {name!r}{hint}")
    return ENTRIES[name]


def fields_of(kind: type[Metric]) -> dict[str, Any]:
    """The fields of a metric with their defaults."""
    return {one.name: one.default for one in dataclasses.fields(kind)}  # type: ignore[arg-type]


def field_meanings(kind: type[Metric]) -> dict[str, str]:
    """The meaning of each field, from the `Args` sections of the class and its bases."""
    lines: list[str] = []
    for one in reversed(kind.__mro__[: kind.__mro__.index(Metric)]):
        section = inspect.cleandoc(one.__doc__ or "").partition("Args:\n")[2]
        lines += section.partition("\n\n")[0].splitlines()
    meanings: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith(" " * 8):
            meanings[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            meanings[name] = text
    return {name: text.replace("`", "").rstrip(".") for name, text in meanings.items()}


def plain_name(name: str) -> str:
    """A name with underscores alone, as Python and the command line take it."""
    return "_".join(str(name).replace("-", " ").split()).lower()


@dataclass(frozen=True, eq=False)
class Suite:
    """The metrics of a report and their options.

    Args:
        names: The metrics' names; None for all that the arguments of the report allow.
        quick: Whether metrics take fewer steps and samples, for a first look.
        substrate: The replacement of every metric that replaces positions.
        steps: The number of steps of the same metrics.
        seed: The seed of all metrics.
        fields: Options of single metrics by name, which take precedence.

    Raises:
        InputError: If a name or an option is unknown or invalid.

    Example:
        >>> suite = Suite(["deletion"], steps=10, fields={"deletion": {"output": "logit"}})
        >>> suite.metrics()["deletion"].steps
        10
    """

    names: Sequence[str] | None = None
    quick: bool = False
    substrate: Replacement | None = None
    steps: int | None = None
    seed: int = 0
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InputError(f"names must be several: got {self.names!r}; write [{self.names!r}]")
        if self.substrate is not None:
            check_replacement("substrate", self.substrate)
        names = self._plain_names()
        for name in self.fields:
            if name not in names:
                expected = f"expected one of {', '.join(names)}"
                raise InputError(f"fields are for {name!r}, which is not asked for: {expected}")
        self.metrics()

    def _plain_names(self) -> list[str]:
        return [plain_name(name) for name in (ENTRIES if self.names is None else self.names)]

    def metrics(self, classes: bool = True) -> dict[str, Metric]:
        """The metrics by name; `classes` says whether the model returns several classes."""
        return {name: self._metric(name, classes) for name in self._plain_names()}

    def _metric(self, name: str, classes: bool) -> Metric:
        entry = _entry(name)
        valid = fields_of(entry.kind)
        shared: dict[str, Any] = {"seed": self.seed or None}
        # Not of completeness, whose None is the maps' own baseline, nor the steps of an attack.
        if valid.get("substrate") is not None:
            shared |= {"substrate": self.substrate, "steps": self.steps}
        if not classes and valid.get("output") in CLASS_OUTPUTS:
            shared["output"] = "logit"
        shared = {one: value for one, value in shared.items() if value is not None and one in valid}
        quick = entry.quick if self.quick else {}
        return make_metric(name, {**quick, **shared, **self.fields.get(name, {})})
