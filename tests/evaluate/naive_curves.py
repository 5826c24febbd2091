"""Deletion and insertion again, slowly: one example and one step at a time, in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saliency_fast.engine.baselines import read_baselines


def fill_of(substrate: float | str | Tensor, x: Tensor, seed: int = 0) -> Tensor:
    """What stands in the place of what is gone, [B, *]."""
    if substrate == "zero":
        return torch.zeros_like(x)
    if substrate == "mean":
        axes = tuple(range(2, x.dim())) if x.dim() > 2 else (1,)
        return x.mean(axes, keepdim=True).expand_as(x)
    return read_baselines(substrate, (x,), seed)[0].expand_as(x)


def order_of(values: Tensor, x: Tensor, per: str, order: str) -> list[list[tuple[int, ...]]]:
    """For one example's values [C | 1, *spatial] (or [F]): the elements of x that go together,
    first those that go first; equal ones in the order of their place.
    """
    shape = x.shape
    indices = [tuple(one) for one in torch.ones(shape).nonzero().tolist()]
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    scores: dict[tuple[int, ...], float] = {}
    spread = values.expand(shape)
    for index in indices:
        alone = per == "element" or len(shape) == 1
        key = index if alone else index[1:]
        groups.setdefault(key, []).append(index)
        scores[key] = float(spread[index] if alone else values[(slice(None), *key)].sum())
    sign = -1.0 if order == "most_first" else 1.0
    return [groups[key] for key in sorted(groups, key=lambda key: sign * scores[key])]


def score(model: Callable[[Tensor], Tensor], point: Tensor, target: int, output: str) -> float:
    with torch.no_grad():
        raw = model(point[None])[0]
    # A model that ends in softmax gives probabilities as they are.
    told = bool((raw >= 0).all()) and abs(float(raw.sum()) - 1.0) < 1e-4
    return float((raw.softmax(0) if output == "softmax" and not told else raw)[target])


def walk(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    values: Tensor,
    target: int,
    fill: Tensor,
    counts: Sequence[int],
    *,
    insert: bool = False,
    output: str = "softmax",
    per: str = "place",
    order: str = "most_first",
) -> list[float]:
    """The scores of one example after so many places have gone, or come."""
    begin, end = (fill, x) if insert else (x, fill)
    groups = order_of(values, x, per, order)
    found = []
    for count in counts:
        point = begin.clone()
        for group in groups[:count]:
            for index in group:
                point[index] = end[index]
        found.append(score(model, point, target, output))
    return found


def area(shares: Sequence[float], scores: Sequence[float]) -> float:
    pairs = list(zip(shares, scores, strict=True))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(pairs))
