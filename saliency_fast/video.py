"""Maps of long clips and series, explained in overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError, InputTypeError

LARGEST_STEP = 0.25
"""Time step of the diffusion, in frames squared: stable and positive up to a half."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A map over a whole clip, as `explain_video` returns it.

    Attributes:
        values: Each frame's mean over its windows, like the clip [B, *]; [B, K, *] for K targets.
        starts: The first frame of each of W windows.
        windows: The attributions of the windows, [B * W, *], the windows of one example together.
        scores: The scores of the windows, [B, W] or [B, W, K].
        coherence: The width of the smoothing over time in frames, 0 for none.
        change: The relative L2 distance by which the smoothing moved the values, [B].
        flicker: The mean change between frames over the mean magnitude, raw and smoothed, [B, 2].

    Example:
        >>> frames = torch.rand(1, 3, 6, 4, 4)
        >>> clip = explain_video(lambda x: x.flatten(1).sum(1), frames, window=3, method="gradient")
        >>> clip.values.shape, clip.scores.shape
        (torch.Size([1, 3, 6, 4, 4]), torch.Size([1, 4]))
    """

    values: Tensor
    starts: tuple[int, ...]
    windows: Attribution
    scores: Tensor
    coherence: float
    change: Tensor
    flicker: Tensor


def explain_video(
    model: Engine | Callable[..., Any],
    clip: Tensor,
    window: int,
    stride: int | None = None,
    *,
    axis: int = 2,
    target: Any = None,
    baseline: Any = None,
    forward_args: tuple[Any, ...] = (),
    coherence: float = 0.0,
    **options: Any,
) -> Clip:
    """Explains a clip that is longer than the model takes, in overlapping windows.

    All windows of all examples are one batch, and the last window ends with the clip.

    Args:
        model: A model, or an `Engine` of one.
        clip: A clip [B, C, T, H, W], or a series [B, T, F] with `axis=1`.
        window: The number of frames that the model takes.
        stride: The distance of windows in frames; half a window by default.
        axis: The axis of time.
        target: As in `explain`, for every window; a list or tensor of length B holds the target of
            each example.
        baseline: As in `explain`; a tensor as long as the clip is cut into the same windows.
        forward_args: Further arguments of the model; tensors of length B belong to the examples.
        coherence: The width in frames of a smoothing over time, where the clip stands still; less
            of it the more a pixel changes (Perona & Malik, 1990). Sums over time stay. It hides
            flicker and real changes alike: `Clip.change` says how much. Noise that all frames share
            (`SmoothGrad(shared_axis=2)`) avoids flicker in the first place.
        **options: Options of `Engine`, where `model` is none.

    Returns:
        The map of the whole clip.

    Raises:
        InputError: For windows that do not fit, and what `explain` raises.

    Example:
        >>> model = lambda x: x.square().flatten(1).sum(1)
        >>> clip = torch.ones(1, 1, 8, 2, 2)
        >>> found = explain_video(model, clip, window=4, method="gradient")
        >>> found.starts, found.values.shape, float(found.values.max())
        ((0, 2, 4), torch.Size([1, 1, 8, 2, 2]), 2.0)
    """
    starts = _starts(clip, window, stride, axis)
    if not 0.0 <= coherence < math.inf:
        raise InputError(f"coherence is a width in frames, 0 or more: got {coherence!r}")
    if isinstance(model, Engine) and options:
        raise InputError(f"an Engine has its own options: got {', '.join(options)} beside it")
    engine = model if isinstance(model, Engine) else Engine(model, **options)
    batch, count = len(clip), len(starts)
    if isinstance(baseline, Tensor) and baseline.shape[-clip.dim() + 1 :] == clip.shape[1:]:
        baseline = _windows(baseline.expand_as(clip), starts, window, axis)
    further = tuple(_per_window(one, batch, count) for one in forward_args)
    points, targets = _windows(clip, starts, window, axis), _per_window(target, batch, count)
    found = engine(points, targets, baseline, forward_args=further)
    assert isinstance(found.values, Tensor)
    time_axis = axis + 1 if found.many else axis
    windows = found.values.view(batch, count, *found.values.shape[1:])
    raw = _averaged(windows, starts, window, time_axis, clip.shape[axis])
    values = _smoothed(raw, clip, coherence, axis, time_axis) if coherence else raw
    norm = raw.flatten(1).norm(dim=1).clamp_min(torch.finfo(raw.dtype).tiny)
    change = (values - raw).flatten(1).norm(dim=1) / norm
    flicker = torch.stack([_flicker(raw, time_axis), _flicker(values, time_axis)], 1)
    scores = found.scores.view(batch, count, *found.scores.shape[1:])
    return Clip(values, starts, found, scores, float(coherence), change, flicker)


def _starts(clip: Tensor, window: int, stride: int | None, axis: int) -> tuple[int, ...]:
    if not isinstance(clip, Tensor):
        raise InputTypeError(f"clip must be a tensor: got {type(clip).__name__}")
    if not 1 <= axis < clip.dim():
        raise InputError(f"axis must be one behind the batch of {list(clip.shape)}: got {axis}")
    length = clip.shape[axis]
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= length:
        raise InputError(f"window must be from 1 to the clip's {length} frames: got {window}")
    if not 1 <= stride <= window:
        raise InputError(
            f"stride must be from 1 to the window's {window} frames: got {stride}; with a larger "
            "one frames would be left out"
        )
    return (*range(0, length - window, stride), length - window)


def _per_window(value: Any, batch: int, count: int) -> Any:
    """A list or tensor of the examples, repeated for each of their windows."""
    if isinstance(value, list) and len(value) == batch:
        return [one for one in value for _ in range(count)]
    is_own = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value.repeat_interleave(count, dim=0) if is_own else value


def _windows(clip: Tensor, starts: tuple[int, ...], window: int, axis: int) -> Tensor:
    """[B * W, *], the windows of one example together."""
    parts = [clip.narrow(axis, start, window) for start in starts]
    return torch.stack(parts, 1).flatten(0, 1)


def _averaged(
    windows: Tensor, starts: tuple[int, ...], window: int, axis: int, length: int
) -> Tensor:
    """The mean [B, *] at each frame over the windows [B, W, *] that hold it."""
    shape = list(windows[:, 0].shape)
    shape[axis] = length
    total = windows.new_zeros(shape)
    covering = torch.zeros(length, dtype=windows.dtype, device=windows.device)
    for number, start in enumerate(starts):
        total.narrow(axis, start, window).add_(windows[:, number])
        covering[start : start + window] += 1
    return total / covering.view(-1, *(1,) * (total.dim() - axis - 1))


def _smoothed(values: Tensor, clip: Tensor, width: float, axis: int, time_axis: int) -> Tensor:
    """Diffusion along time (Perona & Malik, 1990), by which sums over time stay."""
    found, time = values.movedim(time_axis, -1), clip.movedim(axis, -1).to(values.dtype)
    steps = torch.diff(time, dim=-1).square()
    if steps.dim() > 3:
        # One conductivity for all channels of a pixel.
        steps = steps.mean(1, keepdim=True)
    usual = steps.flatten(1).mean(1).view(-1, *(1,) * (steps.dim() - 1))
    conductivity = torch.exp(-0.5 * steps / usual.clamp_min(torch.finfo(values.dtype).tiny))
    if time_axis > axis:
        conductivity = conductivity[:, None]
    duration = width**2 / 2.0
    count = math.ceil(duration / LARGEST_STEP)
    for _ in range(count):
        flow = torch.diff(found, dim=-1) * conductivity * (duration / count)
        found = found + functional.pad(flow, (0, 1)) - functional.pad(flow, (1, 0))
    return found.movedim(-1, time_axis)


def _flicker(values: Tensor, axis: int) -> Tensor:
    """Mean absolute change from frame to frame over mean magnitude [B]."""
    size = values.flatten(1).abs().mean(1).clamp_min(torch.finfo(values.dtype).tiny)
    if values.shape[axis] == 1:
        return torch.zeros_like(size)
    return torch.diff(values, dim=axis).flatten(1).abs().mean(1) / size
