"""DeepLIFT: differences from a reference, shared out layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from saliency_fast.engine.recipe import Itself, Recipe, WeightedSum
from saliency_fast.methods.gradient import at_input
from saliency_fast.methods.parts import checks
from saliency_fast.rules import Rescale


@dataclass(frozen=True)
class DeepLift:
    """(input - baseline) times DeepLIFT's multipliers, rescale rule (Shrikumar, 2017).

    epsilon: nonlinearities whose input changes less keep their gradient. multiply: False gives the
    multipliers alone, whose sum tells nothing: no baseline_scores, no delta. captum: with the
    departures of Captum's DeepLift, for equal numbers; see `model.rules.Rescale`.
    """

    epsilon: float = 1e-10
    multiply: bool = True
    captum: bool = False
    name = "deeplift"

    def __post_init__(self) -> None:
        checks.positive("epsilon", self.epsilon)
        checks.flag("multiply", self.multiply)
        checks.flag("captum", self.captum)

    def recipe(self) -> Recipe:
        rules = Rescale(float(self.epsilon), self.captum)
        # Multipliers alone add up to nothing.
        factor, ends = ("difference", True) if self.multiply else ("none", False)
        one = WeightedSum(Itself(), at_input(), factor=factor, baseline="one", at_input=True)
        return replace(one, ends=ends, rules=rules)
