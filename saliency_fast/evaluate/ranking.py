"""Ranking: the order in which a map says that places matter."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast.errors import InputError

PER = ("place", "element")
ORDERS = ("most_first", "least_first")


def check_ranking(per: str, order: str) -> None:
    """Raises unless both are known."""
    for name, given, names in (("per", per, PER), ("order", order, ORDERS)):
        if given not in names:
            raise InputError(f"{name} must be one of {', '.join(names)}: got {given!r}")


def ranking(values: Tensor, inputs: Tensor, per: str, order: str) -> tuple[Tensor, Tensor]:
    """(rank, sequence): int32 and int64 [B, P]; rank 0 goes first, sequence holds who has which.

    values [B, C | 1, *] of inputs [B, C, *]. per: P places, whose channels are summed and go
    together, or P elements. Equal ones go in the order of their place, so that no two runs differ.
    """
    if per == "element":
        scores = values.expand(inputs.shape).flatten(1)
    else:
        scores = values.flatten(1) if values.dim() == 2 else values.sum(1).flatten(1)
    sequence = scores.argsort(dim=1, descending=order == "most_first", stable=True)
    place = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    rank = torch.empty_like(sequence, dtype=torch.int32)
    return rank.scatter_(1, sequence, place.expand_as(rank)), sequence
