"""Sparseness: how few places a map needs to say what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Outcome
from saliency_fast.evaluate.ranking import ORDERS, check_ranking
from saliency_fast.evaluate.subject import Subject


@dataclass(frozen=True)
class _Spread(Metric):
    """Field of both. per: "place" sums the channels of a place first, "element" takes each by
    itself. Zero maps have no shares and give NaN.
    """

    per: str = "place"

    def __post_init__(self) -> None:
        check_ranking(self.per, ORDERS[0])

    def _shares(self, subject: Subject) -> tuple[Tensor, tuple[str, ...]]:
        """The share of each magnitude in their sum, float64 [B, P], and what to say of it."""
        values = subject.places if self.per == "place" else subject.values
        sizes = values.flatten(1).double().abs()
        # The largest first, so that neither huge nor tiny values leave the range of sums.
        sizes = sizes / sizes.amax(1, keepdim=True)
        shares = sizes / sizes.sum(1, keepdim=True)
        zero = int(shares.isnan().any(1).sum())
        told = f"{zero} of {len(shares)} maps are zero and count as unknown"
        return shares, (told,) if zero else ()


class Sparseness(_Spread):
    """The Gini index of a map's magnitudes (Hurley, 2009; Chalasani, 2020): 0 where all are equal,
    near 1 where one place holds everything.
    """

    name = "sparseness"
    better = "higher"

    def _judge(self, subject: Subject) -> Outcome:
        shares, caveats = self._shares(subject)
        count = shares.shape[1]
        weight = 2.0 * torch.arange(1, count + 1, device=shares.device).double() - count - 1.0
        gini = (shares.sort(1).values * weight).sum(1) / count
        return self._outcome(gini, caveats=caveats)


class Complexity(_Spread):
    """The entropy, in nats, of the shares of a map's magnitudes (Bhatt, 2020): 0 where one place
    holds everything, ln(places) where all are equal. Details: `relative`, to that largest entropy.
    """

    name = "complexity"
    better = "lower"

    def _judge(self, subject: Subject) -> Outcome:
        shares, caveats = self._shares(subject)
        entropy = torch.special.entr(shares).sum(1)
        most = math.log(shares.shape[1]) if shares.shape[1] > 1 else math.nan
        return self._outcome(entropy, details={"relative": entropy / most}, caveats=caveats)
