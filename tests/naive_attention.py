"""Attention methods again, slowly, one example and one head at a time, written from the papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, H, T, S] and output [B, H, T, E] of softmax(QK'/sqrt(E)) V (Vaswani, 2017).

    Key heads are shared by consecutive query heads; rows without any key are zero.
    """
    batch, heads, tokens, width = query.shape
    weights = query.new_zeros(batch, heads, tokens, key.shape[2])
    output = query.new_zeros(batch, heads, tokens, value.shape[3])
    scale = 1 / math.sqrt(width) if scale is None else scale
    wide = None if mask is None else mask.expand(weights.shape)
    for b in range(batch):
        for h in range(heads):
            own = h // (heads // key.shape[1])
            for t in range(tokens):
                scores = [float(query[b, h, t] @ k) * scale for k in key[b, own]]
                for s in range(len(scores)):
                    if causal and s > t:
                        scores[s] = -math.inf
                    if wide is not None and wide.dtype == torch.bool and not wide[b, h, t, s]:
                        scores[s] = -math.inf
                    if wide is not None and wide.dtype != torch.bool:
                        scores[s] += float(wide[b, h, t, s])
                top = max(scores)
                if top == -math.inf:
                    continue
                powers = [math.exp(one - top) for one in scores]
                row = torch.tensor(powers, dtype=query.dtype) / sum(powers)
                weights[b, h, t] = row
                output[b, h, t] = row @ value[b, own]
    return weights, output


def rollout(
    layers: list[Tensor], residual: float = 0.5, fusion: str = "mean", discard: float = 0.0
) -> Tensor:
    """[B, T, T]: A_L ... A_1 with A = 0.5 W + 0.5 I, rows normed (Abnar, Zuidema, 2020)."""
    found = []
    for b in range(len(layers[0])):
        total = torch.eye(layers[0].shape[2], dtype=torch.float64)
        for layer in layers:
            heads = [one.double() for one in layer[b]]
            if fusion == "mean":
                fused = sum(heads) / len(heads)
            else:
                fused = heads[0]
                for one in heads[1:]:
                    fused = torch.maximum(fused, one) if fusion == "max" else fused.minimum(one)
            order = fused.flatten().argsort()[: int(discard * fused.numel())]
            fused = fused.flatten().clone()
            fused[order] = 0
            fused = fused.view(len(total), len(total))
            mixed = (1 - residual) * fused + residual * torch.eye(len(total), dtype=torch.float64)
            for row in mixed:
                row /= row.sum()
            total = mixed @ total
        found.append(total)
    return torch.stack(found)


def relevance(layers: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """[B, T, T]: R = I, then R += E_h[(grad A * A)+] R per layer (Chefer, Gur, Wolf, 2021)."""
    found = []
    for b in range(len(layers[0])):
        total = torch.eye(layers[0].shape[2], dtype=torch.float64)
        for layer, gradient in zip(layers, gradients, strict=True):
            heads = [
                (g.double() * a.double()).clamp_min(0)
                for g, a in zip(gradient[b], layer[b], strict=True)
            ]
            total = total + sum(heads) / len(heads) @ total
        found.append(total)
    return torch.stack(found)
