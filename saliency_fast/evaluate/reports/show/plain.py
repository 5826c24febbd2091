"""Plain: a report as what JSON can hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from saliency_fast.evaluate.outcome import Curve, Interval, Outcome
from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.words import verdicts

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


def plain_interval(interval: Interval) -> dict[str, Any]:
    found: dict[str, Any] = plain(interval)
    return found


def plain_curve(curve: Curve) -> dict[str, Any]:
    """Every example's values, whatever their number."""
    return {
        "x_name": curve.x_name,
        "y_name": curve.y_name,
        "x": plain(curve.x.tolist()),
        "y": plain(curve.y.tolist()),
    }


def plain_outcome(outcome: Outcome, interval: Interval) -> dict[str, Any]:
    """An outcome with its mean and interval, and the values of every example."""
    return {
        "metric": outcome.metric,
        "better": outcome.better,
        "mean": plain_interval(interval),
        "values": plain(outcome.values.tolist()),
        "curve": None if outcome.curve is None else plain_curve(outcome.curve),
        "passed": outcome.passed,
        "threshold": plain(outcome.threshold),
        "details": plain(outcome.details),
        "parameters": plain(outcome.parameters),
        "caveats": list(outcome.caveats),
    }


def plain_findings(findings: Findings) -> dict[str, Any]:
    """All findings but the maps, as what JSON can hold; NaN becomes None."""
    return {
        "schema": SCHEMA,
        "title": findings.title,
        "names": list(findings.names),
        "controls": list(findings.controls),
        "metrics": list(findings.metrics),
        "passed": findings.passed,
        "verdicts": [text for _, text in verdicts(findings)],
        "best": {metric: findings.best(metric) for metric in findings.metrics},
        "outcomes": {
            method: {
                metric: plain_outcome(outcome, findings.intervals[method, metric])
                for metric, outcome in found.items()
            }
            for method, found in findings.outcomes.items()
        },
        "comparisons": {
            method: {metric: plain_interval(gap) for metric, gap in gaps.items()}
            for method, gaps in findings.comparisons().items()
        },
        "agreement": plain(findings.agreement),
        "unmeasured": plain(findings.unmeasured),
        "caveats": list(findings.caveats),
        "seconds": plain(findings.seconds),
        "confidence": findings.confidence,
        "seed": findings.seed,
        "provenance": plain(findings.provenance),
    }


def as_json(findings: Findings, indent: int | None = 1) -> str:
    """All findings but the maps as JSON."""
    return json.dumps(plain_findings(findings), indent=indent, ensure_ascii=False, allow_nan=False)
