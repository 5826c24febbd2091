"""Metrics of maps again, slowly: loops over examples and places in float64, from the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def places_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for size in shape)))


def pointing(values: Array, mask: Mask, tolerance: float) -> float:
    """One map [*spatial]: whether a place with the largest value is near enough to the mask."""
    inside = [at for at in places_of(mask.shape) if mask[at]]
    tops = [at for at in places_of(values.shape) if values[at] == values.max()]
    return float(any(math.dist(top, at) <= tolerance for top in tops for at in inside))


def chance(mask: Mask, tolerance: float) -> float:
    inside = [at for at in places_of(mask.shape) if mask[at]]
    near = [any(math.dist(one, at) <= tolerance for at in inside) for one in places_of(mask.shape)]
    return sum(near) / len(near)


def energy(values: Array, mask: Mask, evidence: str) -> float:
    within = total = 0.0
    for at in places_of(values.shape):
        own = float(values[at])
        own = max(own, 0.0) if evidence == "positive" else own
        own = abs(own) if evidence == "absolute" else own
        total += own
        within += own if mask[at] else 0.0
    return within / total if total else math.nan


def top(values: Array, count: int) -> set[tuple[int, ...]]:
    """The places of the largest values; equal ones in the order of their place."""
    order = sorted(places_of(values.shape), key=lambda at: -values[at])
    return set(order[:count])


def top_iou(values: Array, mask: Mask, count: int) -> float:
    best = top(values, count)
    inside = {at for at in places_of(mask.shape) if mask[at]}
    return len(best & inside) / len(best | inside)


def rank_accuracy(values: Array, mask: Mask, count: int) -> float:
    best = top(values, count)
    return sum(bool(mask[at]) for at in best) / len(best)


def gini(values: Array) -> float:
    """From its definition: the mean difference of all pairs, relative to twice the mean."""
    sizes = [abs(float(one)) for one in values.ravel()]
    mean = sum(sizes) / len(sizes)
    apart = sum(abs(a - b) for a in sizes for b in sizes) / len(sizes) ** 2
    return apart / (2.0 * mean) if mean else math.nan


def entropy(values: Array) -> float:
    sizes = [abs(float(one)) for one in values.ravel()]
    total = sum(sizes)
    if not total:
        return math.nan
    return -sum(one / total * math.log(one / total) for one in sizes if one)


def iou_of_top(a: Array, b: Array, share: float) -> float:
    count = max(1, round(share * a.size))
    one, other = top(a, count), top(b, count)
    return len(one & other) / len(one | other)


def sign_agreement(a: Array, b: Array, share: float) -> float:
    """Krishna (2022): of the features in both tops by magnitude, those with one sign."""
    count = max(1, round(share * a.size))
    both = top(np.abs(a), count) & top(np.abs(b), count)
    return sum(np.sign(a[at]) == np.sign(b[at]) for at in both) / count
