"""Judging: every metric of every row, with what could not be measured and why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from saliency_fast.errors import InputError, InputTypeError, SaliencyError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.reports.rows import Row
from saliency_fast.evaluate.reports.suite import Suite, make_metric, name_of, plain_name
from saliency_fast.evaluate.subject import Subject

MAPS = "maps"
"""What stands for a metric where a method's maps could not be made."""


@dataclass(frozen=True)
class Missing:
    """What was not measured, and why; metric is "maps" where a method gave no maps."""

    method: str
    metric: str
    why: str


@dataclass
class Judged:
    """What the rows got, filled row by row; a row without maps has no outcomes."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    unmeasured: list[Missing] = field(default_factory=list)


def read_metrics(given: Any, seed: int, boxes: bool, classes: bool) -> dict[str, Metric]:
    """The metrics of a report by name; raises where one cannot be had. boxes, classes: whether
    there are any.
    """
    if given is None or isinstance(given, Suite):
        suite = Suite(seed=seed) if given is None else given
        found = suite.metrics(classes)
        asked = suite.names is not None
        if not asked and not boxes:
            found = {name: one for name, one in found.items() if "masks" not in one.needs}
    else:
        found, asked = dict(_named(given)), True
    blind = [name for name, one in found.items() if "masks" in one.needs]
    if asked and blind and not boxes:
        raise InputError(
            f"{', '.join(blind)} need to know where the object is: pass boxes=, or leave them out"
        )
    if not found:
        raise InputError("metrics must hold one at least: got none")
    return found


def _named(given: Any) -> Iterator[tuple[str, Metric]]:
    if isinstance(given, (str, Metric)):
        given = [given]
    if not isinstance(given, (Mapping, Sequence)):
        raise InputTypeError(
            "metrics must be metrics such as Deletion(), their names, a mapping from names, or a "
            f"Suite: got {type(given).__name__}"
        )
    pairs = given.items() if isinstance(given, Mapping) else ((None, one) for one in given)
    taken = set()
    for name, one in pairs:
        metric = make_metric(one, {}) if isinstance(one, str) else one
        if not isinstance(metric, Metric):
            made = f"; make one with {one.__name__}()" if isinstance(one, type) else ""
            raise InputTypeError(f"metrics must be metrics such as Deletion(): got {one!r}{made}")
        if name is None:
            name = plain_name(one) if isinstance(one, str) else name_of(metric)
        if name in taken:
            raise InputError(
                f"metrics must have names of their own: {name} is there twice; pass a mapping "
                "from names"
            )
        taken.add(name)
        yield name, metric


def judge(
    rows: Sequence[Row], base: Subject, metrics: Mapping[str, Metric], progress: bool
) -> Judged:
    """Explains and judges every row. A metric that cannot say anything of a row is kept with its
    reason; where none of them can, the first error is raised.
    """
    judged, first = Judged(), None
    with tqdm(total=len(rows) * (len(metrics) + 1), disable=not progress, leave=False) as bar:
        for row in rows:
            bar.set_description(row.name)
            for error in _row(judged, row, base, metrics, bar):
                first = first or error
    if first is not None and not any(judged.outcomes.values()):
        raise first
    return judged


def _row(
    judged: Judged, row: Row, base: Subject, metrics: Mapping[str, Metric], bar: Any
) -> Iterator[Exception]:
    """Fills in one row and yields the errors on the way."""
    judged.outcomes[row.name], judged.seconds[row.name] = {}, {}
    begun = time.perf_counter()
    try:
        subject, notes, judged.about[row.name] = row.subject(base)
    # A model may raise anything; the report tells what and of whom.
    except Exception as error:
        judged.unmeasured.append(Missing(row.name, MAPS, _why(error)))
        bar.update(1 + len(metrics))
        yield error
        return
    judged.maps[row.name] = subject.places
    judged.caveats += [f"{row.name}: {note}" for note in notes]
    judged.seconds[row.name][MAPS] = time.perf_counter() - begun
    bar.update()
    for name, metric in metrics.items():
        bar.set_description(f"{row.name}, {name}")
        begun = time.perf_counter()
        missing = metric.missing(subject)
        try:
            if missing is None:
                judged.outcomes[row.name][name] = metric.judge(subject)
                judged.seconds[row.name][name] = time.perf_counter() - begun
            else:
                judged.unmeasured.append(Missing(row.name, name, _NEEDS[missing]))
        except Exception as error:
            judged.unmeasured.append(Missing(row.name, name, _why(error)))
            yield error
        bar.update()


_NEEDS = {
    "method": "it explains again, and of these maps it is not known how they are made",
    "masks": "it needs boxes",
    "model": "it needs the model",
}


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SaliencyError) else f"{type(error).__name__}: {text}"
