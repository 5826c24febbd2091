"""Localisation: whether a map is large where the object is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.engine.baselines import gaussian
from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import EvaluationInput
from saliency_fast.evaluate.maps import check_tolerance, is_constant
from saliency_fast.evaluate.metric import LOCALISATION, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome, caveats_of
from saliency_fast.methods.parts import checks

EVIDENCE = ("positive", "absolute", "signed")


@in_suite(LOCALISATION, "Zhang et al., 2018")
@dataclass(frozen=True)
class PointingGame(Metric):
    """Whether a map is largest on the object, 1 or 0 (Zhang, 2018).

    Of several largest values any may hit. `details`: `chance`, the share of positions that hit;
    `maxima`, the number of largest values.

    Args:
        tolerance: How far, in positions (Euclidean), the largest value may lie from the object;
            Zhang has 15 pixels.
        smooth: The sigma, as a share of each axis, of a Gaussian that blurs maps first, so that no
            single pixel decides.

    Example:
        >>> PointingGame()(None, torch.ones(1, 3), torch.eye(3)[:1], boxes=[[0, 2]]).values
        tensor([1.], dtype=torch.float64)
    """

    tolerance: float = 0.0
    smooth: float = 0.0
    name = "pointing game"
    better = "higher"
    needs = ("masks",)

    def __post_init__(self) -> None:
        check_tolerance("tolerance", self.tolerance, "positions")
        checks.fraction("smooth", self.smooth)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        maps = data.places
        if self.smooth:
            if data.values.dim() < 3:
                got = list(data.values.shape)
                raise InputError(f"smooth needs maps with spatial axes: got {got}; leave it out")
            maps = gaussian(maps[:, None], self.smooth)[:, 0]
        values, near = maps.flatten(1), near_masks(_masks(data), self.tolerance).flatten(1)
        largest = values == values.amax(1, keepdim=True)
        hit = (largest & near).any(1)
        details = {"chance": near.double().mean(1), "maxima": largest.sum(1).double()}
        flat = is_constant(data.places) & (data.places[0].numel() > 1)
        caveats = caveats_of(_about(flat, "constant, which hits from everywhere"))
        return self._outcome(hit.double(), details=details, caveats=caveats)


@in_suite(LOCALISATION, "Wang et al., 2020; Arras et al., 2022")
@dataclass(frozen=True)
class EnergyInBox(Metric):
    """The share of a map's evidence that lies on the object (Wang, 2020; Arras, 2022): high where
    the map marks the object; the object's share of the image is chance.

    NaN where there is no evidence. `details`: `chance`, the share of positions on the object.

    Args:
        evidence: "positive" sums positive values, "absolute" magnitudes, and "signed" the values
            as they are: a ratio of sums, which leaves 0 to 1 where signs differ.

    Example:
        >>> EnergyInBox()(None, torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), boxes=[[1, 2]]).values
        tensor([0.7500], dtype=torch.float64)
    """

    evidence: str = "positive"
    name = "energy in box"
    better = "higher"
    needs = ("masks",)

    def __post_init__(self) -> None:
        check_fields(self, evidence=EVIDENCE)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        maps, inside = data.places.flatten(1).double(), _masks(data).flatten(1)
        forms = {"positive": maps.clamp_min(0.0), "absolute": maps.abs(), "signed": maps}
        energy = forms[self.evidence]
        total = energy.sum(1)
        none = total == 0
        values = (energy * inside).sum(1) / total
        outside = ((values < 0) | (values > 1)) & (self.evidence == "signed")
        caveats = caveats_of(
            _about(none, f"without {self.evidence} evidence and count as unknown"),
            _about(outside, "outside of 0 to 1, since evidence of both signs cancels out"),
        )
        values, details = values.masked_fill(none, math.nan), {"chance": inside.double().mean(1)}
        return self._outcome(values, details=details, caveats=caveats)


@dataclass(frozen=True)
class _TopK(Metric):
    """Comparisons of the k positions that a map ranks highest with the object.

    Args:
        k: None for as many positions as the object holds, a whole number, or a share (a float, at
            most 1) of all positions. Ties at the cut count in the order of their index.
    """

    k: int | float | None = None
    better = "higher"
    needs = ("masks",)

    def __post_init__(self) -> None:
        if self.k is not None:
            check_fields(self, k=checks.positive_fraction if isinstance(self.k, float) else 1)

    def _compared(self, data: EvaluationInput) -> tuple[Tensor, Tensor, Tensor]:
        """The intersection over union, and the object's share of the top and of all positions."""
        values, inside = data.places.flatten(1), _masks(data).flatten(1)
        size, positions = inside.sum(1), values.shape[1]
        count = size
        if self.k is not None:
            k = max(1, round(self.k * positions)) if isinstance(self.k, float) else self.k
            if k > positions:
                raise InputError(f"k must be at most the maps' {positions} positions: got {k}")
            count = torch.full_like(size, k)
        order = values.argsort(dim=1, descending=True, stable=True)
        top = torch.arange(positions, device=values.device) < count[:, None]
        both = (inside.gather(1, order) & top).sum(1).double()
        return both / (size + count - both), both / count, inside.double().mean(1)


@in_suite(LOCALISATION, "Theiner et al., 2022")
class TopKIoU(_TopK):
    """The intersection over union of the k positions that a map ranks highest with the object.

    `details`: `rank_accuracy`, the share of them on the object, and `chance`, that of a random map.

    Example:
        >>> maps = torch.tensor([[1.0, 3.0, 2.0]])
        >>> TopKIoU()(None, torch.ones(1, 3), maps, boxes=[[1, 3]]).values
        tensor([1.], dtype=torch.float64)
    """

    name = "top-k IoU"

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        overlap, accuracy, chance = self._compared(data)
        return self._outcome(overlap, details={"rank_accuracy": accuracy, "chance": chance})


class RankAccuracy(_TopK):
    """The share of the k positions that a map ranks highest that lies on the object: relevance rank
    accuracy (Arras, 2022), with a number k top-k intersection (Theiner, 2022). `details`: `chance`,
    the share of a random map.

    Example:
        >>> maps = torch.tensor([[1.0, 3.0, 2.0]])
        >>> RankAccuracy(2)(None, torch.ones(1, 3), maps, boxes=[[0, 2]]).values
        tensor([0.5000], dtype=torch.float64)
    """

    name = "rank accuracy"

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        _, accuracy, chance = self._compared(data)
        return self._outcome(accuracy, details={"chance": chance})


def near_masks(masks: Tensor, distance: float) -> Tensor:
    """Positions of masks bool [B, *spatial] within a Euclidean distance of what they hold."""
    if not distance:
        return masks
    from scipy.ndimage import distance_transform_edt

    away = [torch.from_numpy(distance_transform_edt(~one)) for one in masks.cpu().numpy()]
    return torch.stack(away).to(masks.device) <= distance


def _masks(data: EvaluationInput) -> Tensor:
    assert data.masks is not None, "evaluate() looks for masks"
    return data.masks


def _about(rows: Tensor, what: str) -> tuple[int, str]:
    """The number of maps for which something holds, bool [B], and a sentence."""
    count = int(rows.sum())
    return count, f"{count} of {len(rows)} maps are {what}"
