"""The gradient at the input with another rule for ReLU's way back."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.engine.recipe import Itself, Recipe, WeightedSum
from saliency_fast.methods.gradient import at_input
from saliency_fast.rules import Deconv, Guided


@dataclass(frozen=True)
class GuidedBackprop:
    """The gradient, ReLUs handing back only what is positive (Springenberg, 2015).

    It looks sharp because it recovers edges of the image, more than what the class depends on:
    maps stay alike when the weights are random (Adebayo, 2018; Nie, 2018).
    """

    name = "guided_backprop"

    def recipe(self) -> Recipe:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=Guided())


@dataclass(frozen=True)
class Deconvolution:
    """The gradient, ReLUs handing back what is positive whatever their input was (Zeiler, 2014)."""

    name = "deconvolution"

    def recipe(self) -> Recipe:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=Deconv())
