"""The methods again, slowly: one point at a time, in plain PyTorch, written from the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from saliency_fast.ops import philox

Model = Callable[..., Tensor]
Score = Callable[[Tensor], Tensor]
Inputs = tuple[Tensor, ...]


def gradient(model: Model, score: Score, point: Inputs) -> Inputs:
    """The gradient of one example's score at one point; inputs are [1, *]."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in point)
    return torch.autograd.grad(score(model(*leaves)).sum(), leaves)


def quadrature(rule: str, n: int) -> list[tuple[float, float]]:
    """(alpha, weight) of each step."""
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return [((a + 1) / 2, w / 2) for a, w in zip(nodes, weights, strict=True)]
    if rule == "trapezoid":
        ends = {0, n - 1}
        return [(i / (n - 1), (0.5 if i in ends else 1.0) / (n - 1)) for i in range(n)]
    shift = {"midpoint": 0.5, "left": 0.0, "right": 1.0}[rule]
    return [((i + shift) / n, 1.0 / n) for i in range(n)]


def integrated_gradients(
    model: Model, score: Score, x: Inputs, baseline: Inputs, rule: str, n: int
) -> Inputs:
    total = [torch.zeros_like(one) for one in x]
    for alpha, weight in quadrature(rule, n):
        point = tuple(b + alpha * (one - b) for one, b in zip(x, baseline, strict=True))
        for slot, g in zip(total, gradient(model, score, point), strict=True):
            slot += weight * g
    return tuple((one - b) * t for one, b, t in zip(x, baseline, total, strict=True))


def noises(x: Inputs, seed: int, sample: int) -> Inputs:
    """Standard normal noise of one sample; elements are numbered on from input to input."""
    found, first = [], 0
    for one in x:
        row = torch.tensor([seed]), torch.tensor([sample])
        found.append(philox.normals(*row, one.numel(), first).view(one.shape))
        first += one.numel()
    return tuple(found)


def noisy_gradients(
    model: Model,
    score: Score,
    x: Inputs,
    sigma: Sequence[float],
    samples: int,
    seed: int,
    antithetic: bool,
) -> list[Inputs]:
    found = []
    for sample in range(samples):
        drawn, sign = (sample // 2, 1 - 2 * (sample % 2)) if antithetic else (sample, 1)
        noise = noises(x, seed, drawn)
        point = tuple(one + sign * s * e for one, s, e in zip(x, sigma, noise, strict=True))
        found.append(gradient(model, score, point))
    return found


def expected_gradients(
    model: Model,
    score: Score,
    x: Inputs,
    baselines: Inputs,
    samples: int,
    seed: int,
    sigma: Sequence[float],
) -> Inputs:
    total = [torch.zeros_like(one) for one in x]
    for sample in range(samples):
        row, alpha = philox.line_draw(
            torch.tensor([seed]), torch.tensor([sample]), len(baselines[0])
        )
        noise = noises(x, seed, sample)
        ends = [one + s * e for one, s, e in zip(x, sigma, noise, strict=True)]
        starts = [b[row] for b in baselines]
        point = tuple(s + float(alpha) * (e - s) for s, e in zip(starts, ends, strict=True))
        for slot, g, s, e in zip(total, gradient(model, score, point), starts, ends, strict=True):
            slot += (e - s) * g / samples
    return tuple(total)


def relative_l2(found: Tensor, expected: Tensor) -> float:
    gap = (found.double() - expected.double()).norm()
    return float(gap / expected.double().norm().clamp_min(1e-300))
