"""Regions: a map in a handful of parts, each with its signed share of the evidence and location."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.evaluate.inputs import Subject, read_evaluation_input
from saliency_fast.methods.parts import checks
from saliency_fast.model.layout import LayoutLike
from saliency_fast.summary.grouping import COMPONENTS, Labels, Values, check_how, group
from saliency_fast.summary.locations import location

Names = Mapping[int, str] | Sequence[str] | None
Mask = NDArray[np.bool_]


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

    Shares of an example's regions and rest add up to (P - N) / (P + N), amounts to 1, unless the
    map is zero.

    Attributes:
        labels: int64 [B, *spatial], 0 for the rest.
        found: The regions of each example, the largest |share| first and numbered so from 1; given
            labels keep their numbers.
        rest: The rest of each example.
        positive: P, float64 [B].
        negative: N, float64 [B].
    """

    labels: Tensor
    found: tuple[tuple[Region, ...], ...]
    rest: tuple[Region, ...]
    positive: Tensor
    negative: Tensor

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, example: int) -> tuple[Region, ...]:
        return self.found[example]

    def __iter__(self) -> Iterator[tuple[Region, ...]]:
        return iter(self.found)


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


def regions_of(subject: Subject, how: str | Tensor, most: int, names: Names) -> Regions:
    """The regions of an evaluation input's maps; see `regions`."""
    check_how(how)
    checks.integer("most", most, 1)
    values = subject.places.double()
    labels = group(subject.inputs, subject.places, how, most)
    features, given = subject.inputs.dim() == 2, by_number(names)
    found, rest = [], []
    for row in range(subject.batch):
        mask = None if subject.masks is None else subject.masks[row].cpu().numpy()
        own, value = labels[row].cpu().numpy(), values[row].cpu().numpy()
        numbers = [one for one in np.unique(own).tolist() if one]
        named = {one: name for one in numbers if (name := _name(one, own, given, features))}
        parts = [_region(one, own, value, mask, named.get(one)) for one in numbers]
        found.append(tuple(sorted(parts, key=lambda one: (-abs(one.share), one.label))))
        rest.append(_region(0, own, value, mask, "rest"))
    flat = values.flatten(1)
    positive, negative = flat.clamp_min(0).sum(1), flat.clamp_max(0).sum(1).abs()
    return Regions(labels, tuple(found), tuple(rest), positive, negative)


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
            within = _location_within(own & mask, mask, magnitude)
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


def _location_within(own: Mask, mask: Mask, magnitude: Values) -> str:
    """The location of a part within an object, in words."""
    start, stop, centre = _extent(own, magnitude)
    first, last, _ = _extent(mask, magnitude)
    moved = [np.subtract(one, first).tolist() for one in (start, stop, centre, last)]
    return location(*moved)


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
