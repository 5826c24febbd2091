"""Backward rules again, slowly: float64 loops over single weights, written from the papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Matrix = tuple[Tensor, Tensor]
"""Weights [out, in] and biases [out] of an affine layer on one example, flattened."""
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def matrix(layer: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Matrix:
    """The affine `layer` for one example of `shape`, one unit vector at a time."""
    with torch.no_grad():
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        bias = layer(zero).flatten()
        columns = []
        for element in range(zero.numel()):
            unit = zero.clone()
            unit.view(-1)[element] = 1.0
            columns.append(layer(unit).flatten() - bias)
    return torch.stack(columns, 1), bias


def _sign(z: float) -> float:
    return -1.0 if z < 0 else 1.0


def shared(contributions: Tensor, rest: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """R_i = sum_j c_ij R_j / (sum_i c_ij + rest_j, off zero); contributions [out, in]."""
    found = torch.zeros(contributions.shape[1], dtype=torch.float64)
    for j, row in enumerate(contributions):
        z = sum(row.tolist()) + float(rest[j])
        z += _sign(z) * epsilon
        for i, one in enumerate(row.tolist()):
            if one != 0.0:
                found[i] += one / z * float(relevance[j])
    return found


def epsilon_rule(weight: Tensor, bias: Tensor, x: Tensor, relevance: Tensor, eps: float) -> Tensor:
    return shared(weight * x, bias, relevance, eps)


def gamma_rule(
    weight: Tensor, bias: Tensor, x: Tensor, relevance: Tensor, gamma: float, eps: float
) -> Tensor:
    """Of each output alone: contributions of its own sign are raised, its bias among them."""
    found = torch.zeros_like(x)
    for row, rest, owing in zip(weight, bias, relevance, strict=True):
        given = torch.cat([row * x, rest.view(1)])
        same = given >= 0 if float(given.sum()) >= 0 else given < 0
        raised = torch.where(same, given * (1 + gamma), given)
        found += shared(raised[None, :-1], raised[-1:], owing.view(1), eps)
    return found


def alpha_beta_rule(
    weight: Tensor, bias: Tensor, x: Tensor, relevance: Tensor, alpha: float, eps: float
) -> Tensor:
    contributions = weight * x
    gained = shared(contributions.clamp(min=0), bias.clamp(min=0), relevance, eps)
    lost = shared(contributions.clamp(max=0), bias.clamp(max=0), relevance, eps)
    return alpha * gained - (alpha - 1) * lost


def flat_rule(weight: Tensor, bias: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    """Inputs that a layer connects to an output are those with a weight there (none is 0)."""
    return shared((weight != 0).double(), torch.zeros_like(bias), relevance, 0.0)


def box_rule(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    relevance: Tensor,
    low: Tensor,
    high: Tensor,
    eps: float,
) -> Tensor:
    contributions = weight * x - low * weight.clamp(min=0) - high * weight.clamp(max=0)
    return shared(contributions, torch.zeros_like(bias), relevance, eps)


def guided(model: Sequence[nn.Module], x: Tensor, target: int, rule: str) -> Tensor:
    """Of one example [1, *] through layers in a row, back through one after another."""
    inputs = [x]
    with torch.no_grad():
        for layer in model:
            inputs.append(layer(inputs[-1].clone()))
    back = torch.zeros_like(inputs[-1])
    back[0, target] = 1.0
    for layer, given in zip(reversed(model), reversed(inputs[:-1]), strict=True):
        if isinstance(layer, nn.ReLU):
            back = back.clamp(min=0) * ((given > 0) if rule == "guided" else 1.0)
        else:
            leaf = given.clone().requires_grad_()
            (back,) = torch.autograd.grad(layer(leaf), leaf, back)
    return back
