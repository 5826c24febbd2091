"""Files of a report: the page, the numbers and the curves."""

from __future__ import annotations

from pathlib import Path

from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.figures import made, write_curves
from saliency_fast.evaluate.reports.show.page import page
from saliency_fast.evaluate.reports.show.plain import as_json
from saliency_fast.render.plots import have_plots


def save(report: Findings, folder: Path, command: str = "") -> list[Path]:
    """Writes index.html, report.json and, with matplotlib, curves/*.png; returns the paths."""
    made(folder)
    html, numbers = folder / "index.html", folder / "report.json"
    html.write_text(page(report, command), encoding="utf-8")
    numbers.write_text(as_json(report), encoding="utf-8")
    curves = write_curves(report, folder / "curves") if have_plots() else []
    return [html, numbers, *curves]
