"""Words: what a report comes to, in sentences made of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from saliency_fast.evaluate.outcome import Interval
from saliency_fast.evaluate.reports.entries import FAITHFULNESS, LOCALISATION, SANITY
from saliency_fast.evaluate.reports.findings import FEW, Findings
from saliency_fast.evaluate.reports.suite import entry_of

GOOD, BAD, PLAIN = "good", "bad", "plain"
Said = tuple[str, str]
"""GOOD, BAD or PLAIN, and a sentence."""
_SPELLED = {
    "road": "ROAD",
    "top_k_iou": "top-k IoU",
    "sensitivity_n": "sensitivity-n",
    "max_sensitivity": "max-sensitivity",
    "sanity_independent": "sanity layer by layer",
    "smoothgrad": "SmoothGrad",
    "vargrad": "VarGrad",
    "deeplift": "DeepLIFT",
    "lime": "LIME",
    "rise": "RISE",
    "lrp": "LRP",
}
"""Names that are more than words with underscores between them."""
_SANE = ": the maps depend on what the model has learned"
_INSANE = ": maps of a model that has learned nothing look much the same"


def verdicts(report: Findings) -> list[Said]:
    """What a reader should know first."""
    said = [*_checks(report), *_against_controls(report)]
    best = _winners(report)
    if best:
        said.append((PLAIN, f"Best mean: {best}."))
    said += _differences(report)
    count = len(report.unmeasured)
    if count:
        said.append((PLAIN, f"{count} of the table's cells could not be measured; see below why."))
    return [(kind, text[:1].upper() + text[1:]) for kind, text in said]


def unmeasured(report: Findings) -> list[tuple[str, str]]:
    """What was not measured, and why; once for all methods that it is true of."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in report.unmeasured:
        found.setdefault((one.metric, one.why), []).append(one.method)
    return [
        (
            f"{told_as(metric)} of {'all' if len(names) == len(report.names) else _and(names)}",
            why,
        )
        for (metric, why), names in found.items()
    ]


def verdict_of(gap: Interval, better: str) -> str:
    """Whether a difference of means is "better", "worse" or, within its interval, "unclear"."""
    if not better or not (gap.low > 0.0 or gap.high < 0.0):
        return "unclear"
    return "better" if (gap.low > 0.0) == (better == "higher") else "worse"


def _checks(report: Findings) -> list[Said]:
    said: list[Said] = []
    for metric in report.metrics:
        passed = {
            name: found[metric].passed
            for name, found in report.outcomes.items()
            if metric in found and found[metric].passed is not None
        }
        told = told_as(metric)
        good = [name for name, one in passed.items() if one and name not in report.controls]
        bad = [name for name, one in passed.items() if not one and name not in report.controls]
        fooled = [name for name, one in passed.items() if one and name in report.controls]
        caught = [name for name, one in passed.items() if not one and name in report.controls]
        sanity = entry_of(report.metrics[metric], metric).group == SANITY
        if good:
            said.append((GOOD, f"{told} passes for {_and(good)}{_SANE if sanity else ''}."))
        if bad:
            said.append((BAD, f"{told} FAILS for {_and(bad)}{_INSANE if sanity else ''}."))
        if caught:
            said.append((PLAIN, f"{told} fails for {_and(caught)}, as it should."))
        if fooled:
            text = f"{told} passes for {_and(fooled)} too, which never asked the model: beware."
            said.append((BAD, text))
    return said


