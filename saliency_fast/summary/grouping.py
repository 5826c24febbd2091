"""Grouping: from a map to numbered parts, by what is connected or by superpixels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from saliency_fast.engine.baselines import blur_axis
from saliency_fast.engine.features import SEGMENTATIONS, segment
from saliency_fast.errors import InputError, InputTypeError

COMPONENTS = "components"
SMOOTHING = 0.02
"""The deviation of the Gaussian before the cut, as a share of each axis: gradients' signs change
from one pixel to the next, and what remains is what a neighbourhood says."""
HELD = 0.7
"""The share of the smoothed map's amount that lies above the cut."""
GAP = 0.02
"""Components that are nearer than about twice this share of an axis are one."""
LEAST = 0.01
"""The share of the evidence under which a component is no region of its own."""

Names = NDArray[np.int64]


def check_how(how: object) -> None:
    """Raises unless it names a way to group, or is a tensor of whole numbers."""
    if isinstance(how, Tensor):
        if how.is_floating_point() or how.is_complex() or how.dtype == torch.bool:
            raise InputTypeError(f"how must hold whole numbers: got {how.dtype}; use .long()")
        return
    names = ", ".join((COMPONENTS, *SEGMENTATIONS))
    if not isinstance(how, str):
        raise InputTypeError(
            f"how must be one of {names} or a tensor of labels: got {type(how).__name__}"
        )
    name, _, count = how.partition(":")
    known = how == COMPONENTS or name in SEGMENTATIONS
    if not known or (":" in how and not (count.isdecimal() and int(count) > 0)):
        raise InputError(
            f"how must be one of {names}, with a count behind a colon such as 'grid:8' or "
            f"'slic:100', or a tensor of labels: got {how!r}"
        )


def group(inputs: Tensor, places: Tensor, how: str | Tensor, most: int) -> Tensor:
    """Labels int64 [B, *spatial] of maps [B, *spatial] for inputs [B, C, *spatial]; 0 is the rest,
    other numbers have no order. A tensor's own labels [B | 1, *spatial] are taken as they are.
    """
    if isinstance(how, Tensor):
        return _given(how, places)
    if how != COMPONENTS:
        name, _, count = how.partition(":")
        parts = segment(inputs, name, int(count) if count else None)
        shape = (len(parts), *inputs.shape[1:])
        parts = parts.expand(shape) if inputs.dim() == 2 else parts[:, 0]
        rows = zip(parts.expand(places.shape), places, strict=True)
        return torch.stack([_merged(one, row, most) for one, row in rows])
    if inputs.dim() == 2:
        # Features have no neighbours: each is a part of its own.
        numbers = torch.arange(1, places.shape[1] + 1, device=places.device)
        return _largest(numbers.expand(places.shape), places, most, 0.0)
    return _largest(components(places), places, most, LEAST)


def components(places: Tensor) -> Tensor:
    """The connected components of where a smoothed map [B, *spatial] is large, of either sign
    alone: labels int64 [B, *spatial] from 1, 0 elsewhere.

    The cut is Otsu's (1979), which parts amounts into two groups of the least variance, or lower,
    so that `HELD` of the smoothed map's amount lies above it.
    """
    smooth = places.double()[:, None]
    for axis in range(2, smooth.dim()):
        smooth = blur_axis(smooth, axis, SMOOTHING)
    smooth = smooth[:, 0]
    amount = smooth.abs().flatten(1)
    order = amount.sort(1, descending=True).values
    held = (order.cumsum(1) >= HELD * order.sum(1, keepdim=True)).int().argmax(1, keepdim=True)
    cut = order.gather(1, torch.maximum(held, _otsu(order)))
    large = ((amount >= cut) & (amount > 0)).view_as(smooth)
    above, below = connected(large & (smooth > 0)), connected(large & (smooth < 0))
    return torch.where(above > 0, above, below + (below > 0) * places[0].numel())


def _otsu(order: Tensor) -> Tensor:
    """The last place of the upper group of rows [B, N] in falling order, [B, 1]."""
    count = torch.arange(1, order.shape[1], device=order.device, dtype=order.dtype)
    above = order.cumsum(1)
    total, above = above[:, -1:], above[:, :-1]
    rest = order.shape[1] - count
    between = count * rest * (above / count - (total - above) / rest).square()
    if not len(count):
        return torch.zeros_like(order, dtype=torch.int64)
    return between.argmax(1, keepdim=True)


