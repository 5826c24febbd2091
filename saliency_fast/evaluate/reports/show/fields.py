"""Fields: what a metric's docstring says of each of its options."""

from __future__ import annotations

import re

from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.reports.suite import fields_of


def meanings(kind: type[Metric]) -> dict[str, str]:
    """By field, what the class or one of its bases says of it, as "name: what it is."."""
    found: dict[str, str] = {}
    names = list(fields_of(kind))
    if not names:
        return found
    marks = re.compile(rf"\b((?:{'|'.join(names)})(?:(?:, | and )(?:{'|'.join(names)}))*): ")
    for one in kind.__mro__:
        if not (isinstance(one, type) and issubclass(one, Metric)) or one is Metric:
            continue
        for paragraph in (one.__dict__.get("__doc__") or "").split("\n\n"):
            parts = marks.split(" ".join(paragraph.split()))
            for heads, told in zip(parts[1::2], parts[2::2], strict=True):
                for name in re.split(r", | and ", heads):
                    found.setdefault(name, _plain(told))
    return found


def _plain(told: str) -> str:
    """Without what is said of the results, and without marks of code."""
    return told.partition(" Details: ")[0].replace("`", "").strip().rstrip(".")
