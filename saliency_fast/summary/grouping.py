"""Grouping: the labels of a map's regions, from connected components or merged superpixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.engine.features import SEGMENTATIONS, segment
from saliency_fast.errors import InputError, InputTypeError

COMPONENTS = "components"
SMOOTHING = 0.02
"""The standard deviation of the Gaussian before the threshold, as a share of each axis: the signs
of gradients change from one pixel to the next."""
HELD = 0.7
"""The share of the smoothed map's magnitude that lies above the threshold, at least."""
GAP = 0.02
"""Components that are nearer than about twice this share of an axis are one."""
LEAST = 0.01
"""A component with a smaller share of the evidence belongs to the rest."""
EVERY = -1.0
"""No part has a smaller share of the evidence."""

Labels = NDArray[np.int64]
Values = NDArray[np.float64]


def check_how(how: object) -> None:
    """Raises unless it names a kind of grouping, or is a tensor of whole numbers."""
    if isinstance(how, Tensor):
        if how.is_floating_point() or how.is_complex() or how.dtype == torch.bool:
            raise InputTypeError(f"how must hold whole numbers: got {how.dtype}; use .long()")
        return
    names = ", ".join((COMPONENTS, *SEGMENTATIONS))
    if not isinstance(how, str):
        raise InputTypeError(
            f"how must be one of {names} or a tensor of labels: got {type(how).__name__}"
        )
    name, colon, count = how.partition(":")
    known = how == COMPONENTS or name in SEGMENTATIONS
    if not known or (colon and not (count.isdecimal() and int(count) > 0)):
        raise InputError(
            f"how must be one of {names}, with a count behind a colon such as 'grid:8' or "
            f"'slic:100', or a tensor of labels: got {how!r}"
        )


def group(inputs: Tensor, maps: Tensor, how: str | Tensor, most: int) -> Tensor:
    """Labels int64 [B, *spatial] of maps [B, *spatial] for inputs [B, C, *spatial].

    0 is the rest; the other labels count from 1, the largest net evidence first. Given labels
    [B | 1, *spatial] stay as they are.
    """
    if isinstance(how, Tensor):
        return _given(how, maps)
    values = maps.double().cpu().numpy()
    if how != COMPONENTS:
        name, _, count = how.partition(":")
        segments = segment(inputs, name, int(count) if count else None)
        shape = (len(segments), *inputs.shape[1:])
        segments = segments.expand(shape) if inputs.dim() == 2 else segments[:, 0]
        rows = zip(segments.expand(maps.shape).cpu().numpy(), values, strict=True)
        found = [_ranked(merged(one, row, most), row, most, EVERY) for one, row in rows]
    elif inputs.dim() == 2:
        # Features have no neighbours: each is a part of its own.
        own = np.arange(1, values.shape[1] + 1)
        found = [_ranked(own, row, most, 0.0) for row in values]
    else:
        found = [_ranked(components(row), row, most, LEAST) for row in values]
    return torch.from_numpy(np.stack(found)).to(maps.device)


def _given(labels: Tensor, maps: Tensor) -> Tensor:
    if labels.shape[:1] == maps.shape[:1] or len(labels) == 1:
        whole = labels[:, 0] if labels.dim() == maps.dim() + 1 else labels
        if whole.shape[1:] == maps.shape[1:]:
            if bool((labels < 0).any()):
                raise InputError("how: labels must be 0 (the rest) or more: got negative ones")
            return whole.to(maps.device, torch.int64).expand(maps.shape).contiguous()
    raise InputError(
        f"how: labels must match the positions: got {list(labels.shape)}, expected "
        f"{list(maps.shape)}"
    )


