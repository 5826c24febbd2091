"""Regions: a map in a handful of parts, each with its signed share of the evidence and place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import Subject, read_subject
from saliency_fast.model.axes import LayoutLike
from saliency_fast.summary.grouping import COMPONENTS, check_how, group
from saliency_fast.summary.spots import spot

Names = Mapping[int, str] | Sequence[str] | None


@dataclass(frozen=True)
class Region:
    """A part of a map.

    Of the values e of a map with its channels summed, P and N are the sums of the positive and of
    the negative amounts. share: the region's sum of e, of P + N, signed. amount: its sum of |e|, of
    P + N. positive: its positive amount, of P. negative: its negative amount, of N (0 where there
    is none). area: its places, of all. box: the corners of its places, first the starts, then the
    stops, half-open (top, left, bottom, right). centre: in places, weighted by |e|.

    where: its place in words, or its name where `named`. inside: of its amount, what lies within
    the object, None without one; within: its place in the object, in words, where most of it lies
    there, else "".
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
    """The regions of a batch.

    labels: int64 [B, *spatial], 0 the rest. found: for each example its regions, the largest
    |share| first, numbered so from 1 (labels that were given keep their numbers). rest: for each
    example what is left. Shares of regions and rest add up to (P - N) / (P + N), amounts to 1,
    unless the map is zero. positive, negative: P and N, float64 [B].
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
    """Groups maps of inputs [B, C, *spatial] into at most `most` regions each.

    how: "components" takes what is connected where the smoothed map is large, of one sign (above
    Otsu's cut, and what holds 70 % of it; features [B, F] one by one); "slic", "slic:100" or
    "grid:4" merge superpixels of the input (Achanta, 2012; "slic" needs the extra 'segments') whose
    attribution is alike; a tensor of whole numbers [B | 1, *spatial] gives the parts, 0 for the
    rest. boxes: of the objects, as [B, 2 D] corners or masks. names: of labels that were given, or
    of features (from 0), instead of words for their place. layout: of the inputs, where the maps
    are no attribution that states it.

    Raises InputError for maps that do not fit, are not finite, and for unknown ways.
    """
    subject = read_subject(None, inputs, maps, boxes=boxes, layout=layout)
    return regions_of(subject, how, most, names)


def regions_of(subject: Subject, how: str | Tensor, most: int, names: Names) -> Regions:
    """The regions of a subject's maps; see `regions`."""
    check_how(how)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise InputError(f"most must be a whole number, 1 or more: got {most!r}")
    values = subject.places.double()
    labels = group(subject.inputs, subject.places, how, most)
    if not isinstance(how, Tensor):
        labels = _in_order(labels, values)
    found, rest = [], []
    for row in range(subject.batch):
        mask = None if subject.masks is None else subject.masks[row]
        numbers = [one for one in torch.unique(labels[row]).tolist() if one]
        named = _named(names, labels[row], numbers, subject.inputs.dim() == 2)
        parts = [_region(one, labels[row], values[row], mask, named) for one in numbers]
        found.append(tuple(sorted(parts, key=lambda one: (-abs(one.share), one.label))))
        rest.append(_region(0, labels[row], values[row], mask, {0: "rest"}))
    flat = values.flatten(1)
    positive, negative = flat.clamp_min(0).sum(1), flat.clamp_max(0).sum(1).abs()
    return Regions(labels, tuple(found), tuple(rest), positive, negative)


def _in_order(labels: Tensor, values: Tensor) -> Tensor:
    """Labels numbered from 1, the largest net evidence first."""
    found = torch.zeros_like(labels)
    for row, own, out in zip(labels, values, found, strict=True):
        numbers, part = row.unique(return_inverse=True)
        net = own.new_zeros(len(numbers)).index_add_(0, part.flatten(), own.flatten()).abs()
        net[numbers == 0] = torch.inf
        place = torch.empty_like(numbers)
        first = 0 if bool((numbers == 0).any()) else 1
        order = net.argsort(descending=True, stable=True)
        place[order] = torch.arange(first, len(numbers) + first, device=place.device)
        out[:] = place[part]
    return found


def _named(names: Names, labels: Tensor, numbers: list[int], features: bool) -> dict[int, str]:
    """The names of labels, where they have some; parts of one feature are named as it is."""
    found = {}
    for number in numbers:
        key = number
        if features:
            own = (labels == number).nonzero().flatten().tolist()
            if len(own) != 1:
                found[number] = _several([str(_name(names, one)) for one in own], own)
                continue
            key = own[0]
            found[number] = f"feature {key}"
        name = _name(names, key)
        if name != key:
            found[number] = str(name)
    return found


def _several(words: list[str], numbers: list[int]) -> str:
    if len(words) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"features {words[0]} to {words[-1]}"
    if len(words) > 4:
        return f"features {', '.join(words[:3])} and {len(words) - 3} more"
    return "features " + ", ".join(words)


def _name(names: Names, key: int) -> object:
    if isinstance(names, Mapping):
        return names.get(key, key)
    return names[key] if names is not None and key < len(names) else key


def _region(
    label: int, labels: Tensor, values: Tensor, mask: Tensor | None, names: Mapping[int, str]
) -> Region:
    own = labels == label
    held = values[own]
    total = values.abs().sum()
    positive, negative = values.clamp_min(0).sum(), values.clamp_max(0).sum().abs()
    start, stop, centre = _extent(own, values)
    inside, within = None, ""
    if mask is not None and bool(own.any()):
        inside = _part((values * (own & mask)).abs().sum(), held.abs().sum())
        if not bool(held.any()):
            inside = float((own & mask).sum() / own.sum())
        if inside >= 0.5:
            within = _within(own & mask, mask, values)
    where = names.get(label) or (spot(start, stop, centre, labels.shape) if label else "")
    return Region(
        label,
        _part(held.sum(), total),
        _part(held.abs().sum(), total),
        _part(held.clamp_min(0).sum(), positive),
        _part(held.clamp_max(0).sum().abs(), negative),
        held.numel() / values.numel(),
        (*start, *stop),
        tuple(centre),
        where,
        label in names,
        inside,
        within if label not in names else "",
    )


def _part(amount: Tensor, whole: Tensor) -> float:
    return float(amount / whole) if bool(whole) else 0.0


def _within(own: Tensor, mask: Tensor, values: Tensor) -> str:
    """The words for a part of an object."""
    start, stop, centre = _extent(own, values)
    first, last, _ = _extent(mask, values)
    axes = range(len(first))
    return spot(
        [start[one] - first[one] for one in axes],
        [stop[one] - first[one] for one in axes],
        [centre[one] - first[one] for one in axes],
        [last[one] - first[one] for one in axes],
    )


def _extent(own: Tensor, values: Tensor) -> tuple[list[int], list[int], list[float]]:
    """The box of a mask, starts and stops, and its centre weighted by a map's amount there."""
    places = own.nonzero()
    if not len(places):
        return [0] * own.dim(), [0] * own.dim(), [0.0] * own.dim()
    weight = values[own].abs()
    if not bool(weight.any()):
        weight = torch.ones_like(weight)
    centre = (places * (weight / weight.sum())[:, None]).sum(0)
    return (
        places.amin(0).tolist(),
        (places.amax(0) + 1).tolist(),
        [float(one) for one in centre],
    )
