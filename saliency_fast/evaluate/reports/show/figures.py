"""Figures of a report: curves as files, and maps over the first inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.reports.show.bands import plot_of
from saliency_fast.render.files import encode
from saliency_fast.render.frames import frames, grey, picture
from saliency_fast.render.parts import Figure
from saliency_fast.render.plots import plot_png

if TYPE_CHECKING:
    from saliency_fast.evaluate.reports.report import Report

SHOWN = 4
"""Examples on the page."""
_PERCENTILE, _OPACITY = 99.0, 0.85


def write_curves(report: Report, folder: Path) -> list[Path]:
    """Writes METRIC.png for each metric with curves into `folder`; raises without matplotlib."""
    written = []
    for metric in report.metrics:
        plot = plot_of(report, metric)
        if plot is not None:
            drawn = plot_png(plot)
            made(folder)
            path = folder / f"{file_name(metric)}.png"
            path.write_bytes(drawn)
            written.append(path)
    return written


def made(folder: Path) -> Path:
    """A folder, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error
    return folder


def file_name(metric: str) -> str:
    return "".join(one if one.isalnum() or one in "._-" else "_" for one in metric)


def pictured(report: Report) -> bool:
    """Whether inputs are pictures."""
    return report.inputs.dim() == 4 and bool(report.maps)


def figures_of(report: Report, row: int) -> tuple[Figure, ...]:
    """An input and every map over it."""
    x = report.inputs[row : row + 1].detach().float().cpu()
    box = _box(report, row)
    found = [_figure(picture(x)[0], f"input {row}", "input", box)]
    for name, maps in report.maps.items():
        shown = maps[row : row + 1].detach().float().cpu()
        drawn = frames(grey(x), shown, "signed", _PERCENTILE, _OPACITY)[0]
        told = name.replace("_", " ")
        found.append(_figure(drawn, f"map by {told} over input {row}", told, box))
    return tuple(found)


def _figure(
    drawn: Tensor, alt: str, caption: str, box: tuple[float, float, float, float] | None
) -> Figure:
    return Figure(encode(drawn, ".png"), "image/png", drawn.shape[1], alt, caption, box)


def _box(report: Report, row: int) -> tuple[float, float, float, float] | None:
    """The corners of the object's mask, as shares of the picture."""
    if report.boxes is None:
        return None
    inside = report.boxes[row].nonzero()
    height, width = report.boxes[row].shape
    (top, left), (bottom, right) = inside.amin(0).tolist(), (inside.amax(0) + 1).tolist()
    return left / width, top / height, (right - left) / width, (bottom - top) / height
