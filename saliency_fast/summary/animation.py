"""Animation: how a map grows sharp while its points come in, with its error in every frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.attribution import Attribution
from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.features import Features
from saliency_fast.engine.plan import Plan
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.targets import Target
from saliency_fast.render.files import write_frames
from saliency_fast.render.frames import frames as drawn
from saliency_fast.render.parts import percent_text

WIDTH = 192
"""Pictures are enlarged by whole numbers until they are about this wide, so that text fits."""
BAR, STRIP = 4, 16
"""Rows of the bar and of the text under it."""
PAPER, INK, TRACK, FILL = (250, 250, 250), (30, 30, 30), (215, 215, 215), (60, 110, 190)
PERCENTILE, OPACITY = 99.0, 0.85


@dataclass(frozen=True)
class Moment:
    """A map on the way: values with their channels reduced [1, *spatial], its estimated relative
    L2 error (NaN where it is unknown) and the points that it rests on.
    """

    values: Tensor
    error: float
    points: int


@dataclass(frozen=True, eq=False)
class Progress:
    """Pictures of a map on its way.

    frames: uint8 [T, H, W, 3], the picture enlarged `zoom` times, a bar of points and a line of
    text below. moments: what each shows. size: (rows, columns) of the picture alone, enlarged.
    """

    frames: Tensor
    moments: tuple[Moment, ...]
    zoom: int
    size: tuple[int, int]

    def save(self, path: str | Path, frames_per_second: float = 8.0) -> Path:
        """Writes .gif, .apng or .mp4, by extension; the last frame stays for a second."""
        rest = self.frames[-1:].expand(max(0, round(frames_per_second) - 1), *self.frames.shape[1:])
        return write_frames(torch.cat([self.frames, rest]), path, frames_per_second)


def progress(
    stream: Engine | Iterable[Attribution],
    inputs: Tensor,
    target: Target = None,
    *,
    style: str = "signed",
    frames: int = 24,
    baseline: Baseline = None,
    features: Features = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Progress:
    """At most `frames` pictures of the map of one image, video or volume [1, C, *spatial].

    stream: an engine, whose launches are made small enough for so many frames, or what
    `Engine.stream` yields. All frames share the colour scale of the last, which is
    `Attribution.overlay`. Of videos and volumes the frame that holds most of the map is shown.
    """
    _check(inputs, frames)
    if isinstance(stream, Engine):
        further = {
            "forward_args": forward_args,
            "forward_kwargs": forward_kwargs,
            "features": features,
        }
        plan = stream.plan(inputs, target, baseline, **further)
        finer = _finer(stream, plan, frames)
        stream = finer.stream(inputs, target, baseline, **further)
    found, axes = list[Moment](), None
    for one in stream:
        found.append(_moment(one, inputs, style))
        axes = one.axes()
    moments = _thinned(found, frames)
    if not moments:
        raise InputError("stream holds no map: expected one Attribution or more")
    assert axes is not None
    inputs = axes.standard(inputs)
    scale = ops.magnitude_percentile(moments[-1].values.reshape(1, -1), PERCENTILE)
    pictures = [drawn(inputs, one.values, style, PERCENTILE, OPACITY, scale)[0] for one in moments]
    if inputs.dim() == 5:
        best = int(moments[-1].values[0].double().abs().sum((1, 2)).argmax())
        pictures = [one[best] for one in pictures]
    rows, columns = pictures[0].shape[:2]
    zoom = max(1, round(WIDTH / columns))
    total = moments[-1].points
    framed = [
        _framed(one.cpu(), zoom, at, total) for one, at in zip(pictures, moments, strict=True)
    ]
    return Progress(torch.stack(framed), tuple(moments), zoom, (rows * zoom, columns * zoom))


def animate(
    stream: Engine | Iterable[Attribution],
    inputs: Tensor,
    target: Target = None,
    path: str | Path = "progress.gif",
    *,
    frames_per_second: float = 8.0,
    **fields: Any,
) -> Path:
    """Writes `progress` as .gif, .apng or .mp4, by extension; returns the path."""
    if not 0.0 < frames_per_second < math.inf:
        raise InputError(f"frames_per_second must be positive: got {frames_per_second!r}")
    return progress(stream, inputs, target, **fields).save(path, frames_per_second)


def _check(inputs: object, frames: object) -> None:
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    if len(inputs) != 1 or inputs.dim() not in (4, 5):
        cure = "pass x[:1]" if inputs.dim() in (4, 5) else "features and signals have no pictures"
        raise InputError(
            "an animation is of one image, video or volume [1, C, *spatial]: got "
            f"{list(inputs.shape)}; {cure}"
        )
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise InputError(f"frames must be a whole number, 1 or more: got {frames!r}")


def _finer(engine: Engine, plan: Plan, frames: int) -> Engine:
    """An engine like this one, whose launches take few enough points."""
    return Engine(
        engine.model,
        engine.method,
        precision=engine.precision,
        tolerance=engine.tolerance,
        memory_budget=engine.limits.memory_budget,
        points_per_launch=max(1, min(plan.points_per_launch, -(-plan.points // frames))),
        lean=engine.lean,
        hashes=False,
        graphs=engine.graphs,
        layout=engine.layout,
    )


def _moment(found: Attribution, inputs: Tensor, style: str) -> Moment:
    if found.many or not isinstance(found.values, Tensor):
        raise InputError("an animation is of one map: got several targets or inputs; take one")
    values = found.map("sum" if style == "signed" else "l2")
    assert isinstance(values, Tensor)
    axes = found.axes()
    if axes is None:
        raise InputError(
            f"which axis of the input {list(inputs.shape)} holds its channels is not known: pass "
            "layout= to the engine, such as 'BTCHW'"
        )
    if values.shape != (1, *axes.size(inputs.shape)):
        raise InputError(
            f"the map does not lie over the input: got {list(values.shape)}, expected "
            f"{[1, *inputs.shape[2:]]}; maps of layers have no picture"
        )
    return Moment(values.clone(), float(found.error[0]), int(found.points[0]))


def _thinned(moments: Sequence[Moment], count: int) -> list[Moment]:
    """So many of them at most, evenly, the last one among them."""
    if len(moments) <= count:
        return list(moments)
    picks = [((number + 1) * len(moments)) // count - 1 for number in range(count)]
    return [moments[one] for one in picks]


def _framed(picture: Tensor, zoom: int, at: Moment, total: int) -> Tensor:
    """A picture [H, W, 3] enlarged, above a bar of the points so far and a line of text."""
    from PIL import Image, ImageDraw

    large = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    width = large.shape[1]
    below = Image.new("RGB", (width, BAR + STRIP), PAPER)
    draw = ImageDraw.Draw(below)
    draw.rectangle((0, 0, width - 1, BAR - 1), fill=TRACK)
    done = round(width * at.points / max(1, total))
    if done:
        draw.rectangle((0, 0, done - 1, BAR - 1), fill=FILL)
    draw.text((3, BAR + 2), caption(at, total), fill=INK)
    return torch.cat([large, torch.from_numpy(np.array(below))])


def caption(at: Moment, total: int) -> str:
    """What is written under a frame."""
    error = "unknown" if math.isnan(at.error) else percent_text(at.error)
    return f"{at.points}/{total} points, error {error}"
