"""Quadrature on [0, 1]: a rule is its points and weights; a nested one says how it is refined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.engine.recipe import Level

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """points(n) gives alphas and weights [n], the weights summing to one.

    A nested rule reaches `refined(n)` points by adding to its n, which are every `old` of them
    and whose sum keeps the share `keep`.
    """

    points: Callable[[int], tuple[Array, Array]]
    least: int = 1
    refined: Callable[[int], int] | None = None
    keep: float = 0.0
    old: slice | None = None


def _midpoint(n: int) -> tuple[Array, Array]:
    return (np.arange(n) + 0.5) / n, np.full(n, 1.0 / n)


def _left(n: int) -> tuple[Array, Array]:
    return np.arange(n) / n, np.full(n, 1.0 / n)


def _right(n: int) -> tuple[Array, Array]:
    return np.arange(1, n + 1) / n, np.full(n, 1.0 / n)


def _trapezoid(n: int) -> tuple[Array, Array]:
    weight = np.full(n, 1.0 / (n - 1))
    weight[[0, -1]] /= 2.0
    return np.linspace(0.0, 1.0, n), weight


def _gauss_legendre(n: int) -> tuple[Array, Array]:
    nodes, weight = np.polynomial.legendre.leggauss(n)
    return (nodes + 1.0) / 2.0, weight / weight.sum()


RULES = {
    "midpoint": Rule(_midpoint, refined=lambda n: 3 * n, keep=1.0 / 3.0, old=slice(1, None, 3)),
    "trapezoid": Rule(
        _trapezoid, least=2, refined=lambda n: 2 * n - 1, keep=0.5, old=slice(0, None, 2)
    ),
    "gauss_legendre": Rule(_gauss_legendre),
    "left": Rule(_left),
    "right": Rule(_right),
}
NESTED = tuple(name for name, rule in RULES.items() if rule.refined)


def level(rule: Rule, steps: int) -> Level:
    """One level of `steps` points, in two folds that are rules of their own.

    Neighbours take turns; half the folds' difference is 1 to 3.6 times the error of the whole rule
    on the built-in CNN, and cautious on smooth networks, where half the points err more. Pairs of
    neighbours are visited in bit-reversed order, so that any beginning is spread over the path and
    serves both folds.
    """
    alpha, weight = rule.points(steps)
    pairs = _bit_reversed((steps + 1) // 2)
    order = torch.tensor(
        [i for pair in pairs for i in (2 * pair, 2 * pair + 1) if i < steps], device="cpu"
    )
    fold = torch.arange(steps, device="cpu") % 2
    return Level(_tensor(alpha)[order], _tensor(weight)[order], fold[order])


def nested_levels(rule: Rule, steps: int, most: int) -> Iterator[Level]:
    """A first level of `steps` points and its refinements, as far as `most` points in all reach."""
    assert rule.refined is not None
    alpha, weight = rule.points(steps)
    yield Level(_tensor(alpha), _tensor(weight), torch.ones(steps, dtype=torch.int64, device="cpu"))
    while (finer := rule.refined(steps)) <= most:
        alpha, weight = rule.points(finer)
        new = np.ones(finer, dtype=bool)
        new[rule.old] = False
        fold = torch.ones(finer - steps, dtype=torch.int64, device="cpu")
        yield Level(_tensor(alpha[new]), _tensor(weight[new]), fold, rule.keep)
        steps = finer


def gauss_logarithm(n: int) -> tuple[Array, Array]:
    """Nodes and weights of Gauss's rule for integrals over [0, 1] with the weight -ln t.

    Its recurrence follows from moments over Legendre polynomials (Gautschi, 1970), its nodes from
    the eigenvalues of that (Golub & Welsch, 1969).
    """
    order = np.arange(2 * n)
    steps = order.astype(np.float64)
    legendre = steps**2 / (4.0 * (4.0 * steps**2 - 1.0))
    # The integral of -ln t P(t) is (-1)^l / (l (l + 1)), here of polynomials that begin with t^l.
    scale = np.cumprod(np.concatenate([[1.0], order[1:] / (4.0 * order[1:] - 2.0)]))
    moments = scale * np.where(order % 2, -1.0, 1.0) / np.maximum(steps * (steps + 1.0), 1.0)
    earlier, row = np.zeros(2 * n), moments
    middle, beside = np.zeros(n), np.ones(n)
    middle[0] = 0.5 + moments[1] / moments[0]
    for k in range(1, n):
        part = slice(k, 2 * n - k)
        new = np.zeros(2 * n)
        below, above = slice(k - 1, 2 * n - k - 1), slice(k + 1, 2 * n - k + 1)
        new[part] = (
            row[above]
            - (middle[k - 1] - 0.5) * row[part]
            - beside[k - 1] * earlier[part]
            + legendre[part] * row[below]
        )
        middle[k] = 0.5 + new[k + 1] / new[k] - row[k] / row[k - 1]
        beside[k] = new[k] / row[k - 1]
        earlier, row = row, new
    side = np.sqrt(beside[1:])
    nodes, vectors = np.linalg.eigh(np.diag(middle) + np.diag(side, 1) + np.diag(side, -1))
    return nodes, vectors[0] ** 2


def _bit_reversed(n: int) -> list[int]:
    width = max(1, (n - 1).bit_length())
    return sorted(range(n), key=lambda i: f"{i:0{width}b}"[::-1])


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
