"""The gradient at the input itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Level, Recipe, WeightedSum
from saliency_fast.methods.parts import checks


def at_input() -> tuple[Level]:
    """One point of weight one: alpha = 1 on the line from zero."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return (Level(one, one, torch.zeros(1, dtype=torch.int64, device="cpu")),)


@dataclass(frozen=True)
class Gradient:
    """The gradient of the score at the input; |gradient| where `absolute` (Simonyan, 2013)."""

    absolute: bool = False
    name = "gradient"

    def __post_init__(self) -> None:
        checks.flag("absolute", self.absolute)

    def recipe(self) -> Recipe:
        reduction = "absolute" if self.absolute else "sum"
        return WeightedSum(Line(), at_input(), reduction, at_input=True)


@dataclass(frozen=True)
class InputXGradient:
    """The input times the gradient there (Shrikumar, 2016)."""

    name = "input_x_gradient"

    def recipe(self) -> Recipe:
        return WeightedSum(Line(), at_input(), factor="input", at_input=True)
