"""Methods on paths again, slowly: one example and one point at a time, written from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from tests.naive import Model, Score, gradient, quadrature


def blurred(x: Tensor, sigma: Tensor, reach: int, padding: str) -> Tensor:
    """A blur of x [C, *] by its sum over offsets, axis after axis; autograd goes through sigma."""
    offsets = torch.arange(-reach, reach + 1).double()
    weight = torch.exp(-(offsets**2) / (2 * sigma**2))
    weight = weight / weight.sum()
    for axis in range(1, x.dim()):
        total = torch.zeros_like(x)
        size = x.shape[axis]
        for offset, share in zip(range(-reach, reach + 1), weight, strict=True):
            place = torch.arange(size) + offset
            inside = ((place >= 0) & (place < size)).double()
            shape = [-1 if a == axis else 1 for a in range(x.dim())]
            moved = x.index_select(axis, place.clamp(0, size - 1))
            total = total + share * (
                moved if padding == "replicate" else moved * inside.view(shape)
            )
        x = total
    return x


def blur_ig(
    model: Model,
    score: Score,
    x: Tensor,
    max_sigma: float,
    rule: str,
    n: int,
    padding: str,
    spacing: float = 2.0,
) -> Tensor:
    """Of one example [C, *], by the derivative that autograd takes of the blur."""
    reach, total = math.ceil(4 * max_sigma), torch.zeros_like(x)
    for alpha, weight in quadrature(rule, n):
        place = torch.tensor(alpha, dtype=torch.float64)
        point, change = torch.func.jvp(
            lambda a: blurred(x, max_sigma * (1 - a) ** spacing, reach, padding),
            (place,),
            (torch.ones_like(place),),
        )
        total += weight * gradient(model, score, (point[None],))[0][0] * change
    return total


def published_blur_ig(model: Model, score: Score, x: Tensor, max_sigma: float, n: int) -> Tensor:
    """The published sum: finite differences of the blur at sigmas from 0 up (Xu, 2020)."""
    reach, step, total = math.ceil(4 * max_sigma), 1e-2, torch.zeros_like(x)

    def at(sigma: float) -> Tensor:
        if sigma == 0:
            return x
        return blurred(x, torch.tensor(sigma, dtype=torch.float64), reach, "zeros")

    for i in range(n):
        sigma = i * max_sigma / n
        change = (at(sigma + step) - at(sigma)) / step
        total -= max_sigma / n * gradient(model, score, (at(sigma)[None],))[0][0] * change
    return total


def guided_ig(
    f: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, steps: int, fraction: float, far: float
) -> Tensor:
    """Algorithm 1 of Kapishnikov (2021) for one example; f gives its score."""
    end, begin = x.numpy(), start.numpy()
    length = np.abs(end - begin).sum()
    here, total = begin.copy(), np.zeros_like(begin)
    for step in range(1, steps + 1):
        point = torch.tensor(here).requires_grad_()
        true = torch.autograd.grad(f(point[None]).sum(), point)[0].numpy()
        size = np.abs(true)
        alpha = step / steps
        lowest = begin + max(alpha - far, 0.0) * (end - begin)
        highest = begin + min(alpha + far, 1.0) * (end - begin)
        target, gamma = length * (1 - alpha), np.inf
        while gamma > 1:
            old = here.copy()
            with np.errstate(all="ignore"):
                gone = np.where(end == begin, np.inf, (here - begin) / (end - begin))
            behind = gone < max(alpha - far, 0.0)
            here[behind] = lowest[behind]
            left = np.abs(end - here).sum()
            if math.isclose(left, target, rel_tol=1e-9, abs_tol=1e-9):
                total += (here - old) * true
                break
            size[np.isclose(here, highest, rtol=1e-12, atol=1e-13)] = np.inf
            edge = np.quantile(size, fraction, method="lower")
            chosen = (size <= edge) & np.isfinite(size)
            room = np.abs(highest - here)[chosen].sum()
            gamma = (left - target) / room if room > 0 else np.inf
            here[chosen] += min(gamma, 1.0) * (highest - here)[chosen]
            total += (here - old) * true
    return torch.tensor(total)


def idgi(f: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, steps: int) -> Tensor:
    """Algorithm 1 of Yang (2023) for one example."""
    total = torch.zeros_like(x)
    for step in range(steps):
        here = (start + step / steps * (x - start)).requires_grad_()
        there = start + (step + 1) / steps * (x - start)
        g = torch.autograd.grad(f(here[None]).sum(), here)[0]
        gain = float((f(there[None]) - f(here[None])).detach())
        total += g * g * gain / float((g * g).sum())
    return total


def integrated_hessians(
    f: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, region: Tensor, n: int
) -> Tensor:
    """Equations 5 and 6 of Janizek (2021) for one flat example [N], as a double sum [R, R]."""
    way, count = x - start, int(region.max()) + 1
    pairs = torch.zeros(len(x), len(x)).double()
    for alpha, one in quadrature("gauss_legendre", n):
        for beta, other in quadrature("gauss_legendre", n):
            point = start + alpha * beta * way
            hessian = torch.autograd.functional.hessian(lambda p: f(p[None])[0], point)
            slope = torch.autograd.functional.jacobian(lambda p: f(p[None])[0], point)
            pairs += one * other * alpha * beta * hessian * way[:, None] * way
            pairs += one * other * torch.diag(slope * way)
    member = torch.nn.functional.one_hot(region, count).double()
    return member.T @ pairs @ member


def temporal_rescaling(
    of: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, above: float
) -> Tensor:
    """Algorithm 1 of Ismail (2020) for one series [T, F]; `of` gives the base method's map."""
    whole, values = of(x), torch.zeros_like(x)
    times = []
    for t in range(len(x)):
        masked = x.clone()
        masked[t] = start[t]
        times.append(float((whole - of(masked)).abs().sum()))
    for t in range(len(x)):
        for i in range(x.shape[1]):
            if times[t] > np.quantile(times, above):
                masked = x.clone()
                masked[t, i] = start[t, i]
                values[t, i] = times[t] * (whole - of(masked)).abs().sum()
    return values


def adaptive(model: Model, score: Score, x: Tensor, baseline: Tensor, n: int) -> Tensor:
    """Integrated Gradients at `n` nodes of its own: one point after another, every slope, cubic and
    straight end of the interpolant by itself, integrated by SciPy.
    """
    rounds = (n >= 9) + (n >= 24) + (n >= 64)
    count = max(8, math.ceil(n / 1.6**rounds))
    nodes = [(i + 0.5) / count for i in range(count)]

    def value(alpha: float) -> np.ndarray:
        found = gradient(model, score, (baseline + alpha * (x - baseline),))[0]
        return (found * (x - baseline)).flatten().numpy()

    while len(nodes) < n:
        values = [value(alpha) for alpha in nodes]
        gaps = [(a, b, float(np.linalg.norm(v - u))) for a, b, u, v in _neighbours(nodes, values)]
        # (left, right, what it may hide in one piece); an end hides what a gap twice as wide would.
        pieces = [[a, b, (b - a) * change, 1] for a, b, change in gaps]
        for end, (a, b, change) in (((0.0, nodes[0]), gaps[0]), ((nodes[-1], 1.0), gaps[-1])):
            pieces.append([*end, (2 * (end[1] - end[0])) ** 2 * change / (b - a), 1])
        for _ in range(min(n, math.ceil(len(nodes) * 1.6)) - len(nodes)):
            max(pieces, key=lambda one: one[2] / one[3] ** 2)[3] += 1
        for left, right, _, parts in pieces:
            for i in range(1, parts):
                if left == 0.0:
                    share = i / (parts - 0.5) if parts > 2 else i / 2
                    nodes.append(right * (1 - share))
                elif right == 1.0:
                    share = i / (parts - 0.5) if parts > 2 else i / 2
                    nodes.append(left + (1 - left) * share)
                else:
                    nodes.append(left + (right - left) * i / parts)
        nodes.sort()
    return torch.from_numpy(_integral(nodes, [value(alpha) for alpha in nodes])).view_as(x)


def _neighbours(nodes: list[float], values: list[np.ndarray]) -> list:
    return list(zip(nodes, nodes[1:], values, values[1:], strict=False))


def _integral(nodes: list[float], values: list[np.ndarray]) -> np.ndarray:
    """Of the cubic through values with slopes of parabolas, and lines beyond the ends."""
    rises = [(v - u) / (b - a) for a, b, u, v in _neighbours(nodes, values)]
    slopes = [rises[0]]
    for i in range(1, len(nodes) - 1):
        parabola = np.polynomial.polynomial.polyfit(nodes[i - 1 : i + 2], values[i - 1 : i + 2], 2)
        slopes.append(parabola[1] + 2 * parabola[2] * nodes[i])
    slopes.append(rises[-1])
    cubic = CubicHermiteSpline(nodes, np.stack(values), np.stack(slopes))
    before, after = nodes[0], 1 - nodes[-1]
    return (
        cubic.integrate(nodes[0], nodes[-1])
        + before * values[0]
        - before**2 / 2 * slopes[0]
        + after * values[-1]
        + after**2 / 2 * slopes[-1]
    )