def connected(mask: Tensor) -> Tensor:
    """Numbers of the connected parts of a mask, bool [B, *spatial] with up to three axes, diagonals
    included and small gaps bridged; int64, 0 where it is False.

    The largest number wins over its neighbours until nothing changes; each also takes over what
    the place that it names has, so that long ways take few rounds.
    """
    if mask.dim() > 4:
        raise InputError(
            f"how='components' needs up to three spatial axes: got {mask.dim() - 1}; use 'grid:4' "
            "or give the labels"
        )
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[mask.dim() - 2]
    reach = [round(GAP * size) for size in mask.shape[1:]]
    wide = pool(mask[:, None].double(), [2 * one + 1 for one in reach], 1, reach)[:, 0] > 0
    count = mask[0].numel()
    number = torch.arange(1, count + 1, device=mask.device, dtype=torch.float64)
    found = number.view(mask.shape[1:]) * wide
    while True:
        # float64 holds every number of a place.
        grown = pool(found[:, None], 3, 1, 1)[:, 0] * wide
        flat = torch.cat([grown.new_zeros(len(grown), 1), grown.flatten(1)], 1)
        grown = torch.maximum(grown, flat.gather(1, grown.flatten(1).long()).view_as(grown))
        if torch.equal(grown, found):
            return (found * mask).long()
        found = grown


def _given(labels: Tensor, places: Tensor) -> Tensor:
    if labels.shape[:1] == places.shape[:1] or len(labels) == 1:
        whole = labels[:, 0] if labels.dim() == places.dim() + 1 else labels
        if whole.shape[1:] == places.shape[1:]:
            if bool((labels < 0).any()):
                raise InputError("how: labels must be 0 (the rest) or more: got negative ones")
            return whole.to(places.device, torch.int64).expand(places.shape).contiguous()
    raise InputError(
        f"how: labels must match the places: got {list(labels.shape)}, expected "
        f"{list(places.shape)}"
    )


def _largest(labels: Tensor, places: Tensor, most: int, least: float) -> Tensor:
    """The labels of the `most` parts with the largest net evidence, of `least` of all or more."""
    found = torch.zeros_like(labels)
    for row, values, out in zip(labels, places.double(), found, strict=True):
        numbers, part = row.unique(return_inverse=True)
        net = values.new_zeros(len(numbers)).index_add_(0, part.flatten(), values.flatten())
        net[numbers == 0] = 0
        kept = net.abs() > least * values.abs().sum()
        best = net.abs().argsort(descending=True, stable=True)[:most]
        keep = torch.zeros_like(kept)
        keep[best] = kept[best]
        out[:] = row * keep[part]
    return found


def _merged(parts: Tensor, values: Tensor, most: int) -> Tensor:
    """Segments [*spatial] of a map merged until `most` and the rest are left: neighbours whose
    merging costs least by Ward's criterion (1963), the growth of the squared distance of places to
    their part's mean. The rest is the part whose mean is the smallest.
    """
    if not bool(values.any()):
        return torch.zeros_like(parts)
    (total, count), names = _numbered(parts, values)
    edges = _neighbours(names)
    owner = np.arange(len(total))
    for _ in range(len(total) - most - 1):
        if not len(edges):
            break
        a, b = edges.T
        gap = total[a] / count[a] - total[b] / count[b]
        best = int(np.argmin(count[a] * count[b] / (count[a] + count[b]) * gap**2))
        keep, gone = int(a[best]), int(b[best])
        total[keep] += total[gone]
        count[keep] += count[gone]
        owner[owner == gone] = keep
        edges = np.sort(np.where(edges == gone, keep, edges), 1)
        edges = np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0)
    left = np.unique(owner)
    if len(left) > most:
        rest = left[np.argmin(np.abs(total[left] / count[left]))]
        numbers = np.where(owner == rest, 0, owner + 1)
    else:
        numbers = owner + 1
    return torch.from_numpy(numbers[names]).to(parts.device)


def _numbered(parts: Tensor, values: Tensor) -> tuple[tuple[NDArray[np.float64], ...], Names]:
    """(sums, counts) of the segments, and the segment of each place, from 0 without gaps."""
    names = np.unique(parts.cpu().numpy(), return_inverse=True)[1].reshape(parts.shape)
    given = values.double().cpu().numpy().ravel()
    total = np.bincount(names.ravel(), weights=given).astype(np.float64)
    return (total, np.bincount(names.ravel()).astype(np.float64)), names.astype(np.int64)


def _neighbours(names: Names) -> Names:
    """Pairs of segments that touch along an axis, [E, 2], each once, the smaller first."""
    pairs = []
    for axis in range(names.ndim):
        one = np.moveaxis(names, axis, 0)
        both = np.stack([one[:-1].ravel(), one[1:].ravel()], 1)
        pairs.append(both[both[:, 0] != both[:, 1]])
    return np.unique(np.sort(np.concatenate(pairs), 1), axis=0)
