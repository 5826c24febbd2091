"""Words and animations beside the maps of `saliency-fast explain`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution
from saliency_fast.cli.models import Loaded
from saliency_fast.errors import InputError
from saliency_fast.summary.animation import progress
from saliency_fast.summary.sentences import summarise


def summaries(loaded: Loaded, found: Attribution, x: Tensor) -> dict[tuple[int, ...], str]:
    """What each map says, by its place: (example,) or (example, target)."""
    if not isinstance(found.values, Tensor) or not over(found, x):
        raise InputError("--summary is about maps of the input: leave it out, or --at")
    if not found.many:
        told = summarise(loaded.model, x, found, labels=loaded.labels)
        return {(row,): str(one) for row, one in enumerate(told)}
    words: dict[tuple[int, ...], str] = {}
    for k in range(found.scores.shape[1]):
        told = summarise(loaded.model, x, one_target(found, k), labels=loaded.labels)
        words |= {(row, k): str(one) for row, one in enumerate(told)}
    return words


def over(found: Attribution, x: Tensor) -> bool:
    """Whether a map has the places of an input: those of layers may have places of their own."""
    values, axes = found.values, found.axes()
    if not isinstance(values, Tensor) or values.dim() != x.dim() + found.many:
        return False
    places = range(1, x.dim()) if axes is None else axes.places
    return all(values.shape[axis + found.many] == x.shape[axis] for axis in places)


def one_target(found: Attribution, k: int) -> Attribution:
    """The maps of each example's target `k` alone."""

    def own(value: Tensor | None) -> Any:
        return None if value is None else value[:, k]

    assert isinstance(found.values, Tensor)
    return replace(
        found,
        values=found.values[:, k],
        scores=own(found.scores),
        baseline_scores=own(found.baseline_scores),
        delta=own(found.delta),
        error=own(found.error),
        classes=own(found.classes),
        precision_error=own(found.precision_error),
        extras={name: one[:, k] for name, one in found.extras.items()},
    )


def animations(
    engine: Engine,
    x: Tensor,
    found: Attribution,
    baseline: Any,
    features: Any,
    target: Any,
    style: str,
    out: Path,
    name: str,
) -> list[Path]:
    """Writes a GIF of each example's map growing sharp, where it comes in several launches."""
    written = []
    for row in range(len(x)):
        for k in range(found.scores.shape[1]) if found.many else (None,):
            stem = name if len(x) == 1 else f"{name}.{row}"
            stem += f".{found.provenance.method}"
            stem += "" if k is None else f".map{k}"
            if found.classes is not None:
                target = int(found.classes[row] if k is None else found.classes[row, k])
            moving = progress(
                engine,
                x[row : row + 1],
                target,
                style=style,
                baseline=_of_row(baseline, row, x),
                features=_of_row(features, row, x),
            )
            if len(moving.frames) > 1:
                written.append(moving.save(out / f"{stem}.progress.gif"))
    return written


def write_words(words: str, path: Path) -> Path:
    """Writes a text; returns its path."""
    path.write_text(words + "\n", encoding="utf-8")
    return path


def _of_row(value: Any, row: int, x: Tensor) -> Any:
    """What belongs to one example, of what belongs to the batch."""
    if isinstance(value, list):
        return [_of_row(one, row, x) for one in value]
    own = isinstance(value, torch.Tensor) and value.dim() == x.dim() and len(value) == len(x)
    return value[row : row + 1] if own else value
