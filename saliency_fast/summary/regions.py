"""Regions: a map in a handful of parts, each with its signed share of the evidence and location.

Parts are connected components, merged superpixels or given labels; locations are in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.engine.features import SEGMENTATIONS, segment
from saliency_fast.errors import InputError, InputTypeError, warn_deprecated
from saliency_fast.evaluate.inputs import EvaluationInput, read_evaluation_input
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike

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

Names = Mapping[int, str] | Sequence[str] | None
Mask = NDArray[np.bool_]
Labels = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Region:
    """A part of a map.

    For the values e of a map with its channels summed, P and N are the sums of the magnitudes of
    its positive and of its negative values.

    Attributes:
        label: The number of the region in `Regions.labels`.
        share: The signed sum of e in the region, divided by P + N.
        amount: The sum of |e|, divided by P + N.
        positive: The sum of positive values, divided by P.
        negative: The magnitude of the sum of negative values, divided by N (0 where N is 0).
        area: The share of the positions.
        box: The half-open corners, first all starts, then all stops: (top, left, bottom, right).
        centre: The mean position, weighted by |e|.
        where: The location in words, or the region's name where `named`.
        named: Whether `where` is a name.
        inside: The share of `amount` within the object; None without an object.
        within: The location within the object in words, where at least half of it lies there.
    """

    label: int
    share: float
    amount: float
    positive: float
    negative: float
    area: float
    box: tuple[int, ...]
    centre: tuple[float, ...]
    where: str
    named: bool = False
    inside: float | None = None
    within: str = ""


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of B examples; a sequence of tuples of `Region`.

    Shares of regions and rest add up to (P - N) / (P + N), amounts to 1, if the map is not zero.

    Attributes:
        labels: int64 [B, *spatial], 0 for the rest.
        by_example: The regions of each example, the largest |share| first, numbered from 1.
        rest: The rest of each example.
        positive: P, float64 [B].
        negative: N, float64 [B].
    """

    labels: Tensor
    by_example: tuple[tuple[Region, ...], ...]
    rest: tuple[Region, ...]
    positive: Tensor
    negative: Tensor

    @property
    def found(self) -> tuple[tuple[Region, ...], ...]:
        """Deprecated alias of `by_example`."""
        warn_deprecated("Regions.found", "Regions.by_example")
        return self.by_example

    def __len__(self) -> int:
        return len(self.by_example)

    def __getitem__(self, example: int) -> tuple[Region, ...]:
        return self.by_example[example]

    def __iter__(self) -> Iterator[tuple[Region, ...]]:
        return iter(self.by_example)


def regions(
    inputs: Tensor,
    maps: Tensor | Attribution,
    how: str | Tensor = COMPONENTS,
    *,
    most: int = 5,
    boxes: Any = None,
    names: Names = None,
    layout: LayoutLike = None,
) -> Regions:
    """Groups each map into at most `most` regions.

    Args:
        inputs: The explained inputs [B, C, *spatial] or features [B, F].
        maps: An attribution, or values [B, C | 1, *spatial] or [B, *spatial].
        how: "components": connected positions of one sign where the smoothed map is large (above
            Otsu's threshold and where 70 % of it lies; each feature alone). "slic", "slic:100" or
            "grid:4": superpixels of the input (Achanta, 2012; "slic" needs the extra 'segments'),
            merged by similar attribution. A tensor of whole numbers [B | 1, *spatial]: the labels
            themselves, 0 for the rest.
        most: The largest number of regions.
        boxes: The objects, as half-open corners [B, 2 D] or bool masks [B, *spatial].
        names: The names of given labels, or of features (from 0), in place of locations.
        layout: The axes of the inputs, where the maps are no attribution that states them.

    Returns:
        The regions of every example.

    Raises:
        InputError: For maps that do not fit or are not finite, and for unknown arguments.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 40, 40)
        >>> x[..., 4:10, 4:10] = 1.0
        >>> [(one.where, one.share, one.box) for one in regions(x, x)[0]]
        [('upper left', 1.0, (4, 4, 10, 10))]
    """
    subject = read_evaluation_input(None, inputs, maps, boxes=boxes, layout=layout)
    return regions_of(subject, how, most, names)


def regions_of(subject: EvaluationInput, how: str | Tensor, most: int, names: Names) -> Regions:
    """The regions of an evaluation input's maps; see `regions`."""
    _check_how(how)
    checks.integer("most", most, 1)
    values = subject.places.double()
    labels = _grouped(subject.inputs, subject.places, how, most)
    features, given = subject.inputs.dim() == 2, by_number(names)
    result, rest = [], []
    for row in range(subject.batch):
        mask = None if subject.masks is None else subject.masks[row].cpu().numpy()
        own, value = labels[row].cpu().numpy(), values[row].cpu().numpy()
        numbers = [one for one in np.unique(own).tolist() if one]
        named = {one: name for one in numbers if (name := _name(one, own, given, features))}
        parts = [_region(one, own, value, mask, named.get(one)) for one in numbers]
        result.append(tuple(sorted(parts, key=lambda one: (-abs(one.share), one.label))))
        rest.append(_region(0, own, value, mask, "rest"))
    flat = values.flatten(1)
    positive, negative = flat.clamp_min(0).sum(1), flat.clamp_max(0).sum(1).abs()
    return Regions(labels, tuple(result), tuple(rest), positive, negative)


