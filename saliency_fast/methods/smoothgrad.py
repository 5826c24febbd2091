"""SmoothGrad and its kin: the gradient under noise, its mean, mean square and variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saliency_fast.engine.points import Noise, Seed
from saliency_fast.engine.recipe import Level, Recipe
from saliency_fast.methods import checks


def samples_level(samples: int, antithetic: bool) -> tuple[Level]:
    """Samples 0 to n - 1 of equal weight; folds take turns, and a pair stays in one fold."""
    number = torch.arange(samples)
    weight = torch.full((samples,), 1.0 / samples, dtype=torch.float64)
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
    lowers the error for the same number of them. seed: an int, or one per example.
    """

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0
    antithetic: bool = True
    name = "smoothgrad"

    def __post_init__(self) -> None:
        _check(self.samples, 1, self.noise_level, self.sigma, self.seed)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic)
        return Recipe(noise, samples_level(self.samples, self.antithetic))


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
        _check(self.samples, 1, self.noise_level, self.sigma, self.seed)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic)
        return Recipe(noise, samples_level(self.samples, self.antithetic), "square")


@dataclass(frozen=True)
class VarGrad:
    """Variance of the gradients of noisy copies, divided by n (Adebayo, 2018).

    Its samples are independent, since pairs of opposite noise would bias a variance.
    """

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0
    name = "vargrad"

    def __post_init__(self) -> None:
        _check(self.samples, 2, self.noise_level, self.sigma, self.seed)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, False)
        return Recipe(noise, samples_level(self.samples, False), "variance")
