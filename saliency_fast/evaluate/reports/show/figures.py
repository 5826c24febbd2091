"""Figures of a report: curves as files, and maps over the first inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.reports.findings import Findings
from saliency_fast.evaluate.reports.show.bands import plot_of
from saliency_fast.evaluate.reports.show.words import told_as
from saliency_fast.render.files import encode
from saliency_fast.render.frames import frames, grey, picture
from saliency_fast.render.html import Figure
from saliency_fast.render.plots import plot_png

SHOWN = 4
"""Examples on the page."""
_PERCENTILE, _OPACITY = 99.0, 0.85


def write_curves(report: Findings, folder: Path) -> list[Path]:
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


def pictured(report: Findings) -> bool:
    """Whether inputs are pictures, volumes or clips."""
    return report.inputs.dim() in (4, 5) and bool(report.maps)


def slice_of(report: Findings, row: int) -> int | None:
    """Of a volume, the slice along its first axis (of a clip: the frame) with the most magnitude
    over the methods, each of which counts as much; None for pictures.
    """
    if report.inputs.dim() != 5:
        return None
    names = [name for name in report.methods if name in report.maps] or list(report.maps)
    held = [
        report.maps[name][row].detach().double().cpu().abs().flatten(1).sum(1) for name in names
    ]
    shares = [one / one.sum().clamp_min(1e-300) for one in held]
    return int(torch.stack(shares).sum(0).argmax())


def figures_of(report: Findings, row: int) -> tuple[Figure, ...]:
    """An input and every map over it; of a volume one slice, on the scale of all of it."""
    x = report.inputs[row : row + 1].detach().float().cpu()
    place = slice_of(report, row)
    box = _box(report, row, place)
    found = [_figure(_cut(picture(x)[0], place), f"input {row}", "input", box)]
    for name, maps in report.maps.items():
        shown = maps[row : row + 1].detach().float().cpu()
        drawn = frames(grey(x), shown, "signed", _PERCENTILE, _OPACITY)[0]
        told = told_as(name)
        found.append(_figure(_cut(drawn, place), f"map by {told} over input {row}", told, box))
    return tuple(found)


def _figure(
    drawn: Tensor, alt: str, caption: str, box: tuple[float, float, float, float] | None
) -> Figure:
    return Figure(encode(drawn, ".png"), "image/png", drawn.shape[1], alt, caption, box)


def _cut(drawn: Tensor, place: int | None) -> Tensor:
    return drawn if place is None else drawn[place]


def _box(report: Findings, row: int, place: int | None) -> tuple[float, float, float, float] | None:
    """The corners of the object's mask, as shares of the picture; None in slices without it."""
    if report.boxes is None:
        return None
    mask = _cut(report.boxes[row], place)
    inside = mask.nonzero()
    if not len(inside):
        return None
    height, width = mask.shape
    (top, left), (bottom, right) = inside.amin(0).tolist(), (inside.amax(0) + 1).tolist()
    return left / width, top / height, (right - left) / width, (bottom - top) / height
