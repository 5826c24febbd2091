"""Coherence: what maps look like, in a few numbers without labels, and how unusual that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.attacks.linf import check_seed
from saliency_fast.evaluate.similarity import correlation
from saliency_fast.methods.parts import checks

FEWEST = 20
"""References: half of them fit at least as many numbers as there are statistics."""
TOP = 0.01
HELD = 2**22
"""Places of maps that are looked at at once."""
FLAT = 1e-9
"""A statistic whose deviation is less, next to its mean, is the same for all references."""


def coherence(maps: Tensor, *, neighbours: bool = True) -> dict[str, Tensor]:
    """Statistics of maps [B, *spatial] by name, float64 [B]; none depends on a label or a mask.

    gini, entropy (1 is even) and top_share (that of the largest 1 % of places) say how few places
    hold the magnitude; net is the sum over the sum of magnitudes; scale the logarithm of the mean
    magnitude. Where places have neighbours: roughness (total variation over the sum of magnitudes,
    with signs and without), smoothness (the correlation of a map with its mean over windows of 3
    places, with signs, and of 5, without) and spread (the standard distance of the magnitude from
    its centre, as a share of the axes).
    """
    size = max(1, HELD // max(1, maps[:1].numel()))
    starts = range(0, len(maps), size)
    parts = [_coherence(maps[at : at + size].detach(), neighbours) for at in starts]
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _coherence(maps: Tensor, neighbours: bool) -> dict[str, Tensor]:
    rows = maps.flatten(1).double()
    amount = rows.abs()
    total = amount.sum(1)
    tiny = torch.finfo(maps.dtype).tiny
    even = torch.full_like(amount, 1.0 / amount.shape[1])
    share = torch.where(total[:, None] > 0, amount / total.clamp_min(tiny)[:, None], even)
    found = _few(share)
    found["net"] = rows.sum(1) / total.clamp_min(tiny)
    found["scale"] = amount.mean(1).clamp_min(tiny).log()
    if neighbours and maps.dim() > 1 and rows.shape[1] > 1:
        maps = maps.double()
        peak = total.clamp_min(tiny)
        found["roughness"] = _variation(maps) / peak
        found["roughness_of_magnitude"] = _variation(maps.abs()) / peak
        found["smoothness"] = _smooth(maps, 3)
        found["smoothness_of_magnitude"] = _smooth(maps.abs(), 5)
        found["spread"] = _spread(share.view_as(maps))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class CoherenceReference:
    """What is usual: the mean and the shrunk covariance of the statistics of clean maps.

    names: of the S statistics that are kept; left_out: those that are the same for all references.
    centre, deviation float64 [S], precision [S, S]: of the standardised statistics. calibration
    float64 [n], sorted: the scores of references that the others were not fitted to.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]
    centre: Tensor
    deviation: Tensor
    precision: Tensor
    calibration: Tensor
    shrinkage: float
    spatial: tuple[int, ...]
    neighbours: bool
    count: int
    seed: int

    @classmethod
    def fit(cls, maps: Tensor, *, neighbours: bool = True, seed: int = 0) -> CoherenceReference:
        """From maps [N, *spatial] of clean inputs, 20 at least. Half of them, by the seed, are
        fitted, and the others are scored. neighbours: False for tables, whose columns have none.
        """
        checks.flag("neighbours", neighbours)
        check_seed(seed)
        _check(maps, "maps of references")
        if len(maps) < FEWEST:
            raise InputError(
                f"references are too few: got {len(maps)}, expected {FEWEST} or more clean inputs; "
                "with n of them no p-value is below 1 / (n / 2 + 1)"
            )
        found = coherence(maps, neighbours=neighbours)
        values = torch.stack(list(found.values()), 1)
        order = torch.randperm(
            len(maps), generator=torch.Generator().manual_seed(seed % 2**63), device="cpu"
        )
        fitted, kept_back = order.to(maps.device).tensor_split([(len(maps) + 1) // 2])
        centre, deviation = values[fitted].mean(0), values[fitted].std(0)
        varied = deviation > FLAT * (1.0 + centre.abs())
        if not bool(varied.any()):
            raise InputError(
                "maps of references are all alike: nothing can be told from them; pass maps that "
                "follow the inputs"
            )
        keep = varied.tolist()
        centre, deviation = centre[varied], deviation[varied]
        standard = (values[:, varied] - centre) / deviation
        correlations, shrinkage = _shrunk(standard[fitted])
        precision = torch.linalg.inv(correlations)
        return cls(
            tuple(name for name, one in zip(found, keep, strict=True) if one),
            tuple(name for name, one in zip(found, keep, strict=True) if not one),
            centre,
            deviation,
            precision,
            _distance(standard[kept_back], precision).sort().values,
            shrinkage,
            tuple(maps.shape[1:]),
            neighbours,
            len(maps),
            seed,
        )

    def score(self, maps: Tensor) -> Tensor:
        """The Mahalanobis distance of the maps' statistics from the references', over the root of
        their number, float64 [B]: about 1 where nothing is unusual, higher is more so.
        """
        return _distance(self.standardised(maps), self.precision.to(maps.device))

    def standardised(self, maps: Tensor) -> Tensor:
        """How many deviations each statistic is away from the references' mean, float64 [B, S]."""
        _check(maps, "maps")
        if tuple(maps.shape[1:]) != self.spatial:
            raise InputError(
                f"maps must be like those of the references: got {list(maps.shape)}, expected "
                f"{['B', *self.spatial]}"
            )
        found = coherence(maps, neighbours=self.neighbours)
        values = torch.stack([found[name] for name in self.names], 1)
        return (values - self.centre.to(maps.device)) / self.deviation.to(maps.device)

    def p_values(self, scores: Tensor) -> Tensor:
        """The chance of a score as high, were the map like the references (conformal, Vovk, 2005):
        the share of calibrating scores and itself that are no lower, float64 [B].
        """
        known = self.calibration.to(scores.device)
        below = torch.searchsorted(known, scores.double().contiguous())
        return (len(known) - below + 1).double() / (len(known) + 1)

    def __repr__(self) -> str:
        return f"<CoherenceReference of {self.count} maps; {', '.join(self.names)}>"


def _distance(standard: Tensor, precision: Tensor) -> Tensor:
    """Mahalanobis distances of standardised rows [B, S] over the root of S, float64 [B]."""
    squared = ((standard @ precision) * standard).sum(1)
    return (squared / standard.shape[1]).clamp_min(0.0).sqrt()


def _few(share: Tensor) -> dict[str, Tensor]:
    """How few elements hold what there is; shares [B, n] that sum to one."""
    count = share.shape[1]
    order = share.sort(1).values
    place = torch.arange(1, count + 1, dtype=torch.float64, device=share.device)
    most = math.log(count) if count > 1 else 1.0
    return {
        "gini": ((2.0 * place - count - 1.0) * order).sum(1) / count,
        "entropy": torch.special.entr(share).sum(1) / most,
        "top_share": order[:, -max(1, round(TOP * count)) :].sum(1),
    }


def _variation(maps: Tensor) -> Tensor:
    found = [maps.diff(dim=axis).abs().flatten(1).sum(1) for axis in range(1, maps.dim())]
    return torch.stack(found).sum(0)


def _smooth(maps: Tensor, window: int) -> Tensor:
    """The correlation of maps with their means over windows, 0 where one is constant."""
    mean = maps
    for axis in range(1, maps.dim()):
        # One axis after another, so that maps may have any number of them.
        lanes = mean.movedim(axis, -1)
        ends = (window // 2, window // 2)
        flat = functional.pad(lanes.reshape(1, -1, lanes.shape[-1]), ends, mode="replicate")
        mean = functional.avg_pool1d(flat, window, 1).view(lanes.shape).movedim(-1, axis)
    return correlation(maps, mean).nan_to_num(0.0)


def _spread(share: Tensor) -> Tensor:
    total = share.new_zeros(len(share))
    for axis in range(1, share.dim()):
        size = share.shape[axis]
        along = share.movedim(axis, 1).reshape(len(share), size, -1).sum(2)
        place = torch.arange(size, dtype=torch.float64, device=share.device) / size
        middle = (along * place).sum(1, keepdim=True)
        total += (along * (place - middle) ** 2).sum(1)
    return total.sqrt()


def _shrunk(standard: Tensor) -> tuple[Tensor, float]:
    """The correlations of standardised rows [n, S], shrunk towards none by the share that is
    best by estimate (Schäfer & Strimmer, 2005).
    """
    rows, count = standard.shape
    products = standard[:, :, None] * standard[:, None, :]
    mean = products.mean(0)
    noise = ((products - mean) ** 2).sum(0) * rows / (rows - 1) ** 3
    found = mean * rows / (rows - 1)
    apart = ~torch.eye(count, dtype=torch.bool, device=standard.device)
    signal = (found[apart] ** 2).sum()
    share = float((noise[apart].sum() / signal).clamp(0.0, 1.0)) if float(signal) > 0 else 1.0
    # Statistics that say the same would leave nothing to invert.
    share = max(share, 1e-3)
    whole = torch.eye(count, dtype=torch.float64, device=standard.device)
    return torch.where(apart, (1.0 - share) * found, whole), share


def _check(maps: Tensor, name: str) -> None:
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise InputTypeError(f"{name} must be a floating tensor: got {got}")
    if maps.dim() < 2 or maps.numel() == 0:
        raise InputError(f"{name} must be [B, *spatial]: got {list(maps.shape)}")
    if not bool(maps.isfinite().all()):
        raise InputError(f"{name} must be finite: some hold NaN or infinity")
