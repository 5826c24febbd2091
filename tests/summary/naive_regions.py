"""Shares, labels and merging written the slow way, from their definitions."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def shares(values, labels):
    """{label: (share, amount, positive, negative)} of one map by loops in float64."""
    whole = positive = negative = 0.0
    sums: dict[int, list[float]] = {}
    for place in np.ndindex(values.shape):
        value, own = float(values[place]), sums.setdefault(int(labels[place]), [0.0] * 4)
        whole += abs(value)
        positive += max(value, 0.0)
        negative += max(-value, 0.0)
        for number, part in enumerate((value, abs(value), max(value, 0.0), max(-value, 0.0))):
            own[number] += part
    scales = (whole, whole, positive, negative)
    return {
        label: tuple(
            part / scale if scale else 0.0 for part, scale in zip(own, scales, strict=True)
        )
        for label, own in sums.items()
    }


def connected(mask, reach):
    """Components of positions of a mask that lie no more than 2 * reach + 1 apart along each axis,
    by looking at all pairs again and again.
    """
    positions = np.argwhere(mask)
    distance = np.abs(positions[:, None] - positions[None])
    near = (distance <= 2 * np.array(reach) + 1).all(2)
    number = np.arange(1, len(positions) + 1)
    while True:
        grown = np.where(near, number, 0).max(1)
        if np.array_equal(grown, number):
            break
        number = grown
    labels = np.zeros(mask.shape, dtype=np.int64)
    labels[mask] = number
    return labels


def merged(parts, values, most):
    """Ward's merging of neighbouring segments until `most` and one more are left: the sets of
    segments, by trying all pairs every time.
    """
    groups = {int(one): parts == one for one in np.unique(parts)}

    def cost(a, b):
        both = a | b

        def spread(mask):
            return ((values[mask] - values[mask].mean()) ** 2).sum()

        return spread(both) - spread(a) - spread(b)

    def touch(a, b):
        cross = ndimage.generate_binary_structure(a.ndim, 1)
        return bool((ndimage.binary_dilation(a, cross) & b).any())

    while len(groups) > most + 1:
        pairs = [
            (cost(groups[a], groups[b]), a, b)
            for a in groups
            for b in groups
            if a < b and touch(groups[a], groups[b])
        ]
        _, a, b = min(pairs)
        groups[a] = groups[a] | groups.pop(b)
    return {frozenset(np.unique(parts[mask]).tolist()) for mask in groups.values()}
