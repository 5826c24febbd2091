"""Computations on maps: rankings of positions, blocks, and similarities of two maps."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.ops import philox, random_bits

PER = ("place", "element")
ORDERS = ("most_first", "least_first")
WINDOW = 7
"""Positions along each axis of SSIM's window, as is usual (Wang, 2004; scikit-image)."""


def spatial_shape(x: Tensor) -> torch.Size:
    """The shape of the positions of inputs [B, C, *spatial], or the features of [B, F]."""
    return x.shape[2:] if x.dim() > 2 else x.shape[1:]


def ranking(values: Tensor, inputs: Tensor, per: str, order: str) -> tuple[Tensor, Tensor]:
    """The rank of each position and the positions by rank, int32 and int64 [B, P]; ties in order.

    per: "place" ranks positions by the sum of their channels, "element" elements.
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
    """The block of `size` positions per axis of each position, in reading order, int64 [P]."""
    number = torch.zeros((), dtype=torch.int64, device=device)
    for length in spatial:
        own = torch.arange(length, device=device) // size
        number = number[..., None] * -(-length // size) + own
    return number.flatten()


def block_sums(maps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sums of maps over blocks, float64 [B, blocks], and each position's block, int64 [P]."""
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
        checks.positive_fraction(name, one)
    if any(one >= other for one, other in itertools.pairwise(shares)):
        raise InputError(f"{name} must rise: got {shares}")


def check_tolerance(name: str, value: object, unit: str = "") -> None:
    """Raises unless the value is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number{unit and f' of {unit}'}: got {value!r}")
    if not 0.0 <= value < math.inf:
        raise InputError(f"{name} must be 0 or more{unit and f' {unit}'}, finite: got {value}")


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of rows [B, *], float64 [B]; NaN where a row is constant."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    # Not read from the differences: the mean of a constant row may differ by rounding.
    flat = is_constant(a) | is_constant(b)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = a.norm(dim=1) * b.norm(dim=1)
    result: Tensor = ((a * b).sum(1) / norms).masked_fill(flat, math.nan).clamp(-1.0, 1.0)
    return result


def ranks(values: Tensor) -> Tensor:
    """The rank of each element of rows [B, *], from 1; ties share their mean rank."""
    rows = values.flatten(1).contiguous()
    order = rows.sort(1).values
    below = torch.searchsorted(order, rows)
    upto = torch.searchsorted(order, rows, right=True)
    return ((below + upto + 1).double() / 2.0).view(values.shape)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of rows [B, *], float64 [B]; NaN where a row is constant."""
    return correlation(ranks(a), ranks(b))


def _check_axes(maps: Tensor) -> None:
    if not 1 <= maps.dim() - 1 <= 3:
        raise InputError(f"SSIM is of maps with one to three axes: got {list(maps.shape)}")


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of maps [B, *spatial] (Wang, 2004); NaN where one is constant.

    The data range is that of both maps, each divided by its largest magnitude: units mean nothing.
    """
    _check_axes(a)
    flat = is_constant(a) | is_constant(b)
    a, b = _to_peak(a.double()), _to_peak(b.double())
    both = torch.stack([a, b]).movedim(1, 0).flatten(1)
    span = (both.amax(1) - both.amin(1)).view(-1, *(1,) * (a.dim() - 1))
    result: Tensor = _structure(a, b, span).flatten(1).mean(1).masked_fill(flat, math.nan)
    return result


def rank_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of the ranks of maps [B, *spatial], float64 [B]; NaN where one is constant.

    A few high peaks make `ssim` high for unrelated maps. Windows without variation are left out.
    """
    _check_axes(a)
    flat = is_constant(a) | is_constant(b)
    count = max(1, a[0].numel())
    one = torch.ones((), dtype=torch.float64, device=a.device)
    a, b = ranks(a) / count, ranks(b) / count
    a_varies, b_varies = (_pooled("max", one) != -_pooled("max", -one) for one in (a, b))
    varies = (a_varies | b_varies).flatten(1)
    structure = _structure(a, b, one).flatten(1)
    mean: Tensor = (structure * varies).sum(1) / varies.sum(1)
    return mean.masked_fill(flat, math.nan)


def _structure(a: Tensor, b: Tensor, span: Tensor) -> Tensor:
    """SSIM of every window that lies inside of maps float64 [B, *spatial]."""
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _pooled("avg", a), _pooled("avg", b)
    # Sample covariances, as in scikit-image.
    count = math.prod(min(WINDOW, size) for size in a.shape[1:])
    unbiased = count / max(1, count - 1)
    var_a = unbiased * (_pooled("avg", a * a) - mean_a**2)
    var_b = unbiased * (_pooled("avg", b * b) - mean_b**2)
    covariance = unbiased * (_pooled("avg", a * b) - mean_a * mean_b)
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    ratio: Tensor = above / below
    return ratio


def overlap(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Intersection over union of the largest `share` of the elements of rows, float64 [B]."""
    first, second = largest(a, share), largest(b, share)
    both, either = (first & second).flatten(1).sum(1), (first | second).flatten(1).sum(1)
    return both.double() / either.double()


def largest(values: Tensor, share: float) -> Tensor:
    """Which elements of rows [B, *] are among the largest `share`, at least one of them, bool."""
    rows = values.flatten(1)
    count = max(1, round(share * rows.shape[1]))
    top = rows.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, top, True).view(values.shape)


def _pooled(kind: str, maps: Tensor) -> Tensor:
    """Means ("avg") or maxima ("max") over the windows that lie inside of maps [B, *spatial]."""
    pool = getattr(functional, f"{kind}_pool{maps.dim() - 1}d")
    window = tuple(min(WINDOW, size) for size in maps.shape[1:])
    pooled: Tensor = pool(maps[:, None], window, 1)[:, 0]
    return pooled


def _to_peak(maps: Tensor) -> Tensor:
    peak = maps.abs().flatten(1).amax(1)
    return maps / torch.where(peak == 0, 1.0, peak).view(-1, *(1,) * (maps.dim() - 1))


def is_constant(rows: Tensor) -> Tensor:
    """Which rows [B, *] hold one value, bool [B]."""
    flat = rows.flatten(1)
    return flat.amax(1) == flat.amin(1)
