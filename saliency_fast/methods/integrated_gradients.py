"""Integrated Gradients: (x - x') times the mean gradient on the line from x' to x."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Level, Recipe, WeightedSum
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.quadrature import NESTED, RULES, level, nested_levels


@dataclass(frozen=True)
class IntegratedGradients:
    """(x - x') * integral of the gradient on the straight line (Sundararajan, 2017).

    steps: points of the rule, or of its first level where a tolerance is given. rule: "midpoint",
    "trapezoid", "gauss_legendre", "left" or "right"; None is the midpoint rule, or the trapezoid
    rule with a tolerance, since its refinement only doubles. tolerance: refine until the map's
    estimated relative L2 error and the completeness delta, relative to the score's gain, are both
    under it, or `max_steps` is reached; `Attribution.converged` tells which.
    """

    steps: int = 50
    rule: str | None = None
    tolerance: float | None = None
    max_steps: int = 2048
    name = "integrated_gradients"

    def __post_init__(self) -> None:
        if self.rule is not None:
            checks.choice("rule", self.rule, NESTED if self.tolerance else tuple(RULES))
        checks.whole("steps", self.steps, RULES[self._rule].least)
        checks.whole("max_steps", self.max_steps, 1)
        if self.tolerance is not None:
            checks.positive("tolerance", self.tolerance)
            if self.tolerance >= 1:
                raise InputError(f"tolerance is a relative error under 1: got {self.tolerance}")
            refine = RULES[self._rule].refined
            if refine and self.max_steps < (needed := refine(self.steps)):
                raise InputError(
                    f"max_steps leaves no room to refine {self.steps} steps: got {self.max_steps}, "
                    f"expected at least {needed}"
                )

    @property
    def _rule(self) -> str:
        return self.rule or ("midpoint" if self.tolerance is None else "trapezoid")

    def recipe(self) -> Recipe:
        rule = RULES[self._rule]
        if self.tolerance is None:
            levels: tuple[Level, ...] = (level(rule, self.steps),)
        else:
            levels = tuple(nested_levels(rule, self.steps, self.max_steps))
        return WeightedSum(
            Line(), levels, factor="difference", baseline="one", tolerance=self.tolerance
        )
