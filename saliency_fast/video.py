"""Maps over time: long clips and series explained in windows that overlap."""

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
"""Of diffusion, in frames squared: stable and positive up to a half."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A map over a whole clip, and what was done for it.

    values: like the clip [B, *], or [B, K, *] for several targets: each frame's mean over windows
    that hold it. starts: the first frame of each of W windows; windows: their own attributions,
    [B * W, *], window after window of one example; scores [B, W] or [B, W, K]. coherence: width of
    the smoothing over time in frames, 0 for none. change [B]: relative L2 by which it moved the
    values away from what the model's gradients say. flicker [B, 2]: mean change from frame to frame
    over mean magnitude, before and after it.
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
    """Explains a clip [B, C, T, H, W], or a series [B, T, F] with `axis` 1, that is longer than the
    model takes, in windows of `window` frames that begin every `stride` (half a window unless
    given); the last one ends with the clip. All windows of all examples are one batch.

    target: as of `explain`, for every window; one for each example where it is a list or a tensor
    of length B. baseline: as of `explain`; a tensor as long as the clip is cut like it.
    forward_args: tensors of length B belong to the examples, and go with each of their windows.
    coherence: values are smoothed over time by so many frames where the clip stands still, less the
    more a pixel changes; their sum over time stays. It hides flicker, and real changes of what the
    model looks at with it: `Clip.change` says by how much. Noise that all frames share
    (`SmoothGrad(shared_axis=2)`) makes less of it in the first place. options: of `Engine`, where
    `model` is none yet.
    """
    starts = _starts(clip, window, stride, axis)
    if not 0.0 <= coherence < math.inf:
        raise InputError(f"coherence is a width in frames, 0 or more: got {coherence!r}")
    if isinstance(model, Engine) and options:
        raise InputError(f"an Engine has its own options: got {', '.join(options)} beside it")
    engine = model if isinstance(model, Engine) else Engine(model, **options)
    count = len(starts)
    if isinstance(baseline, Tensor) and baseline.shape[-clip.dim() + 1 :] == clip.shape[1:]:
        baseline = _windows(baseline.expand_as(clip), starts, window, axis)
    found = engine(
        _windows(clip, starts, window, axis),
        _repeated(target, len(clip), count),
        baseline,
        forward_args=tuple(_repeated(one, len(clip), count) for one in forward_args),
    )
    assert isinstance(found.values, Tensor)
    lead = axis + 1 if found.many else axis
    raw = _averaged(_apart(found.values, len(clip)), starts, window, lead, clip.shape[axis])
    values = _coherent(raw, clip, coherence, axis, lead) if coherence else raw
    norm = raw.flatten(1).norm(dim=1).clamp_min(torch.finfo(raw.dtype).tiny)
    change = (values - raw).flatten(1).norm(dim=1) / norm
    flicker = torch.stack([_flicker(raw, lead), _flicker(values, lead)], 1)
    scores = _apart(found.scores, len(clip))
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


def _repeated(value: Any, batch: int, count: int) -> Any:
    """What belongs to the examples, for each of their windows."""
    if isinstance(value, list) and len(value) == batch:
        return [one for one in value for _ in range(count)]
    own = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value.repeat_interleave(count, dim=0) if own else value


def _windows(clip: Tensor, starts: tuple[int, ...], window: int, axis: int) -> Tensor:
    """[B * W, *], the windows of one example together."""
    parts = [clip.narrow(axis, start, window) for start in starts]
    return torch.stack(parts, 1).flatten(0, 1)


def _apart(windows: Tensor, batch: int) -> Tensor:
    """[B * W, *] as [B, W, *]."""
    return windows.view(batch, -1, *windows.shape[1:])


def _averaged(
    windows: Tensor, starts: tuple[int, ...], window: int, axis: int, length: int
) -> Tensor:
    """The mean [B, *] at each frame over the windows [B, W, *] that hold it."""
    shape = list(windows[:, 0].shape)
    shape[axis] = length
    total = windows.new_zeros(shape)
    seen = torch.zeros(length, dtype=windows.dtype, device=windows.device)
    for number, start in enumerate(starts):
        total.narrow(axis, start, window).add_(windows[:, number])
        seen[start : start + window] += 1
    return total / seen.view(-1, *(1,) * (total.dim() - axis - 1))


def _coherent(values: Tensor, clip: Tensor, width: float, axis: int, lead: int) -> Tensor:
    """Diffusion along time (Perona & Malik, 1990) until `width` frames where nothing changes.

    Neighbours exchange by one conductivity for both ways, so that sums over time stay.
    """
    found, time = values.movedim(lead, -1), clip.movedim(axis, -1).to(values.dtype)
    steps = torch.diff(time, dim=-1).square()
    if steps.dim() > 3:
        # One conductivity for all channels of a pixel.
        steps = steps.mean(1, keepdim=True)
    usual = steps.flatten(1).mean(1).view(-1, *(1,) * (steps.dim() - 1))
    open_to = torch.exp(-0.5 * steps / usual.clamp_min(torch.finfo(values.dtype).tiny))
    if lead > axis:
        open_to = open_to[:, None]
    time_left = width**2 / 2.0
    count = math.ceil(time_left / LARGEST_STEP)
    for _ in range(count):
        flow = torch.diff(found, dim=-1) * open_to * (time_left / count)
        found = found + functional.pad(flow, (0, 1)) - functional.pad(flow, (1, 0))
    return found.movedim(-1, lead)


def _flicker(values: Tensor, axis: int) -> Tensor:
    """Mean absolute change from frame to frame over mean magnitude [B]."""
    size = values.flatten(1).abs().mean(1).clamp_min(torch.finfo(values.dtype).tiny)
    if values.shape[axis] == 1:
        return torch.zeros_like(size)
    return torch.diff(values, dim=axis).flatten(1).abs().mean(1) / size
