"""Similarities, sensitivity and stability again, slowly: loops in float64, from the papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def rank(values: Tensor) -> Tensor:
    """Ranks from 1 of a vector; equal ones share their mean."""
    below = (values[None, :] < values[:, None]).sum(1)
    upto = (values[None, :] <= values[:, None]).sum(1)
    return (1 + below + upto).double() / 2


def spearman(a: Tensor, b: Tensor) -> float:
    """Of two maps of one example."""
    one, other = rank(a.flatten()), rank(b.flatten())
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / (one.norm() * other.norm()))


def ssim_of_ranks(a: Tensor, b: Tensor, window: int = 7) -> float:
    """Of two maps [*spatial] of one example; windows where both are constant are left out."""
    count = a.numel()
    one, other = ((rank(m.flatten()) / count).view(m.shape) for m in (a, b))
    small, less = 0.01**2, 0.03**2
    found = []
    starts = [range(size - min(window, size) + 1) for size in a.shape]
    for corner in itertools.product(*starts):
        cut = tuple(slice(at, at + min(window, n)) for at, n in zip(corner, a.shape, strict=True))
        x, y = one[cut].flatten(), other[cut].flatten()
        if len(x.unique()) == 1 and len(y.unique()) == 1:
            continue
        joint = ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)
        above = (2 * x.mean() * y.mean() + small) * (2 * joint + less)
        below = (x.mean() ** 2 + y.mean() ** 2 + small) * (x.var() + y.var() + less)
        found.append(float(above / below))
    return sum(found) / len(found)


def sensitivities(
    explain: Callable[[Tensor], Tensor], x: Tensor, copies: list[Tensor], norm: str
) -> list[list[float]]:
    """Distances of each example's map [B][copies] from those of its perturbed copies."""
    maps = explain(x).double()
    found: list[list[float]] = [[] for _ in x]
    for copy in copies:
        again = explain(copy).double()
        for b in range(len(x)):
            moved = math.sqrt(float(((maps[b] - again[b]) ** 2).sum()))
            by = {"map": maps[b], "input": x[b].double(), "none": torch.ones(1)}[norm]
            found[b].append(moved / math.sqrt(float((by**2).sum())))
    return found
