"""Baselines: what an input is compared with, from None, a number, a tensor or a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast._types import Inputs
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.model.casts import cast
from saliency_fast.model.layout import Layouts, standard_layouts
from saliency_fast.ops import philox, random_bits

MISSING = (
    "values that are missing are for methods that read scores alone, such as feature_ablation, "
    "occlusion, shapley_values or kernel_shap"
)
Baseline = float | str | Tensor | tuple[Any, ...] | list[Any] | None


def blur(x: Tensor, number: int) -> Tensor:
    """Gaussian blur over the places, sigma 5 % of each axis (11 at 224)."""
    return gaussian(x, 0.05)


def gaussian(x: Tensor, share: float) -> Tensor:
    """Gaussian blur over the axes behind the channels, sigma a share of each axis."""
    for axis in range(2, x.dim()):
        x = blur_axis(x, axis, share)
    return x


def blur_axis(x: Tensor, axis: int, share: float) -> Tensor:
    """Gaussian blur along one axis, sigma a share of it, with the ends repeated."""
    size = x.shape[axis]
    sigma = share * size
    reach = min(math.ceil(4.0 * sigma), size - 1)
    if reach < 1:
        return x
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    lanes = x.movedim(axis, -1)
    padded = functional.pad(lanes.reshape(-1, 1, size), (reach, reach), mode="replicate")
    blurred = functional.conv1d(padded, kernel.view(1, 1, -1))
    return blurred.view(lanes.shape).movedim(-1, axis).contiguous()


def mean(x: Tensor, number: int) -> Tensor:
    """Each example's mean per channel; over all features where there are no further axes."""
    axes = tuple(range(2, x.dim())) if x.dim() > 2 else (1,)
    return x.mean(axes, keepdim=True).expand_as(x).contiguous()


def uniform(x: Tensor, number: int) -> Tensor:
    """Uniform noise within each example's own range, the same for any batch; `number` varies it."""
    rows = torch.zeros(1, dtype=torch.int64, device=x.device)
    bits = random_bits(rows, rows + number, x[0].numel(), 0, philox.BASELINE)
    share = ((bits >> 8).double() * 2.0**-24).view(1, *x.shape[1:])
    low, high = torch.aminmax(x.flatten(1), dim=1)
    shape = (-1, *(1,) * (x.dim() - 1))
    noise: Tensor = low.view(shape) + (high - low).view(shape) * share
    # A share of the range of floating point inputs is rounded to their type.
    return (noise.to(x.dtype) if x.is_floating_point() else noise).contiguous()


NAMED: dict[str, Callable[[Tensor, int], Tensor]] = {"blur": blur, "mean": mean, "uniform": uniform}
"""By name, of inputs in their standard form [B, C, *places]."""


@dataclass(frozen=True)
class _Named:
    """Makes the named baselines of inputs in their layouts."""

    layouts: Layouts
    number: int = 0

    def made(self, name: str, x: Tensor, at: int) -> Tensor:
        if name not in NAMED:
            raise InputError(f"baseline: the names are {', '.join(NAMED)}: got {name!r}")
        if x.is_floating_point():
            found = self._of(name, x, at)
            if not bool(found.isfinite().all()):
                raise InputError(
                    f"baseline={name!r} is computed from the input, which holds NaN or infinity; "
                    "pass a number or a tensor"
                )
            return found
        cure = f"baseline={name!r} is for floating point inputs; pass a tensor of {x.dtype}"
        return cast(self._of(name, x.double(), at), x.dtype, "the baseline", cure)

    def _of(self, name: str, x: Tensor, at: int) -> Tensor:
        if name == "uniform":
            return uniform(x, self.number)
        need = self.layouts.spatial if name == "blur" else self.layouts.need
        axes = need(at, f"baseline={name!r}")
        return axes.back(NAMED[name](axes.standard(x), self.number)).contiguous()


def choices(baseline: Baseline) -> list[Any]:
    """The baselines to average over: a list holds several, anything else is one."""
    if not isinstance(baseline, list):
        return [baseline]
    if not baseline:
        raise InputError("baseline is an empty list: pass None for zeros, or at least one baseline")
    return baseline


def read_baselines(
    baseline: Any,
    inputs: Inputs,
    number: int = 0,
    layouts: Layouts | None = None,
    *,
    missing: bool = False,
) -> Inputs:
    """One baseline [B | 1, *] per input, in its dtype; a tuple gives each input its own.

    layouts: of the inputs, in their standard form unless given. missing: whether NaN and infinity
    are allowed, for methods that read scores alone. What an input does not have cannot be taken
    away: where it holds NaN, its baseline does too.

    Raises InputError where the dtype of an input cannot hold its baseline.
    """
    named = _Named(layouts or standard_layouts(inputs), number)
    parts = zip(_per_input(baseline, inputs), inputs, strict=True)
    found = tuple(_one(part, x, named, at) for at, (part, x) in enumerate(parts))
    if missing:
        return tuple(_also_missing(one, x) for one, x in zip(found, inputs, strict=True))
    for one in found:
        _need_finite(one)
    return found


