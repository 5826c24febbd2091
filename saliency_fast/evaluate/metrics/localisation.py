"""Localisation: whether maps point at where the object is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.engine.baselines import gaussian
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods.parts import checks

EVIDENCE = ("positive", "absolute", "signed")


@dataclass(frozen=True)
class PointingGame(Metric):
    """Whether a map is largest on the object: 1 or 0 per example (Zhang, 2018).

    tolerance: how far, in places (Euclidean), the largest value may lie from the object and still
    hit it; Zhang has 15 pixels. smooth: the sigma, as a share of each axis, of a Gaussian that maps
    are blurred with first, so that no lone pixel decides. Where several places share the largest
    value any of them may hit. Details: `chance`, the share of places that hit; `maxima`, how many
    share the largest value.
    """

    tolerance: float = 0.0
    smooth: float = 0.0
    name: ClassVar[str] = "pointing game"
    better: ClassVar[str] = "higher"
    needs: ClassVar[tuple[str, ...]] = ("masks",)

    def __post_init__(self) -> None:
        given = self.tolerance
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise InputTypeError(f"tolerance must be a number of places: got {given!r}")
        if not 0.0 <= given < math.inf:
            raise InputError(f"tolerance must be 0 or more places, finite: got {given}")
        checks.share("smooth", self.smooth)

    def _judge(self, subject: Subject) -> Outcome:
        maps = subject.places
        if self.smooth:
            if subject.values.dim() < 3:
                raise InputError(
                    "smooth needs maps with spatial axes: got "
                    f"{list(subject.values.shape)}; leave it out"
                )
            maps = gaussian(maps[:, None], self.smooth)[:, 0]
        places, near = _both(maps, near_masks(_masks(subject), self.tolerance))
        most = places == places.amax(1, keepdim=True)
        hit = (most & near).any(1)
        details = {"chance": _share(near), "maxima": most.sum(1).double()}
        before = subject.places.flatten(1)
        flat = (before.amax(1) == before.amin(1)) & (before.shape[1] > 1)
        caveats = _told(flat, "constant, which hits from everywhere")
        return self._outcome(hit.double(), details=details, caveats=caveats)


@dataclass(frozen=True)
class EnergyInBox(Metric):
    """The share of a map's evidence that lies on the object (Wang, 2020; Arras, 2022).

    evidence: "positive" counts what speaks for the target, "absolute" magnitudes, and "signed" the
    values as they are: a ratio of sums, which leaves 0 to 1 where signs differ. NaN where there is
    no evidence. Details: `chance`, the share of places that lie on the object.
    """

    evidence: str = "positive"
    name: ClassVar[str] = "energy in box"
    better: ClassVar[str] = "higher"
    needs: ClassVar[tuple[str, ...]] = ("masks",)

    def __post_init__(self) -> None:
        if self.evidence not in EVIDENCE:
            raise InputError(
                f"evidence must be one of {', '.join(EVIDENCE)}: got {self.evidence!r}"
            )

    def _judge(self, subject: Subject) -> Outcome:
        places, inside = _both(subject.places, _masks(subject))
        energy = places.double()
        if self.evidence == "positive":
            energy = energy.clamp_min(0.0)
        elif self.evidence == "absolute":
            energy = energy.abs()
        total = energy.sum(1)
        none = total == 0
        values = (energy * inside).sum(1) / total
        details = {"chance": _share(inside)}
        caveats = _told(none, f"without {self.evidence} evidence and count as unknown")
        if self.evidence == "signed":
            outside = (values < 0) | (values > 1)
            caveats += _told(outside, "outside of 0 to 1, since evidence of both signs cancels out")
        return self._outcome(values.masked_fill(none, math.nan), details=details, caveats=caveats)


@dataclass(frozen=True)
class _TopK(Metric):
    """Fields of what compares the top k places with the object.

    k: how many places: None for as many as the object holds, a whole number, or a share (a float,
    at most 1) of all places. Equal ones at the cut count in the order of their place.
    """

    k: int | float | None = None
    better: ClassVar[str] = "higher"
    needs: ClassVar[tuple[str, ...]] = ("masks",)

    def __post_init__(self) -> None:
        k = self.k
        if k is None:
            return
        if isinstance(k, bool) or not isinstance(k, (int, float)):
            raise InputTypeError(f"k must be None, a whole number or a share: got {k!r}")
        if isinstance(k, float) and not 0.0 < k <= 1.0:
            raise InputError(f"k as a share must be above 0 and at most 1: got {k}")
        if k < 1 and isinstance(k, int):
            raise InputError(f"k must be 1 or more places: got {k}")

    def _judge(self, subject: Subject) -> Outcome:
        places, inside = _both(subject.places, _masks(subject))
        size = inside.sum(1)
        count = self._count(size, places.shape[1])
        order = places.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(places.shape[1], device=places.device) < count[:, None]
        both = (inside.gather(1, order) & first).sum(1).double()
        union = both / (size + count - both)
        return self._found(union, both / count, _share(inside))

    def _count(self, size: Tensor, places: int) -> Tensor:
        """How many places each example's top holds, int64 [B]."""
        if self.k is None:
            return size
        if isinstance(self.k, float):
            return torch.full_like(size, max(1, round(self.k * places)))
        if self.k > places:
            raise InputError(f"k must be at most the maps' {places} places: got {self.k}")
        return torch.full_like(size, self.k)

    def _found(self, union: Tensor, accuracy: Tensor, chance: Tensor) -> Outcome:
        raise NotImplementedError