def _against_controls(report: Findings) -> list[Said]:
    """Of metrics where a map that knows nothing of the model should do badly."""
    asked = [
        name
        for name, metric in report.metrics.items()
        if entry_of(metric, name).group in (FAITHFULNESS, LOCALISATION) and metric.better
    ]
    # Methods of which the same is true share a sentence.
    shared: dict[Said, list[str]] = {}
    for method in report.methods:
        ahead: list[str] = []
        level: dict[tuple[str, ...], list[str]] = {}
        for metric in asked:
            gaps = {
                control: verdict_of(gap, report.metrics[metric].better)
                for control in report.controls
                if (gap := report.gap(method, control, metric)) is not None
            }
            unbeaten = tuple(control for control, one in gaps.items() if one != "better")
            if unbeaten:
                level.setdefault(unbeaten, []).append(metric)
            elif gaps:
                ahead.append(metric)
        if ahead:
            few = len(report.inputs) < FEW
            how = "better, on these few examples," if few else "clearly better"
            text = f"{how} than {_controls(report, 'every')} by {_and(ahead)}."
            shared.setdefault((GOOD, text), []).append(method)
        if level:
            every = _controls(report, "any")
            parts = [
                f"than {every if one == report.controls else _and(one)} by {_and(metrics)}"
                for one, metrics in level.items()
            ]
            text = f"not clearly better {', nor '.join(parts)}."
            shared.setdefault((BAD, text), []).append(method)
    return [
        (kind, f"{_and(names)} {'is' if len(names) == 1 else 'are'} {text}")
        for (kind, text), names in shared.items()
    ]


def _controls(report: Findings, which: str) -> str:
    return f"{which} control" if len(report.controls) > 1 else "the control"


def _winners(report: Findings) -> str:
    if len(report.methods) < 2:
        return ""
    won: dict[str, list[str]] = {}
    for metric in report.metrics:
        name = report.best(metric)
        if name is not None:
            won.setdefault(name, []).append(metric)
    return "; ".join(f"{told_as(name)} by {_and(metrics)}" for name, metrics in won.items())


def _differences(report: Findings) -> list[Said]:
    if len(report.methods) < 2:
        return []
    first, said = report.methods[0], []
    for name, gaps in report.comparisons().items():
        parts = []
        for word in ("better", "worse"):
            found = [
                metric
                for metric, gap in gaps.items()
                if verdict_of(gap, report.metrics[metric].better) == word
            ]
            if found:
                parts.append(f"{word} by {_and(found)}")
        text = ", ".join(parts) or "neither better nor worse beyond chance"
        pair = f"{told_as(name)} against {told_as(first)}"
        said.append((PLAIN, f"{pair}, example by example: {text}."))
    return said


def _and(names: Sequence[str] | Mapping[str, object]) -> str:
    names = list(names)
    told = [told_as(name) for name in names]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def told_as(name: str) -> str:
    """A name in a sentence."""
    return _SPELLED.get(name, name.replace("_", " "))


def interval_text(interval: Interval) -> tuple[str, str]:
    """A mean and the ends of its interval, with the digits that the interval's width deserves."""
    if interval.count == 0:
        return "\N{EN DASH}", ""
    width = interval.high - interval.low
    if width <= 1e-9 * abs(interval.mean):
        # Rounding, and no spread.
        width = 0.0
    digits = _digits(width if width > 0 else abs(interval.mean), width > 0)
    if digits is None:
        mean, low, high = (f"{one:.2e}" for one in (interval.mean, interval.low, interval.high))
    else:
        mean, low, high = (
            f"{one:.{digits}f}" for one in (interval.mean, interval.low, interval.high)
        )
    if width <= 0:
        return _minus(mean), "no spread" if interval.count > 1 else "one example"
    return _minus(mean), _minus(f"{low} \N{HORIZONTAL ELLIPSIS} {high}")


def _digits(scale: float, two: bool) -> int | None:
    """Decimals that show two digits of `scale`, or three; None where they would be too many."""
    if scale == 0:
        return 0
    place = math.floor(math.log10(scale))
    digits = (1 if two else 2) - place
    return max(0, digits) if -4 < digits <= 5 else None


def _minus(text: str) -> str:
    """With a typographic minus, and none before a zero."""
    parts = text.split(" ")
    zeros = [part.lstrip("-") if not part.strip("-0.") else part for part in parts]
    return " ".join(zeros).replace("-", "\N{MINUS SIGN}")
