"""Suite: which metrics a report takes, and what each of them asks, in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.reports.entries import ENTRIES, FURTHER, Entry
from saliency_fast.evaluate.substrates import Substrate, check_substrate

_CLASSES = ("softmax", "accuracy")
"""Outputs that need several classes; without them the output counts as it is."""


class _Metrics(Mapping[str, type[Metric]]):
    """Every metric of the suite by its name, imported when it is first asked for."""

    def __getitem__(self, name: str) -> type[Metric]:
        entry = ENTRIES[name]
        module = import_module(f"saliency_fast.evaluate.{entry.place}")
        found: type[Metric] = getattr(module, entry.kind)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(ENTRIES)

    def __len__(self) -> int:
        return len(ENTRIES)


METRICS: Mapping[str, type[Metric]] = _Metrics()


def make_metric(name: str, fields: Mapping[str, Any]) -> Metric:
    """A metric by name with its fields; raises InputError with the valid ones."""
    name = plain_name(name)
    if name not in ENTRIES:
        near = get_close_matches(str(name), ENTRIES, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise InputError(f"metric must be one of {', '.join(ENTRIES)}: got {name!r}{hint}")
    kind = METRICS[name]
    valid = fields_of(kind)
    for one in fields:
        if one not in valid:
            raise InputError(
                f"{name} has no field {one!r}: expected one of {', '.join(valid) or 'none'}"
            )
    made: Metric = kind(**{**ENTRIES[name].fields, **fields})
    return made


def fields_of(kind: type[Metric]) -> dict[str, Any]:
    """The fields of a metric with their defaults."""
    found = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {one.name: _default(one) for one in found if one.init}


def name_of(metric: Metric) -> str:
    """The name of a metric as the suite and the command line have it."""
    return plain_name(metric.name)


def plain_name(name: str) -> str:
    """A name with underscores alone, as Python and the command line take it."""
    return "_".join(str(name).replace("-", " ").split()).lower()


def entry_of(metric: Metric, name: str = "") -> Entry:
    """What the suite says of a metric, under the name that a report has for it or its own; of those
    that it does not know, what their class says.
    """
    for one in (name, name_of(metric)):
        if one in ENTRIES and type(metric) is METRICS[one]:
            return ENTRIES[one]
    kind = type(metric)
    asks = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return Entry(kind.__module__, kind.__name__, FURTHER, asks, "")


@dataclass(frozen=True, eq=False)
class Suite:
    """Which metrics a report takes, and with which options.

    names: of metrics; None for all that what is given allows. quick: fewer steps and samples, for a
    look. substrate, steps: of every metric that takes places away; seed: of all. fields: of single
    metrics, by name; they win.
    """

    names: Sequence[str] | None = None
    quick: bool = False
    substrate: Substrate | None = None
    steps: int | None = None
    seed: int = 0
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InputError(f"names must be several: got {self.names!r}; write [{self.names!r}]")
        if self.substrate is not None:
            check_substrate(self.substrate)
        for name in self.fields:
            if name not in self._names:
                raise InputError(
                    f"fields are for {name!r}, which is not asked for: expected one of "
                    f"{', '.join(self._names)}"
                )
        self.metrics()

    @property
    def _names(self) -> tuple[str, ...]:
        if self.names is None:
            return tuple(ENTRIES)
        return tuple(plain_name(name) for name in self.names)

    def metrics(self, classes: bool = True) -> dict[str, Metric]:
        """The metrics by name. classes: whether the model tells several apart."""
        return {name: self._metric(name, classes) for name in self._names}

    def _metric(self, name: str, classes: bool) -> Metric:
        if name not in ENTRIES:
            # Raises with the valid names.
            return make_metric(name, {})
        own = self.fields.get(name, {})
        valid = fields_of(METRICS[name])
        shared: dict[str, Any] = {}
        # Not a baseline, which is None where it is the maps' own, and not the steps of an attack.
        if valid.get("substrate") is not None:
            shared = {"substrate": self.substrate, "steps": self.steps}
        if not classes and valid.get("output") in _CLASSES:
            shared["output"] = "logit"
        shared["seed"] = self.seed or None
        shared = {one: value for one, value in shared.items() if value is not None and one in valid}
        quick = ENTRIES[name].quick if self.quick else {}
        return make_metric(name, {**quick, **shared, **own})


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default is not dataclasses.MISSING:
        return one.default
    return None if one.default_factory is dataclasses.MISSING else one.default_factory()
