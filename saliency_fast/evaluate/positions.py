"""Spatial positions: their ranking by a map, random orders, blocks, and how unequal they are."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.ops import philox, random_bits

PER = ("place", "element")
ORDERS = ("most_first", "least_first")


def spatial_shape(x: Tensor) -> torch.Size:
    """The shape of the positions of inputs [B, C, *spatial], or the features of [B, F]."""
    return x.shape[2:] if x.dim() > 2 else x.shape[1:]


def ranking(values: Tensor, inputs: Tensor, per: str, order: str) -> tuple[Tensor, Tensor]:
    """The rank of each position and the positions in that order, int32 and int64 [B, P]; rank 0 is
    first, and ties go in the order of their index.

    values [B, C | 1, *] of inputs [B, C, *]. per: "place" ranks P positions by the sum of their
    channels, "element" P elements.
    """
    if per == "element":
        scores = values.expand(inputs.shape).flatten(1)
    else:
        scores = values.flatten(1) if values.dim() == 2 else values.sum(1).flatten(1)
    sequence = scores.argsort(dim=1, descending=order == "most_first", stable=True)
    number = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    rank = torch.empty_like(sequence, dtype=torch.int32)
    return rank.scatter_(1, sequence, number.expand_as(rank)), sequence


def random_ranks(seed: int, sample: Tensor, positions: int) -> Tensor:
    """A random order for each sample int64 [S], as the rank of each position, int64 [S, P]."""
    words = random_bits(torch.full_like(sample, seed), sample, positions, 0, philox.ORDER)
    rank = torch.empty_like(words)
    number = torch.arange(positions, device=sample.device).expand_as(rank)
    return rank.scatter_(1, words.argsort(dim=1, stable=True), number)


def blocks(spatial: torch.Size, size: int, device: torch.device) -> Tensor:
    """The block of `size` positions per axis that holds each position, in reading order, int64
    [P].
    """
    number = torch.zeros((), dtype=torch.int64, device=device)
    for length in spatial:
        own = torch.arange(length, device=device) // size
        number = number[..., None] * -(-length // size) + own
    return number.flatten()


def block_sums(maps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sums of maps [B, *spatial] over blocks, float64 [B, blocks], and the block of each
    position, int64 [P].
    """
    block = blocks(maps.shape[1:], size, maps.device)
    sums = maps.new_zeros((len(maps), int(block.max()) + 1), dtype=torch.float64)
    return sums.index_add_(1, block, maps.flatten(1).double()), block


def value_range(x: Tensor) -> Tensor:
    """The largest less the smallest value of each example, float64 [B]."""
    low, high = torch.aminmax(x.flatten(1), dim=1)
    return (high - low).double()


def gini(shares: Tensor) -> Tensor:
    """The Gini index of shares [B, P] that sum to one, float64 [B]."""
    count = shares.shape[1]
    number = torch.arange(1, count + 1, dtype=torch.float64, device=shares.device)
    return (shares.sort(1).values * (2.0 * number - count - 1.0)).sum(1) / count


def check_shares(name: str, shares: object) -> None:
    """Raises unless the value is a tuple of increasing shares, above 0 and at most 1."""
    if not isinstance(shares, tuple) or not shares:
        raise InputTypeError(f"{name} must be a tuple such as (0.1, 0.5): got {shares!r}")
    for one in shares:
        check_share(name, one)
    if any(one >= other for one, other in itertools.pairwise(shares)):
        raise InputError(f"{name} must rise: got {shares}")


def check_tolerance(name: str, value: object, unit: str = "") -> None:
    """Raises unless the value is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number{unit and f' of {unit}'}: got {value!r}")
    if not 0.0 <= value < math.inf:
        raise InputError(f"{name} must be 0 or more{unit and f' {unit}'}, finite: got {value}")


def check_share(name: str, share: object) -> None:
    """Raises unless the value is a share above 0 and at most 1."""
    checks.positive(name, share)
    checks.fraction(name, share)