def by_number(names: Names) -> Mapping[int, str]:
    """Names of numbers, of which a sequence names those from 0."""
    return names if isinstance(names, Mapping) else dict(enumerate(names or ()))


def _name(label: int, labels: Labels, names: Mapping[int, str], features: bool) -> str | None:
    """The name of a label; a region of one feature has the name of the feature."""
    if not features:
        return names.get(label)
    own = np.flatnonzero(labels == label).tolist()
    words = [str(names.get(one, one)) for one in own]
    if len(own) == 1:
        return names.get(own[0], f"feature {own[0]}")
    if len(words) > 2 and own[-1] - own[0] == len(own) - 1:
        return f"features {words[0]} to {words[-1]}"
    if len(words) > 4:
        return f"features {', '.join(words[:3])} and {len(words) - 3} more"
    return "features " + ", ".join(words)


def _region(
    label: int, labels: Labels, values: Values, mask: Mask | None, name: str | None
) -> Region:
    own, magnitude = labels == label, np.abs(values)
    start, stop, centre = _extent(own, magnitude)
    inside, within = None, ""
    if mask is not None and own.any():
        weight = magnitude if magnitude[own].any() else np.ones_like(magnitude)
        inside = _share(weight[own & mask].sum(), weight[own].sum())
        if inside >= 0.5 and name is None:
            first, last, _ = _extent(mask, magnitude)
            corners = (*_extent(own & mask, magnitude), last)
            within = location(*(np.subtract(one, first).tolist() for one in corners))
    positive, negative = np.maximum(values, 0.0), np.maximum(-values, 0.0)
    return Region(
        label,
        share=_share(values[own].sum(), magnitude.sum()),
        amount=_share(magnitude[own].sum(), magnitude.sum()),
        positive=_share(positive[own].sum(), positive.sum()),
        negative=_share(negative[own].sum(), negative.sum()),
        area=float(own.mean()),
        box=(*start, *stop),
        centre=tuple(centre),
        where=location(start, stop, centre, labels.shape) if name is None else name,
        named=name is not None,
        inside=inside,
        within=within,
    )


def _share(part: np.float64, whole: np.float64) -> float:
    return float(part / whole) if whole else 0.0


def _extent(own: Mask, magnitude: Values) -> tuple[list[int], list[int], list[float]]:
    """The half-open box of a mask, starts and stops, and its centre weighted by magnitude."""
    positions = np.argwhere(own)
    if not len(positions):
        return [0] * own.ndim, [0] * own.ndim, [0.0] * own.ndim
    weight = magnitude[own]
    if not weight.any():
        weight = np.ones_like(weight)
    centre = np.average(positions, axis=0, weights=weight)
    stop = positions.max(0) + 1
    return positions.min(0).tolist(), stop.tolist(), centre.tolist()


def _check_how(how: object) -> None:
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
    is_count = not colon or (count.isdecimal() and int(count) > 0)
    if how != COMPONENTS and not (name in SEGMENTATIONS and is_count):
        raise InputError(
            f"how must be one of {names}, with a count behind a colon such as 'grid:8' or "
            f"'slic:100', or a tensor of labels: got {how!r}"
        )


def _grouped(inputs: Tensor, maps: Tensor, how: str | Tensor, most: int) -> Tensor:
    """Labels int64 [B, *spatial]: 0 is the rest, the others by falling net evidence from 1."""
    if isinstance(how, Tensor):
        return _given(how, maps)
    values = maps.double().cpu().numpy()
    if how != COMPONENTS:
        name, _, count = how.partition(":")
        segments = segment(inputs, name, int(count) if count else None)
        shape = (len(segments), *inputs.shape[1:])
        segments = segments.expand(shape) if inputs.dim() == 2 else segments[:, 0]
        rows = zip(segments.expand(maps.shape).cpu().numpy(), values, strict=True)
        result = [_ranked(merged(one, row, most), row, most, EVERY) for one, row in rows]
    elif inputs.dim() == 2:
        # Features have no neighbours: each is a part of its own.
        own = np.arange(1, values.shape[1] + 1)
        result = [_ranked(own, row, most, 0.0) for row in values]
    else:
        result = [_ranked(components(row), row, most, LEAST) for row in values]
    return torch.from_numpy(np.stack(result)).to(maps.device)


