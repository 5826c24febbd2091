"""Quadrature on [0, 1]: rules as nodes and weights, and how nested rules are refined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saliency_fast.engine.recipe import Level

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """points(n) gives nodes and weights [n], the weights summing to one. A nested rule is refined
    to `refined(n)` nodes, of which `old` are the present n; the sum over these keeps the share
    `keep`.
    """

    points: Callable[[int], tuple[Array, Array]]
    least: int = 1
    refined: Callable[[int], int] | None = None
    keep: float = 0.0
    old: slice | None = None


def _riemann(first: float) -> Callable[[int], tuple[Array, Array]]:
    """Nodes (i + first) / n of equal weight."""
    return lambda n: ((np.arange(n) + first) / n, np.full(n, 1.0 / n))


def _trapezoid(n: int) -> tuple[Array, Array]:
    weight = np.full(n, 1.0 / (n - 1))
    weight[[0, -1]] /= 2.0
    return np.linspace(0.0, 1.0, n), weight


def _gauss_legendre(n: int) -> tuple[Array, Array]:
    nodes, weight = np.polynomial.legendre.leggauss(n)
    return (nodes + 1.0) / 2.0, weight / weight.sum()


RULES = {
    "midpoint": Rule(_riemann(0.5), refined=lambda n: 3 * n, keep=1.0 / 3.0, old=slice(1, None, 3)),
    "trapezoid": Rule(
        _trapezoid, least=2, refined=lambda n: 2 * n - 1, keep=0.5, old=slice(0, None, 2)
    ),
    "gauss_legendre": Rule(_gauss_legendre),
    "left": Rule(_riemann(0.0)),
    "right": Rule(_riemann(1.0)),
}
NESTED = tuple(name for name, rule in RULES.items() if rule.refined)


def level(rule: Rule, steps: int) -> Level:
    """One level of `steps` nodes, in two replicates: neighbours are in different ones, and half the
    replicates' difference is at least the error of the whole rule on the built-in CNN (1 to 3.6
    times). Pairs of neighbours come in bit-reversed order, so that the first nodes are spread over
    the path.
    """
    alpha, weight = rule.points(steps)
    count = (steps + 1) // 2
    width = max(1, (count - 1).bit_length())
    pairs = sorted(range(count), key=lambda i: f"{i:0{width}b}"[::-1])
    order = [i for pair in pairs for i in (2 * pair, 2 * pair + 1) if i < steps]
    replicate = torch.tensor(order, device="cpu") % 2
    return Level(_tensor(alpha[order]), _tensor(weight[order]), replicate)


def nested_levels(rule: Rule, steps: int, most: int) -> Iterator[Level]:
    """A first level of `steps` nodes, and its refinements up to `most` nodes in all."""
    assert rule.refined is not None
    assert rule.old is not None
    alpha, weight = rule.points(steps)
    yield Level(_tensor(alpha), _tensor(weight), torch.ones(steps, dtype=torch.int64, device="cpu"))
    while (finer := rule.refined(steps)) <= most:
        alpha, weight = (np.delete(one, rule.old) for one in rule.points(finer))
        replicate = torch.ones(finer - steps, dtype=torch.int64, device="cpu")
        yield Level(_tensor(alpha), _tensor(weight), replicate, rule.keep)
        steps = finer


@lru_cache
def gauss_logarithm(n: int) -> tuple[Array, Array]:
    """Nodes and weights of Gauss's rule on [0, 1] for the weight -ln t, the density of a product of
    uniform numbers, by its three-term recurrence (Stieltjes, 1884; Golub & Welsch, 1969).
    """
    alpha, share = _gauss_legendre(n + 1)
    t, weight = np.outer(alpha, alpha).ravel(), np.outer(share, share).ravel()
    earlier, polynomial, norm = np.zeros_like(t), np.ones_like(t), 0.0
    diagonal: list[float] = []
    side: list[float] = []
    for _ in range(n):
        diagonal.append(float(weight @ (t * polynomial**2)))
        following = (t - diagonal[-1]) * polynomial - norm * earlier
        norm = float(np.sqrt(weight @ following**2))
        side.append(norm)
        earlier, polynomial = polynomial, following / norm
    jacobi = np.diag(diagonal) + np.diag(side[:-1], 1) + np.diag(side[:-1], -1)
    nodes, vectors = np.linalg.eigh(jacobi)
    return nodes, vectors[0] ** 2


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
