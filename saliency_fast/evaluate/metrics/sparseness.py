"""Form: how few positions hold the magnitude of a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.evaluate.inputs import EvaluationInput
from saliency_fast.evaluate.maps import PER, gini
from saliency_fast.evaluate.metric import FORM, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Outcome, caveats_of


@dataclass(frozen=True)
class _Spread(Metric):
    """Statistics of the shares of a map's magnitudes in their sum, NaN for zero maps.

    Args:
        per: "place" sums the channels of a position first, "element" takes each by itself.
    """

    per: str = "place"

    def __post_init__(self) -> None:
        check_fields(self, per=PER)

    def _shares(self, data: EvaluationInput) -> tuple[Tensor, tuple[str, ...]]:
        """The shares, float64 [B, P], and caveats."""
        values = data.places if self.per == "place" else data.values
        sizes = values.flatten(1).double().abs()
        # Relative to the largest first, so that the sum neither overflows nor underflows.
        sizes = sizes / sizes.amax(1, keepdim=True)
        shares = sizes / sizes.sum(1, keepdim=True)
        zero = int(shares.isnan().any(1).sum())
        return shares, caveats_of(
            (zero, f"{zero} of {len(shares)} maps are zero and count as unknown")
        )


@in_suite(FORM, "Chalasani et al., 2020")
class Sparseness(_Spread):
    """The Gini index of a map's magnitudes (Hurley, 2009; Chalasani, 2020): 0 where all are equal,
    near 1 where one position holds everything.

    Example:
        >>> Sparseness()(None, torch.ones(1, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0]])).values
        tensor([0.7500], dtype=torch.float64)
    """

    name = "sparseness"
    better = "higher"

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        shares, caveats = self._shares(data)
        return self._outcome(gini(shares), caveats=caveats)


@in_suite(FORM, "Bhatt et al., 2020")
class Complexity(_Spread):
    """The entropy, in nats, of the shares of a map's magnitudes (Bhatt, 2020): 0 where one position
    holds everything, ln(positions) where all are equal.

    `details`: `relative`, to that largest entropy.

    Example:
        >>> Complexity()(None, torch.ones(1, 4), torch.ones(1, 4)).details["relative"]
        tensor([1.], dtype=torch.float64)
    """

    name = "complexity"
    better = "lower"

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        shares, caveats = self._shares(data)
        entropy = torch.special.entr(shares).sum(1)
        most = math.log(shares.shape[1]) if shares.shape[1] > 1 else math.nan
        return self._outcome(entropy, details={"relative": entropy / most}, caveats=caveats)
