"""A report as files: JSON, the page, and plots of its curves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, mean_ends
from saliency_fast.evaluate.reports.data import ReportData
from saliency_fast.evaluate.reports.text import spelled, verdicts
from saliency_fast.render.plots import Band, Plot, plot_png

SCHEMA = 1
"""Of the JSON."""
MOST = 4096
"""Elements up to which a tensor among details is written out."""


def plain(value: Any) -> Any:
    """Numbers, text, lists and mappings with text for keys; what is not finite becomes None."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        if value.numel() > MOST:
            return f"tensor {list(value.shape)}"
        return plain(value.detach().cpu().tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, Iterable):
        return [plain(one) for one in value]
    return str(value)


def _outcome_dict(outcome: Outcome, interval: Interval) -> dict[str, Any]:
    """An outcome with its mean and interval, and the values of every example."""
    curve = outcome.curve
    return {
        "metric": outcome.metric,
        "better": outcome.better,
        "mean": plain(interval),
        # As lists, which are written out whatever their number.
        "values": plain(outcome.values.tolist()),
        "curve": None
        if curve is None
        else {
            "x_name": curve.x_name,
            "y_name": curve.y_name,
            "x": plain(curve.x.tolist()),
            "y": plain(curve.y.tolist()),
        },
        "passed": outcome.passed,
        "threshold": plain(outcome.threshold),
        "details": plain(outcome.details),
        "parameters": plain(outcome.parameters),
        "caveats": list(outcome.caveats),
    }


def report_dict(report: ReportData) -> dict[str, Any]:
    """All of a report except the maps, as JSON holds it; NaN becomes None."""
    return {
        "schema": SCHEMA,
        "title": report.title,
        "names": list(report.names),
        "controls": list(report.controls),
        "metrics": list(report.metrics),
        "passed": report.passed,
        "verdicts": [text for _, text in verdicts(report)],
        "best": {metric: report.best(metric) for metric in report.metrics},
        "outcomes": {
            method: {
                metric: _outcome_dict(outcome, report.intervals[method, metric])
                for metric, outcome in by_metric.items()
            }
            for method, by_metric in report.outcomes.items()
        },
        "comparisons": plain(report.comparisons()),
        "agreement": plain(report.agreement),
        "unmeasured": plain(report.unmeasured),
        "caveats": list(report.caveats),
        "seconds": plain(report.seconds),
        "confidence": report.confidence,
        "seed": report.seed,
        "provenance": plain(report.provenance),
    }


def as_json(report: ReportData, indent: int | None = 1) -> str:
    """All of a report except the maps as JSON."""
    return json.dumps(report_dict(report), indent=indent, ensure_ascii=False, allow_nan=False)


def write_curves(report: ReportData, folder: Path) -> list[Path]:
    """Writes METRIC.png for each metric with curves into `folder`; raises without matplotlib."""
    written = []
    for metric in report.metrics:
        plot = plot_of(report, metric)
        if plot is not None:
            drawn = plot_png(plot)
            make_folder(folder)
            name = "".join(one if one.isalnum() or one in "._-" else "_" for one in metric)
            path = folder / f"{name}.png"
            path.write_bytes(drawn)
            written.append(path)
    return written


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error


def plot_of(report: ReportData, metric: str) -> Plot | None:
    """The mean curves of every method by a metric, with intervals; None where it has none."""
    found = {name: one[metric].curve for name, one in report.outcomes.items() if metric in one}
    curves = {name: one for name, one in found.items() if one is not None}
    bands = [_band(report, name, curve) for name, curve in curves.items()]
    known = tuple(band for band in bands if band is not None)
    if not known:
        return None
    first = next(iter(curves.values()))
    return Plot(spelled(metric), first.x_name, first.y_name, known)


def _band(report: ReportData, name: str, curve: Curve) -> Band | None:
    """The mean of the finite curves, with its interval at every x."""
    y = curve.y.detach().double().cpu()
    y = y[y.isfinite().all(1)]
    if not len(y):
        return None
    low, high = mean_ends(y, report.confidence, report.seed)
    x, mean, low, high = (tuple(row.tolist()) for row in (curve.x, y.mean(0), low, high))
    return Band(spelled(name), x, mean, low, high, name in report.controls)
