"""Animation: a map while its points are computed, with its estimated error in every frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
from saliency_fast.engines import Engine, engine_like
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import Target
from saliency_fast.render.frames import frames as overlay
from saliency_fast.render.frames import write_frames
from saliency_fast.render.pages import percent_text

WIDTH = 192
"""Pictures are enlarged by whole numbers to about this width, so that the text fits."""
BAR, STRIP = 4, 16
"""Rows of the progress bar and of the text below it."""
PAPER, INK, TRACK, FILL = (250, 250, 250), (30, 30, 30), (215, 215, 215), (60, 110, 190)
PERCENTILE, OPACITY = 99.0, 0.85


@dataclass(frozen=True)
class Moment:
    """An intermediate map.

    Attributes:
        values: The map with its channels reduced, [1, *spatial].
        error: Its estimated relative L2 error; NaN where it is unknown.
        points: The number of points so far.
    """

    values: Tensor
    error: float
    points: int


@dataclass(frozen=True, eq=False)
class Progress:
    """Pictures of a map while its points are computed; `progress` has an example.

    Attributes:
        frames: uint8 [T, H, W, 3]: the picture enlarged `zoom` times, a bar of points and a text.
        moments: The map in each frame.
        zoom: The enlargement.
        size: The (rows, columns) of the enlarged picture alone.
    """

    frames: Tensor
    moments: tuple[Moment, ...]
    zoom: int
    size: tuple[int, int]

    def save(self, path: str | Path, frames_per_second: float = 8.0) -> Path:
        """Writes a .gif, .apng or .mp4 file, in which the last frame stays for a second.

        Args:
            path: The file; its extension chooses the format.
            frames_per_second: The speed.

        Returns:
            The path.
        """
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
    """Draws the map of one input after every launch.

    All frames share the colour scale of the last, which is `Attribution.overlay`. Of videos and
    volumes the frame that holds most of the map is shown.

    Args:
        stream: An engine, whose launches are made small enough, or the output of `Engine.stream`.
        inputs: One image, video or volume [1, C, *spatial].
        style: "signed" or "heat", as in `Attribution.overlay`.
        frames: The largest number of frames.
        target, baseline, features, forward_args, forward_kwargs: As in `explain`, with an engine.

    Returns:
        The frames with their maps.

    Raises:
        InputError: If there is no picture, or several maps.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> engine = Engine(model, "smoothgrad")
        >>> found = progress(engine, torch.rand(1, 1, 8, 8), target=0, frames=4)
        >>> found.frames.shape, found.zoom
        (torch.Size([4, 212, 192, 3]), 24)
    """
    if not isinstance(inputs, Tensor):
        raise InputTypeError(f"inputs must be one tensor: got {type(inputs).__name__}")
    if len(inputs) != 1 or inputs.dim() not in (4, 5):
        cure = "pass x[:1]" if inputs.dim() in (4, 5) else "features and signals have no pictures"
        raise InputError(
            "an animation is of one image, video or volume [1, C, *spatial]: got "
            f"{list(inputs.shape)}; {cure}"
        )
    checks.integer("frames", frames, 1)
    if isinstance(stream, Engine):
        about: dict[str, Any] = {"forward_args": forward_args, "forward_kwargs": forward_kwargs}
        about["features"] = features
        plan = stream.plan(inputs, target, baseline, **about)
        points = max(1, min(plan.points_per_launch, -(-plan.points // frames)))
        few = engine_like(stream, stream.model, points_per_launch=points, progress=False)
        stream = few.stream(inputs, target, baseline, **about)
    moments, axes = list[Moment](), None
    for one in stream:
        moments.append(_moment(one, inputs, style))
        axes = one.axes()
    if axes is None:
        raise InputError("stream holds no map: expected one Attribution or more")
    count, several = min(frames, len(moments)), len(moments)
    moments = [moments[((number + 1) * several) // count - 1] for number in range(count)]
    inputs, last = axes.standard(inputs), moments[-1]
    scale = ops.magnitude_percentile(last.values.reshape(1, -1), PERCENTILE)
    pictures = [overlay(inputs, m.values, style, PERCENTILE, OPACITY, scale)[0] for m in moments]
    if inputs.dim() == 5:
        strongest = int(last.values[0].double().abs().sum((1, 2)).argmax())
        pictures = [one[strongest] for one in pictures]
    rows, columns = pictures[0].shape[:2]
    zoom = max(1, round(WIDTH / columns))
    pairs = zip(pictures, moments, strict=True)
    framed = [_framed(one.cpu(), zoom, moment, last.points) for one, moment in pairs]
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
    """Writes `progress` as an animation.

    Args:
        stream, inputs, target, **fields: As in `progress`.
        path, frames_per_second: As in `Progress.save`, whose path this returns.

    Example:
        >>> import tempfile
        >>> engine = Engine(torch.nn.Flatten(), "smoothgrad")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     animate(engine, torch.rand(1, 1, 8, 8), 0, f"{folder}/map.gif", frames=4).name
        'map.gif'
    """
    if not 0.0 < frames_per_second < math.inf:
        raise InputError(f"frames_per_second must be positive: got {frames_per_second!r}")
    return progress(stream, inputs, target, **fields).save(path, frames_per_second)


def _moment(result: Attribution, inputs: Tensor, style: str) -> Moment:
    if result.many or not isinstance(result.values, Tensor):
        raise InputError("an animation is of one map: got several targets or inputs; take one")
    values, axes = result.map("sum" if style == "signed" else "l2"), result.axes()
    assert isinstance(values, Tensor)
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
    return Moment(values.clone(), float(result.error[0]), int(result.points[0]))


def _framed(picture: Tensor, zoom: int, moment: Moment, total: int) -> Tensor:
    """A picture [H, W, 3] enlarged, above a bar of the points so far and a line of text."""
    from PIL import Image, ImageDraw

    large = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    width = large.shape[1]
    below = Image.new("RGB", (width, BAR + STRIP), PAPER)
    draw = ImageDraw.Draw(below)
    draw.rectangle((0, 0, width - 1, BAR - 1), fill=TRACK)
    done = round(width * moment.points / max(1, total))
    if done:
        draw.rectangle((0, 0, done - 1, BAR - 1), fill=FILL)
    draw.text((3, BAR + 2), caption(moment, total), fill=INK)
    return torch.cat([large, torch.from_numpy(np.array(below))])


def caption(moment: Moment, total: int) -> str:
    error = "unknown" if math.isnan(moment.error) else percent_text(moment.error)
    return f"{moment.points}/{total} points, error {error}"
