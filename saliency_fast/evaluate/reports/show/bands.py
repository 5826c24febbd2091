"""Bands: mean curves with their bootstrap intervals."""

from __future__ import annotations

import torch

from saliency_fast.evaluate.outcome import RESAMPLES, Curve
from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.words import told_as
from saliency_fast.render.plots import Band, Plot


def plot_of(report: Findings, metric: str) -> Plot | None:
    """The curves of every method by a metric; None where it has none."""
    found = {name: one[metric] for name, one in report.outcomes.items() if metric in one}
    curves = {name: one.curve for name, one in found.items() if one.curve is not None}
    bands = tuple(
        band for name, curve in curves.items() if (band := _band(report, name, curve)) is not None
    )
    if not bands:
        return None
    first = next(iter(curves.values()))
    return Plot(told_as(metric), first.x_name, first.y_name, bands)


def _band(report: Findings, name: str, curve: Curve) -> Band | None:
    """The mean of examples whose curve is known, with the interval at every place."""
    y = curve.y.detach().double().cpu()
    y = y[y.isfinite().all(1)]
    if not len(y):
        return None
    generator = torch.Generator().manual_seed(report.seed)
    drawn = torch.randint(len(y), (RESAMPLES, len(y)), generator=generator, device="cpu")
    # How often each example is drawn: means of resampled curves are then one product.
    times = torch.zeros(RESAMPLES, len(y), dtype=torch.float64, device="cpu")
    times.scatter_add_(1, drawn, torch.ones_like(times))
    tail = (1.0 - report.confidence) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64, device="cpu")
    low, high = (times @ y / len(y)).quantile(ends, dim=0)
    return Band(
        told_as(name),
        tuple(curve.x.tolist()),
        tuple(y.mean(0).tolist()),
        tuple(low.tolist()),
        tuple(high.tolist()),
        name in report.controls,
    )