class TopKIoU(_TopK):
    """The intersection over union of the top k places with the object. Details: `rank_accuracy`,
    the share of the top that lies on the object, and `chance`, what that is for a random map.
    """

    name = "top-k IoU"

    def _found(self, union: Tensor, accuracy: Tensor, chance: Tensor) -> Outcome:
        return self._outcome(union, details={"rank_accuracy": accuracy, "chance": chance})


class RankAccuracy(_TopK):
    """The share of the top k places that lies on the object: relevance rank accuracy (Arras, 2022)
    with as many places as the object holds, top-k intersection (Theiner, 2022) with a number.
    Details: `chance`, what it is for a random map.
    """

    name = "rank accuracy"

    def _found(self, union: Tensor, accuracy: Tensor, chance: Tensor) -> Outcome:
        return self._outcome(accuracy, details={"chance": chance})


def near_masks(masks: Tensor, distance: float) -> Tensor:
    """Places of masks bool [B, *spatial] within a Euclidean distance of what they hold."""
    # Squared distances are separable: first the nearest along one axis, then of those the nearest
    # along the next. Beyond the distance nobody asks, so that few shifts do.
    far = 4.0 * distance * distance + 4.0
    squared = torch.where(masks, 0.0, far).double()
    for axis in range(1, masks.dim()):
        size = masks.shape[axis]
        nearest = squared.clone()
        for step in range(1, min(math.floor(distance), size - 1) + 1):
            left = size - step
            for to, of in ((step, 0), (0, step)):
                part = nearest.narrow(axis, to, left)
                torch.minimum(part, squared.narrow(axis, of, left) + float(step * step), out=part)
        squared = nearest
    return squared <= distance * distance


def _masks(subject: Subject) -> Tensor:
    assert subject.masks is not None, "judge() looks for masks"
    return subject.masks


def _both(places: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Places and masks as rows [B, P]."""
    return places.flatten(1), masks.flatten(1)


def _share(masks: Tensor) -> Tensor:
    return masks.double().mean(1)


def _told(rows: Tensor, what: str) -> tuple[str, ...]:
    """A caveat of the maps for which it holds, bool [B]; none where there are none."""
    count = int(rows.sum())
    return (f"{count} of {len(rows)} maps are {what}",) if count else ()
