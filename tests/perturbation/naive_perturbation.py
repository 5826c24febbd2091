"""The perturbation methods again, slowly: one point at a time, in float64, from the papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.ops import philox, random_bits

Score = Callable[..., Tensor]
"""The explained number of one example [1, *], a tensor without axes."""
Inputs = tuple[Tensor, ...]


def occlusion(
    score: Score,
    x: Inputs,
    fill: Inputs,
    windows: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
) -> Inputs:
    """Of one example: for every element the mean loss over the windows that cover it."""
    found = []
    for number, (window, stride) in enumerate(zip(windows, strides, strict=True)):
        size = x[number].shape[1:]
        lost, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size)
        starts = [
            [s for s in range(0, n, step) if s == 0 or s - step + w < n]
            for n, w, step in zip(size, window, stride, strict=True)
        ]
        for corner in itertools.product(*starts):
            box = tuple(slice(s, s + w) for s, w in zip(corner, window, strict=True))
            point = [one.clone() for one in x]
            point[number][(0, *box)] = fill[number][(0, *box)]
            lost[box] += score(*x) - score(*point)
            count[box] += 1
        found.append((lost / count)[None])
    return tuple(found)


def kept(x: Inputs, fill: Inputs, features: Inputs, there: set[int]) -> Inputs:
    """One example with some features, the others from the fill."""
    return tuple(
        torch.where(torch.isin(own, torch.tensor(sorted(there), dtype=torch.int64)), one, start)
        for one, start, own in zip(x, fill, features, strict=True)
    )


def numbers(features: Inputs) -> list[int]:
    return torch.unique(torch.cat([one.flatten() for one in features])).tolist()


def spread(values: dict[int, float], features: Inputs) -> Inputs:
    found = []
    for own in features:
        one = torch.zeros(own.shape, dtype=torch.float64)
        for number, value in values.items():
            one[own == number] = value
        found.append(one)
    return tuple(found)


def ablation(score: Score, x: Inputs, fill: Inputs, features: Inputs) -> dict[int, float]:
    players = set(numbers(features))
    whole = float(score(*x))
    return {f: whole - float(score(*kept(x, fill, features, players - {f}))) for f in players}


def shapley(score: Score, x: Inputs, fill: Inputs, features: Inputs) -> dict[int, float]:
    """The mean gain over all orders of the features, one order after another."""
    players, known = numbers(features), {}

    def worth(there: frozenset[int]) -> float:
        if there not in known:
            known[there] = float(score(*kept(x, fill, features, set(there))))
        return known[there]

    total = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            total[player] += worth(before | {player}) - worth(before)
    return {player: one / math.factorial(len(players)) for player, one in total.items()}


def walk(
    score: Score, x: Inputs, fill: Inputs, features: Inputs, orders: Sequence[Sequence[int]]
) -> dict[int, float]:
    """The mean gain over some orders."""
    total = dict.fromkeys(numbers(features), 0.0)
    for order in orders:
        before: set[int] = set()
        for player in order:
            gain = score(*kept(x, fill, features, before | {player}))
            total[player] += float(gain - score(*kept(x, fill, features, before)))
            before.add(player)
    return {player: one / len(orders) for player, one in total.items()}


def words(seed: int, sample: int, count: int, stream: int, first: int = 0) -> Tensor:
    """Random words int64 [count] of one sample."""
    row: Tensor = random_bits(torch.tensor([seed]), torch.tensor([sample]), count, first, stream)
    return row[0]


def order(seed: int, number: int, features: int, antithetic: bool) -> list[int]:
    drawn = words(seed, number // 2 if antithetic else number, features, philox.ORDER)
    found = sorted(range(features), key=lambda f: int(drawn[f]))
    return found[::-1] if antithetic and number % 2 else found


def kernel_coalition(seed: int, number: int, features: int, paired: bool) -> set[int]:
    """A size by the Shapley kernel, and the features with the smallest words."""
    drawn = words(seed, number // 2 if paired else number, features + 1, philox.COALITION)
    chance = [1.0 / (s * (features - s)) for s in range(1, features)]
    share, size, so_far = (int(drawn[0] >> 8) + 0.5) / 2**24 * sum(chance), 1, chance[0]
    while share > so_far:
        so_far += chance[size]
        size += 1
    found = set(sorted(range(features), key=lambda f: int(drawn[1 + f]))[:size])
    return set(range(features)) - found if paired and number % 2 else found


def kernel_shap(z: Tensor, y: Tensor, none: float, gain: float) -> Tensor:
    """Least squares of y [M] on coalitions z [M, F] under a constraint, by Lagrange's equations."""
    features = z.shape[1]
    system = torch.zeros(features + 1, features + 1, dtype=torch.float64)
    system[:features, :features] = z.T @ z
    system[features, :features] = system[:features, features] = 1.0
    right = torch.cat([z.T @ (y - none), torch.tensor([gain], dtype=torch.float64)])
    return torch.linalg.solve(system, right)[:features]


def ridge(z: Tensor, y: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Weighted ridge regression with a free intercept, by its normal equations."""
    table = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), z], 1)
    penalty = alpha * torch.eye(table.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0.0
    gram = table.T @ torch.diag(weight) @ table + penalty
    return torch.linalg.solve(gram, table.T @ (weight * y))[1:]


def rise_mask(
    seed: int, sample: int, number: int, size: Sequence[int], grid: int, keep: float
) -> Tensor:
    """One mask of Petsiuk (2018): a small binary one, enlarged, and cut out at random."""
    cells = grid ** len(size)
    drawn = words(seed, sample, cells + len(size), philox.MASK, number << 32)
    small = ((drawn[:cells] >> 8).double() / 2**24 < keep).double().view((grid,) * len(size))
    cell = [math.ceil(n / grid) for n in size]
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    large = functional.interpolate(
        small[None, None], [(grid + 1) * one for one in cell], mode=mode, align_corners=False
    )[0, 0]
    for axis, (n, one) in enumerate(zip(size, cell, strict=True)):
        large = large.narrow(axis, int((drawn[cells + axis] * one) >> 32), n)
    return large
