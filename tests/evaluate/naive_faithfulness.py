"""Metrics of faithfulness as the papers write them: loops over examples, perturbations, places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

Score = Callable[[Tensor], float]


def infidelity(score: Score, x: Tensor, slope: Tensor, points: list[Tensor]) -> float:
    """The mean of (sum(I * map) - (f(x) - f(x - I))) ** 2 for one example and its points x - I."""
    total = 0.0
    for point in points:
        told = sum(
            float((a - b) * s)
            for a, b, s in zip(x.flatten(), point.flatten(), slope.flatten(), strict=True)
        )
        total += (told - (score(x) - score(point))) ** 2
    return total / len(points)


def grid_boxes(spatial: tuple[int, ...], edge: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of a grid in reading order, cut at the ends."""
    for corner in itertools.product(*(range(0, size, edge) for size in spatial)):
        yield tuple(slice(one, one + edge) for one in corner)


def patched(x: Tensor, fill: Tensor, edge: int, *, cumulative: bool) -> list[Tensor]:
    """The points of an example x [C, *spatial], one box after the other replaced."""
    found, point = [], x.clone()
    for box in grid_boxes(tuple(x.shape[1:]), edge):
        if not cumulative:
            point = x.clone()
        point[(slice(None), *box)] = fill[(slice(None), *box)]
        found.append(point.clone())
    return found


def correlation(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(np.array(a), np.array(b))[0, 1])


def sensitivity_n(
    score: Score, x: Tensor, values: Tensor, fill: Tensor, subsets: list[list[int]]
) -> float:
    """The correlation over subsets of the P last elements of x and fill [C, P]; values [P]."""
    sums, drops = [], []
    for subset in subsets:
        point, total = x.clone(), 0.0
        for place in subset:
            point[:, place] = fill[:, place]
            total += float(values[place])
        sums.append(total)
        drops.append(score(x) - score(point))
    return correlation(sums, drops)


def weight_of(offset: tuple[int, ...]) -> float:
    """Falls by half for each axis along which a neighbour lies off; all of them sum to 1."""
    every = itertools.product((-1, 0, 1), repeat=len(offset))
    total = sum(0.5 ** sum(map(abs, one)) for one in every if any(one))
    return 0.5 ** sum(map(abs, offset)) / total


def inpainted(x: Tensor, missing: Tensor) -> Tensor:
    """An example x [C, *spatial], its missing places, bool [*spatial], means of neighbours."""
    size, places = tuple(missing.shape), [tuple(one) for one in missing.nonzero().tolist()]
    number = {place: row for row, place in enumerate(places)}
    left, right = lil_matrix((len(places), len(places))), np.zeros((len(places), len(x)))
    for place, row in number.items():
        for offset in itertools.product((-1, 0, 1), repeat=len(size)):
            at = tuple(a + b for a, b in zip(place, offset, strict=True))
            inside = all(0 <= one < length for one, length in zip(at, size, strict=True))
            if not any(offset) or not inside:
                continue
            weight = weight_of(offset)
            left[row, row] += weight
            if at in number:
                left[row, number[at]] -= weight
            else:
                right[row] += weight * x[(slice(None), *at)].double().numpy()
    found = x.double().clone()
    solution = spsolve(left.tocsc(), right).reshape(len(places), len(x))
    for place, row in number.items():
        found[(slice(None), *place)] = torch.from_numpy(solution[row])
    return found


def top(values: Tensor, count: int) -> list[int]:
    """The places of the largest values [P], the first of equal ones first."""
    return sorted(range(len(values)), key=lambda place: (-float(values[place]), place))[:count]