def _given(labels: Tensor, maps: Tensor) -> Tensor:
    own = labels[:, 0] if labels.dim() == maps.dim() + 1 else labels
    if len(labels) not in (1, len(maps)) or own.shape[1:] != maps.shape[1:]:
        raise InputError(
            f"how: labels must match the positions: got {list(labels.shape)}, expected "
            f"{list(maps.shape)}"
        )
    if bool((labels < 0).any()):
        raise InputError("how: labels must be 0 (the rest) or more: got negative ones")
    return own.to(maps.device, torch.int64).expand(maps.shape).contiguous()


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
    """Connected components of one sign where a smoothed map [*spatial] is large; 0 elsewhere."""
    from scipy import ndimage

    sigma = [SMOOTHING * size for size in values.shape]
    radius = [min(int(np.ceil(4.0 * SMOOTHING * size)), size - 1) for size in values.shape]
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
    """Labels of a mask's connected components, diagonals and small gaps included, 0 elsewhere."""
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

    Neighbours merge that cost least by Ward's criterion (1963). The rest is nearest to zero.
    """
    if not values.any():
        return np.zeros_like(segments)
    names = np.unique(segments, return_inverse=True)[1].reshape(segments.shape)
    count = np.bincount(names.ravel()).astype(np.float64)
    total = np.bincount(names.ravel(), weights=values.ravel())
    moved = [np.moveaxis(names, axis, 0) for axis in range(names.ndim)]
    touching = [np.stack([one[:-1], one[1:]], -1).reshape(-1, 2) for one in moved]
    edges, owner = _distinct(np.concatenate(touching)), np.arange(len(total))
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


def _distinct(edges: Labels) -> Labels:
    """Each pair of different segments once, the smaller first."""
    return np.unique(np.sort(edges[edges[:, 0] != edges[:, 1]], 1), axis=0)


LONG, EDGE = 2.0 / 3.0, 1.0 / 6.0
"""Shares of an axis: a longer part has no side, and a part within the last share is at the edge."""
MOST, FIRST, MIDDLE, LAST, START, END = "most", "first", "middle", "last", "start", "end"
KINDS = {1: "signal", 2: "image", 3: "volume"}
"""The name of an input by its number of spatial axes."""
_SIGNAL = {FIRST: "early part", LAST: "late part"}
_DEPTH = {FIRST: "front", MIDDLE: "middle depth", LAST: "back", START: "front", END: "back"}
_ROW = {FIRST: "upper", LAST: "lower", START: "upper", END: "lower"}
_COLUMN = {FIRST: "left", LAST: "right", START: "left", END: "right"}
_ENDS = (START, END)


def location(
    start: Sequence[int], stop: Sequence[int], centre: Sequence[float], size: Sequence[int]
) -> str:
    """Words for a half-open box in a space of `size`: "upper left", "late part", or "most"."""
    sides = [_side(*one) for one in zip(start, stop, centre, size, strict=True)]
    if len(sides) == 1:
        return _SIGNAL.get(sides[0], sides[0])
    if len(sides) == 2:
        return _in_plane(sides[0], sides[1])
    if len(sides) == 3:
        words = [_DEPTH.get(sides[0], MOST), _in_plane(sides[1], sides[2])]
        return ", ".join(one for one in words if one != MOST) or MOST
    return "places around (" + ", ".join(f"{one:.0f}" for one in centre) + ")"


def with_preposition(words: str) -> str:
    """A location with its preposition: "in the upper left", "at the end"."""
    if words == MOST:
        return "across most"
    if words.startswith("places"):
        return f"at {words}"
    return f"at the {words}" if words.endswith(("edge", "start", "end")) else f"in the {words}"


def _side(start: int, stop: int, centre: float, size: int) -> str:
    if stop - start > LONG * size:
        return MOST
    if stop <= EDGE * size:
        return START
    if start >= (1.0 - EDGE) * size:
        return END
    middle = (centre + 0.5) / size
    return FIRST if middle < 1.0 / 3.0 else LAST if middle > 2.0 / 3.0 else MIDDLE


def _in_plane(row: str, column: str) -> str:
    """Words for a side of the rows and a side of the columns."""
    vertical, horizontal = _ROW.get(row, ""), _COLUMN.get(column, "")
    if row in _ENDS and column in _ENDS:
        return f"{vertical} {horizontal} corner"
    if row in _ENDS:
        return "top edge" if row == START else "bottom edge"
    if column in _ENDS:
        return f"{horizontal} edge"
    if row == column == MOST:
        return MOST
    if vertical and horizontal:
        return f"{vertical} {horizontal}"
    if not vertical and not horizontal:
        return MIDDLE
    if MOST in (row, column):
        return f"{vertical or horizontal} part"
    return f"{vertical} middle" if vertical else f"middle {horizontal}"