def _also_missing(baseline: Tensor, x: Tensor) -> Tensor:
    absent = x.isnan()
    return torch.where(absent, x, baseline) if bool(absent.any()) else baseline


def read_baseline_set(baseline: Baseline, inputs: Inputs, layouts: Layouts | None = None) -> Inputs:
    """A set of baselines [M, *] per input, the same M for all, shared by the examples."""
    if isinstance(baseline, list):
        sets = [read_baseline_set(one, inputs, layouts) for one in choices(baseline)]
        return tuple(torch.cat(parts) for parts in zip(*sets, strict=True))
    named, parts = _Named(layouts or standard_layouts(inputs)), _per_input(baseline, inputs)
    found = tuple(
        _rows_of_set(part, x, named, at)
        for at, (part, x) in enumerate(zip(parts, inputs, strict=True))
    )
    for one in found:
        _need_finite(one)
    if len({len(one) for one in found}) > 1:
        raise InputError(
            "baseline: every input needs the same number of baselines: got "
            f"{[len(one) for one in found]}"
        )
    return found


def _rows_of_set(part: Any, x: Tensor, named: _Named, at: int) -> Tensor:
    if isinstance(part, Tensor) and part.dim() == x.dim() and part.shape[1:] == x.shape[1:]:
        if len(part) == 0:
            raise InputError(
                f"baseline: the set is empty: got {list(part.shape)}, expected at least one row"
            )
        return _like(part, x)
    if isinstance(part, Tensor) and part.dim() == x.dim() and len(part) > 1:
        raise InputError(
            f"baseline: a set must be [M, *] with the shape of an example behind M: got "
            f"{list(part.shape)}, expected {['M', *x.shape[1:]]}"
        )
    one = _one(part, x[:1] if not isinstance(part, str) else x, named, at)
    if len(one) > 1:
        raise InputError(
            f"baseline={part!r} differs between examples, and a set of baselines is shared by "
            "them; pass a tensor [M, ...], or one example at a time"
        )
    return one


def _per_input(baseline: Any, inputs: Inputs) -> Sequence[Any]:
    if not isinstance(baseline, tuple):
        return [baseline] * len(inputs)
    if len(baseline) != len(inputs):
        raise InputError(
            f"baseline: a tuple holds one baseline per input: got {len(baseline)}, expected "
            f"{len(inputs)}; a set of baselines is a list"
        )
    return baseline


def _one(part: Any, x: Tensor, named: _Named, at: int) -> Tensor:
    if isinstance(part, str):
        return named.made(part, x, at)
    if part is None:
        return torch.zeros_like(x[:1], memory_format=torch.contiguous_format)
    part = _like(_as_tensor(part, x), x)
    batched = part.dim() == x.dim() and len(part) != 1
    try:
        spread: Tensor = part.expand_as(x if batched else x[:1])
    except RuntimeError as error:
        raise InputError(
            f"baseline must match x or broadcast to it: got {list(part.shape)}, x is "
            f"{list(x.shape)}; pass baseline=None for zeros"
        ) from error
    return spread.contiguous()


def _as_tensor(part: Any, x: Tensor) -> Tensor:
    """A baseline of the user's as a tensor, in its own dtype."""
    if isinstance(part, Tensor):
        return part
    if isinstance(part, (int, float)) and (x.dtype == torch.bool or not isinstance(part, bool)):
        # Python's numbers in full: 0.5 of an integer input is refused, not cut.
        dtype = torch.float64 if isinstance(part, float) else None
        return torch.tensor(part, dtype=dtype, device=x.device)
    if isinstance(part, (np.ndarray, np.generic)):
        return torch.as_tensor(part, device=x.device)
    raise InputTypeError(
        f"baseline must be None, a number, a tensor, a tuple (one per input), a list (a set) "
        f"or one of {', '.join(NAMED)}: got {type(part).__name__}"
    )


def _like(part: Tensor, x: Tensor) -> Tensor:
    if part.device != x.device:
        raise InputError(
            f"baseline is on another device: got {part.device}, x is on {x.device}; move it with "
            ".to(x.device)"
        )
    cure = f"pass a baseline of {x.dtype}, or inputs of a wider type"
    return cast(part.detach(), x.dtype, "the baseline", cure).contiguous()


def _need_finite(part: Tensor) -> None:
    if part.is_floating_point() and not bool(torch.isfinite(part).all()):
        one = part.flatten()[0]
        alike = bool(((part == one) | (part.isnan() & one.isnan())).all())
        got = f"got {float(one)}" if alike else "it holds NaN or infinity"
        raise InputError(
            f"baseline must be finite: {got}, and this method differentiates there; {MISSING}"
        )
