"""Tells which attention is among the tokens of the explained input, by changing some of them.

The model runs again with one token changed, while what attention hands on stays what it was. Tokens
then know nothing of each other, so that in each layer queries and keys of that token alone change:
its row and its column of the logits. Queries of a decoder or of another tower do not change at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Variation:
    """points: the input [1, *] with something changed. token: which one of a sequence, None where
    it is a place of a picture, a volume or a series.
    """

    points: Tensor
    token: int | None


def variations(x: Tensor, sequence: bool) -> list[Variation]:
    """Changed copies of an input [1, *]; sequence: whether axis 1 may be the tokens'."""
    found: list[Variation] = []
    if sequence and x.dim() in (2, 3) and x.shape[1] > 0:
        for token in _tokens(x):
            points = x.clone()
            points[0, token] = _other(x, token)
            found.append(Variation(points, token))
    if x.is_floating_point() and x.dim() > 2:
        # The axis of the channels is not known: where one slice is a channel, others are places.
        axes = (1, 2) if x.dim() == 3 else (None,)
        found += [Variation(_blotted(x, axis), None) for axis in axes]
    return found


def _tokens(x: Tensor) -> list[int]:
    """Up to three tokens; of ids rare ones, which are no padding, in the middle, where no special
    tokens are.
    """
    length = x.shape[1]
    if x.is_floating_point():
        return sorted({0, length // 2, length - 1})
    ids = x[0].tolist()
    return sorted(range(length), key=lambda n: (ids.count(ids[n]), abs(n - length // 2)))[:3]


def _other(x: Tensor, token: int) -> Tensor:
    """Another value for a token: noise, or another id of the same input."""
    own = x[0, token]
    if x.is_floating_point():
        return _noise(own, x)
    others = [n for n in _tokens(x) if x[0, n] != own]
    others += [n for n in range(x.shape[1]) if x[0, n] != own]
    if others:
        return x[0, others[0]]
    return own - 1 if int(own.max()) > 0 else own + 1


def _noise(part: Tensor, whole: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(part.shape, generator=generator, dtype=torch.float64, device="cpu")
    return part + noise.to(part.device, part.dtype) * (whole.std(correction=0) + whole.abs().mean())


def _blotted(x: Tensor, axis: int | None) -> Tensor:
    """Noise in the middle of every spatial axis, or of one axis."""
    axes = range(2, x.dim()) if axis is None else (axis,)
    part: list[slice] = [slice(None)] * x.dim()
    for one in axes:
        size = x.shape[one]
        width = max(1, size // 16)
        part[one] = slice((size - width) // 2, (size - width) // 2 + width)
    points = x.clone()
    points[tuple(part)] = _noise(points[tuple(part)], x)
    return points


def among(
    x: Tensor, before: Tensor, after: Sequence[tuple[Variation, Tensor]], special: int
) -> bool:
    """Whether a layer's queries and keys are the tokens of x [1, *].

    before: its logits [1, heads, T, T] or [heads, T, T]; after: those of each variation.
    """
    tokens = before.shape[-1]
    if before.shape[-2] != tokens:
        return False
    changes = [(change, _changed(before, one)) for change, one in after]
    told = [(one.token, changed) for one, changed in changes if one.token is not None]
    if told and tokens == x.shape[1] + abs(special):
        lowest = torch.finfo(before.dtype).min / 2
        return _each_its_own(told, (before > lowest).flatten(0, -3).all(0), max(special, 0))
    if not x.is_floating_point():
        return False
    return any(_both(changed) for one, changed in changes if one.token is None)


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Bool [T, T]: which logits differ in any head; what is no number is equal to itself."""
    if before.shape != after.shape:
        return torch.ones(before.shape[-2:], dtype=torch.bool, device=before.device)
    differ = (before != after) & ~(before.isnan() & after.isnan())
    return differ.flatten(0, -3).any(0)


def _each_its_own(told: Sequence[tuple[int, Tensor]], open: Tensor, offset: int) -> bool:
    """Whether every changed token changed its own queries and its own keys, and not all of them.

    open: bool [T, T], which logits are not masked: those never change, so that not every token
    shows both. Layers that mix neighbours before the attention, such as convolutions, change the
    queries and keys of a token's neighbours too.
    """
    queries = keys = False
    for token, changed in told:
        place = token + offset
        if len(changed) == 1:
            return bool(changed.any())
        still = open & ~changed
        others = torch.arange(len(changed), device=changed.device) != place
        if not bool(still[others][:, others].any()):
            # Of a mean of all tokens, or mixed before any attention.
            return False
        if bool(changed.any()) and not bool(changed[place, place] | ~open[place, place]):
            return False
        # A query changed where keys did not: another query sees the same logit as before.
        queries |= bool((changed[place] & still[others].any(0))[others].any())
        keys |= bool((changed[:, place] & still[:, others].any(1))[others].any())
    return queries and keys


def _both(changed: Tensor) -> bool:
    """Whether both queries and keys changed: else all queries see the same keys change."""
    if not bool(changed.any()) or bool(changed.all()):
        return bool(changed.any())
    return bool((changed != changed[:1]).any()) and bool((changed != changed[:, :1]).any())