def _ranked(labels: Labels, values: Values, most: int, least: float) -> Labels:
    """Labels from 1 by falling net evidence, at most `most` of those above the share `least`."""
    numbers, part = np.unique(labels, return_inverse=True)
    net = np.abs(np.bincount(part.ravel(), weights=values.ravel()))
    order = np.argsort(-net, kind="stable")
    is_region = (numbers != 0) & (net > least * np.abs(values).sum())
    order = order[is_region[order]][:most]
    rank = np.zeros(len(numbers), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return rank[part].reshape(labels.shape)


def components(values: Values) -> Labels:
    """The connected components of one sign where a smoothed map [*spatial] is large; 0 elsewhere.

    The threshold is Otsu's (1979), lowered until `HELD` of the smoothed magnitude lies above it.
    """
    from scipy import ndimage

    sigma = [SMOOTHING * size for size in values.shape]
    radius = [
        min(int(np.ceil(4.0 * one)), size - 1)
        for one, size in zip(sigma, values.shape, strict=True)
    ]
    smooth = ndimage.gaussian_filter(values, sigma, mode="nearest", radius=radius)
    magnitude = np.abs(smooth)
    order = -np.sort(-magnitude, axis=None)
    held = int(np.argmax(order.cumsum() >= HELD * order.sum()))
    large = (magnitude >= order[max(held, _otsu(order))]) & (magnitude > 0)
    positive, negative = connected(large & (smooth > 0)), connected(large & (smooth < 0))
    return np.where(positive > 0, positive, negative + (negative > 0) * values.size)


def _otsu(order: Values) -> int:
    """The last index of the upper class of falling values, by the largest variance between."""
    if len(order) < 2:
        return 0
    count, above = np.arange(1, len(order)), order.cumsum()[:-1]
    rest, total = len(order) - count, above[-1] + order[-1]
    return int(np.argmax(count * rest * (above / count - (total - above) / rest) ** 2))


def connected(mask: NDArray[np.bool_]) -> Labels:
    """Labels of the connected components of a mask [*spatial], 0 where it is False.

    Diagonal neighbours are connected, and gaps up to twice the share `GAP` are bridged. A label is
    1 + the largest flat index of its component and the bridges around it.
    """
    from scipy import ndimage

    box = np.ones([2 * round(GAP * size) + 1 for size in mask.shape], dtype=bool)
    wide = ndimage.binary_dilation(mask, box)
    number, count = ndimage.label(wide, np.ones([3] * mask.ndim))
    last = np.zeros(count + 1, dtype=np.int64)
    last[number.ravel()] = np.arange(1, mask.size + 1)
    labels: Labels = last[number] * mask
    return labels


def merged(segments: Labels, values: Values, most: int) -> Labels:
    """Segments [*spatial] of a map merged until `most` and the rest are left; the rest is 0.

    Neighbours merge that cost least by Ward's criterion (1963), the growth of the squared distances
    to the mean. The rest is the part whose mean is nearest to zero.
    """
    if not values.any():
        return np.zeros_like(segments)
    names = np.unique(segments, return_inverse=True)[1].reshape(segments.shape)
    count = np.bincount(names.ravel()).astype(np.float64)
    total = np.bincount(names.ravel(), weights=values.ravel())
    edges, owner = _neighbours(names), np.arange(len(total))
    for _ in range(len(total) - most - 1):
        if not len(edges):
            break
        a, b = edges.T
        gap = total[a] / count[a] - total[b] / count[b]
        best = int(np.argmin(count[a] * count[b] / (count[a] + count[b]) * gap**2))
        keep, gone = edges[best]
        total[keep] += total[gone]
        count[keep] += count[gone]
        owner[owner == gone] = keep
        edges = _distinct(np.where(edges == gone, keep, edges))
    left = np.unique(owner)
    numbers = owner + 1
    if len(left) > most:
        numbers[owner == left[np.argmin(np.abs(total[left] / count[left]))]] = 0
    return numbers[names]


def _neighbours(names: Labels) -> Labels:
    """Pairs [E, 2] of segments that touch along an axis."""
    moved = [np.moveaxis(names, axis, 0) for axis in range(names.ndim)]
    return _distinct(np.concatenate([np.stack([m[:-1], m[1:]], -1).reshape(-1, 2) for m in moved]))


def _distinct(edges: Labels) -> Labels:
    """Each pair of different segments once, the smaller first."""
    return np.unique(np.sort(edges[edges[:, 0] != edges[:, 1]], 1), axis=0)
