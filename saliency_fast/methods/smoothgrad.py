"""SmoothGrad and its kin: the gradient under noise, its mean, mean square and variance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from saliency_fast.engine.points import Noise, Seed
from saliency_fast.engine.recipe import Level, Recipe, RoundsRecipe, WeightedSum
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.groups import GROUPS, smooth_rounds, variance_rounds


def samples_level(samples: int, antithetic: bool) -> tuple[Level]:
    """Samples 0 to n - 1 of equal weight; folds take turns, and a pair stays in one fold."""
    number = torch.arange(samples, device="cpu")
    weight = torch.full((samples,), 1.0 / samples, dtype=torch.float64, device="cpu")
    return (Level(number, weight, (number // 2 if antithetic else number) % 2),)


def _check(samples: object, least: int, noise_level: object, sigma: object, seed: object) -> None:
    checks.whole("samples", samples, least)
    checks.positive("noise_level", noise_level)
    if sigma is not None:
        checks.positive("sigma", sigma)
    checks.seed(seed)


@dataclass(frozen=True)
class SmoothGrad:
    """Mean gradient of noisy copies of the input (Smilkov, 2017).

    noise_level: standard deviation as a share of each example's own range; sigma: the same in
    units of the input, and wins. antithetic: samples come in pairs of opposite noise, which
    lowers the error for the same number of them. seed: an int, or one per example. standard_error:
    whether `extras["standard_error"]` holds that of every pixel, from eight groups of samples (so
    twice that is an interval of 91 %, by Student's distribution). shared_axis: along which noise is
    the same, such as 2 for the frames of [B, C, T, H, W], so that maps flicker less.
    """

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0
    antithetic: bool = True
    standard_error: bool = False
    shared_axis: int | None = None
    name = "smoothgrad"

    def __post_init__(self) -> None:
        checks.flag("antithetic", self.antithetic)
        checks.flag("standard_error", self.standard_error)
        least = (2 + 2 * self.antithetic) if self.standard_error else 1
        _check(self.samples, least, self.noise_level, self.sigma, self.seed)
        if self.shared_axis is not None:
            checks.whole("shared_axis", self.shared_axis, 1)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic, self.shared_axis)
        if self.standard_error:
            rounds = partial(smooth_rounds, noise=noise, samples=self.samples)
            return RoundsRecipe(rounds, self.samples, held=2 * GROUPS)
        return WeightedSum(noise, samples_level(self.samples, self.antithetic))


@dataclass(frozen=True)
class SmoothGradSquared:
    """Mean squared gradient of noisy copies of the input (Hooker, 2019); fields of SmoothGrad."""

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0
    antithetic: bool = True
    name = "smoothgrad_squared"

    def __post_init__(self) -> None:
        checks.flag("antithetic", self.antithetic)
        _check(self.samples, 1, self.noise_level, self.sigma, self.seed)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic)
        return WeightedSum(noise, samples_level(self.samples, self.antithetic), "square")


@dataclass(frozen=True)
class VarGrad:
    """Variance of the gradients of noisy copies, divided by n (Adebayo, 2018).

    Its samples are independent, since pairs of opposite noise would bias a variance. confidence:
    of an interval for every pixel, such as .95, in `extras["interval_low"]` and ["interval_high"].
    """

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0
    confidence: float | None = None
    name = "vargrad"

    def __post_init__(self) -> None:
        least = 2 if self.confidence is None else 2 * GROUPS
        _check(self.samples, least, self.noise_level, self.sigma, self.seed)
        if self.confidence is not None:
            checks.positive("confidence", self.confidence)
            if self.confidence >= 1:
                raise InputError(f"confidence is a probability under 1: got {self.confidence}")

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, False)
        if self.confidence is not None:
            samples, confidence = self.samples, self.confidence
            rounds = partial(variance_rounds, noise=noise, samples=samples, confidence=confidence)
            # Means and spreads, and at the end as many logarithms and what they are made of.
            return RoundsRecipe(rounds, samples, held=5 * GROUPS)
        return WeightedSum(noise, samples_level(self.samples, False), "variance")
