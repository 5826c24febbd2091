"""Attacks, maps that are moved and unusual maps, slowly and as the papers write them."""

import math

import torch
from torch import Tensor


def cross_entropy_gradient(model, x: Tensor, classes: Tensor) -> Tensor:
    """One example at a time."""
    found = []
    for row, label in zip(x, classes.tolist(), strict=True):
        point = row[None].clone().requires_grad_()
        logits = model(point)[0]
        loss = logits.exp().sum().log() - logits[label]
        found.append(torch.autograd.grad(loss, point)[0])
    return torch.cat(found)


def clipped(moved: Tensor, x: Tensor, epsilon: float, low: float, high: float) -> Tensor:
    return (x + (moved - x).clamp(-epsilon, epsilon)).clamp(low, high)


def pgd(model, x, classes, epsilon, steps, size, start, low, high) -> Tensor:
    moved = clipped(start, x, epsilon, low, high)
    for _ in range(steps):
        gradient = cross_entropy_gradient(model, moved, classes)
        moved = clipped(moved + size * gradient.sign(), x, epsilon, low, high)
    return moved


def mann_whitney(clean: Tensor, attacked: Tensor) -> float:
    """How many of all pairs are in the right order; equal ones count half."""
    total = 0.0
    for a in attacked.tolist():
        for b in clean.tolist():
            total += 1.0 if a > b else 0.5 if a == b else 0.0
    return total / (len(clean) * len(attacked))


def gini(values: list[float]) -> float:
    """Half the mean absolute difference of all pairs over the mean."""
    count = len(values)
    apart = sum(abs(a - b) for a in values for b in values) / count**2
    return apart / (2.0 * sum(values) / count)


def entropy(values: list[float]) -> float:
    total = sum(values)
    shares = [one / total for one in values if one > 0]
    return -sum(one * math.log(one) for one in shares) / math.log(len(values))


def roughness(grid: Tensor) -> float:
    """Differences of neighbours in a map [H, W] over the sum of magnitudes."""
    height, width = grid.shape
    total = 0.0
    for i in range(height):
        for j in range(width):
            if i + 1 < height:
                total += abs(float(grid[i + 1, j] - grid[i, j]))
            if j + 1 < width:
                total += abs(float(grid[i, j + 1] - grid[i, j]))
    return total / float(grid.abs().sum())


def smoothness(grid: Tensor, window: int) -> float:
    """Pearson's correlation of a map [H, W] with means over windows, edges repeated."""
    (height, width), reach = grid.shape, window // 2
    mean = torch.zeros_like(grid)
    for i in range(height):
        for j in range(width):
            near = [
                grid[min(max(i + a, 0), height - 1), min(max(j + b, 0), width - 1)]
                for a in range(-reach, reach + 1)
                for b in range(-reach, reach + 1)
            ]
            mean[i, j] = sum(near) / len(near)
    return float(torch.corrcoef(torch.stack([grid.flatten(), mean.flatten()]))[0, 1])


def spread(grid: Tensor) -> float:
    """The root of the mean squared distance from the centre of magnitude, axes of length one."""
    height, width = grid.shape
    share = grid.abs() / grid.abs().sum()
    places = [(i, j) for i in range(height) for j in range(width)]
    top = sum(float(share[i, j]) * i / height for i, j in places)
    left = sum(float(share[i, j]) * j / width for i, j in places)
    far = sum(
        float(share[i, j]) * ((i / height - top) ** 2 + (j / width - left) ** 2) for i, j in places
    )
    return math.sqrt(far)


def shrunk_correlations(rows: Tensor) -> tuple[Tensor, float]:
    """Schäfer & Strimmer (2005), table 1 with target D of unit variances, of standardised rows."""
    count, size = rows.shape
    found, noise = torch.zeros(size, size, dtype=rows.dtype), 0.0
    signal = 0.0
    for i in range(size):
        for j in range(size):
            products = rows[:, i] * rows[:, j]
            mean = products.mean()
            found[i, j] = count / (count - 1) * mean
            if i != j:
                noise += float(count / (count - 1) ** 3 * ((products - mean) ** 2).sum())
                signal += float(found[i, j]) ** 2
    share = min(1.0, noise / signal)
    for i in range(size):
        for j in range(size):
            found[i, j] = 1.0 if i == j else (1.0 - share) * found[i, j]
    return found, share


def steered(scalar, points, alphas, weights, factor, direction: Tensor, x: Tensor) -> Tensor:
    """The gradient at x of the sum of a map times `direction`, where the map is the factor at x
    times the weighted gradients of `scalar` at the points, which follow x by alpha.
    """
    free = x.clone().requires_grad_()
    total = torch.zeros_like(x)
    for point, alpha, weight in zip(points, alphas, weights, strict=True):
        at = point.detach() + alpha * (free - x)
        (gradient,) = torch.autograd.grad(scalar(at).sum(), at, create_graph=True)
        total = total + weight * gradient
    (found,) = torch.autograd.grad((factor(free) * total * direction).sum(), free)
    return found
