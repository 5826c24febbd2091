"""Integrated Gradients with Captum's steps and weights, which it rounds to float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import GradientAttribution
from saliency_fast.captum.contract import (
    as_baselines,
    as_tuple,
    check_baselines,
    floating,
    like_inputs,
    public,
)
from saliency_fast.captum.run import Asked, explained
from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.parts.quadrature import Array, Rule, level


def _legendre(n: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (1.0 + nodes), 0.5 * weights


def _riemann(first: Callable[[int], float], last: Callable[[int], float]) -> Any:
    def points(n: int) -> tuple[Array, Array]:
        alphas = torch.linspace(first(n), last(n), n, device="cpu").double().numpy()
        return alphas, np.full(n, 1.0 / n)

    return points


def _trapezoid(n: int) -> tuple[Array, Array]:
    alphas, weights = _riemann(lambda n: 0.0, lambda n: 1.0)(n)
    weights[[0, -1]] /= 2.0
    return alphas, weights


RULES = {
    "riemann_left": Rule(_riemann(lambda n: 0.0, lambda n: 1.0 - 1.0 / n), least=2),
    "riemann_right": Rule(_riemann(lambda n: 1.0 / n, lambda n: 1.0), least=2),
    "riemann_middle": Rule(
        _riemann(lambda n: 1.0 / (2 * n), lambda n: 1.0 - 1.0 / (2 * n)), least=2
    ),
    # Its weights sum to less than one, (n - 1) / n: so do Captum's.
    "riemann_trapezoid": Rule(_trapezoid, least=2),
    "gausslegendre": Rule(_legendre),
}


@dataclass(frozen=True)
class Steps:
    """Integrated Gradients by one of Captum's rules, weighted to a mean; `total` is its weight."""

    rule: str
    steps: int
    multiply: bool
    name = "integrated_gradients"

    @cached_property
    def _rounded(self) -> tuple[Array, Array]:
        alphas, weights = RULES[self.rule].points(self.steps)
        return alphas, weights.astype(np.float32).astype(np.float64)

    @property
    def total(self) -> float:
        return float(self._rounded[1].sum())

    def recipe(self) -> Recipe:
        levels = (level(Rule(lambda n: self._rounded), self.steps),)
        factor = "difference" if self.multiply else "none"
        return WeightedSum(Line(), levels, factor=factor, baseline="one")


def integrated(steps: Steps, asked: Asked) -> Inputs:
    """The maps of a call, by weights that may not sum to one."""
    return tuple(one.mul_(steps.total) for one in explained(steps, asked))


def check_steps(n_steps: int, method: str) -> None:
    """Raises where a rule is unknown or has too few steps."""
    if n_steps < 0:
        raise ContractError(f"The number of steps must be a positive integer. Given: {n_steps}")
    if method not in RULES:
        raise ContractError(
            f"Approximation method must be one for the following {list(RULES)}. Given {method}"
        )
    if n_steps < RULES[method].least:
        least = "one" if RULES[method].least == 2 else "zero"
        raise ContractError(
            f"The number of steps has to be larger than {least}: got {n_steps}, for {method}"
        )


class IntegratedGradients(GradientAttribution):
    """(x - x') times the mean gradient on the line from a baseline x' (Sundararajan, 2017)."""

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Maps like the inputs, and the delta of each example [B] where it is asked for.

        internal_batch_size: at most so many points at once; without it memory is planned.
        """
        parts = floating(as_tuple(inputs))
        starts = as_baselines(baselines, parts)
        check_baselines(parts, starts)
        check_steps(n_steps, method)
        further = target, additional_forward_args
        asked = self._asked(
            *(parts, *further), baselines=starts, points_per_launch=internal_batch_size
        )
        maps = integrated(Steps(method, n_steps, self.multiplies_by_inputs), asked)
        found = like_inputs(inputs, maps)
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(found, baselines, inputs, *further)

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs
