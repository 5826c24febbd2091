"""Gradients at random points: SmoothGrad and its variants, expected gradients, GradientSHAP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from saliency_fast.engine.points import Noise, RandomLine, Seed
from saliency_fast.engine.recipe import Level, Recipe, RoundsRecipe, WeightedSum
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.groups import GROUPS, smooth_rounds, variance_rounds


def samples_level(samples: int, antithetic: bool) -> tuple[Level]:
    """Samples 0 to n - 1 of equal weight, in two replicates by turns; a pair is in one of them."""
    number = torch.arange(samples, device="cpu")
    weight = torch.full((samples,), 1.0 / samples, dtype=torch.float64, device="cpu")
    return (Level(number, weight, (number // 2 if antithetic else number) % 2),)


@dataclass(frozen=True)
class _Noisy:
    """Fields of all methods by noisy copies, see `SmoothGrad`."""

    samples: int = 32
    noise_level: float = 0.15
    sigma: float | None = None
    seed: Seed = 0

    def _check(self, least: int) -> None:
        checks.whole("samples", self.samples, least)
        checks.positive("noise_level", self.noise_level)
        checks.positive("sigma", self.sigma, optional=True)
        checks.seed(self.seed)


@dataclass(frozen=True)
class SmoothGrad(_Noisy):
    """Mean gradient of noisy copies of the input (Smilkov, 2017).

    Args:
        samples: Noisy copies of each example.
        noise_level: Standard deviation of the noise, as a share of the example's own range.
        sigma: Standard deviation in units of the input; wins over `noise_level`.
        seed: An int, or one for each example.
        antithetic: Whether samples come in pairs of opposite noise, which lowers the error for the
            same number of samples.
        standard_error: Whether `extras["standard_error"]` holds the standard error of every
            element, from eight groups of samples: twice it is a 91 % interval (Student's t).
        shared_axis: Axis of the input along which the noise is the same, such as 2 for the frames
            of [B, C, T, H, W], so that maps flicker less.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.arange(8.0).view(2, 4)
        >>> att = sf.explain(model, x, target=1, method=sf.SmoothGrad(samples=8, sigma=0.1))
        >>> torch.allclose(att.values[0], model.weight[1])
        True
    """

    antithetic: bool = True
    standard_error: bool = False
    shared_axis: int | None = None
    name = "smoothgrad"

    def __post_init__(self) -> None:
        checks.flag("antithetic", self.antithetic)
        checks.flag("standard_error", self.standard_error)
        least = (2 + 2 * self.antithetic) if self.standard_error else 1
        self._check(least)
        if self.shared_axis is not None:
            checks.whole("shared_axis", self.shared_axis, 1)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic, self.shared_axis)
        if self.standard_error:
            rounds = partial(smooth_rounds, noise=noise, samples=self.samples)
            return RoundsRecipe(rounds, self.samples, held=2 * GROUPS)
        return WeightedSum(noise, samples_level(self.samples, self.antithetic))


@dataclass(frozen=True)
class SmoothGradSquared(_Noisy):
    """Mean squared gradient of noisy copies of the input (Hooker, 2019).

    Args:
        samples, noise_level, sigma, seed, antithetic: As of `SmoothGrad`.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.arange(8.0).view(2, 4)
        >>> att = sf.explain(model, x, target=1, method=sf.SmoothGradSquared(samples=8))
        >>> torch.allclose(att.values[0], model.weight[1].square())
        True
    """

    antithetic: bool = True
    name = "smoothgrad_squared"

    def __post_init__(self) -> None:
        checks.flag("antithetic", self.antithetic)
        self._check(1)

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic)
        return WeightedSum(noise, samples_level(self.samples, self.antithetic), "square")


@dataclass(frozen=True)
class VarGrad(_Noisy):
    """Variance of the gradients of noisy copies of the input, divided by n (Adebayo, 2018).

    Samples are independent, since pairs of opposite noise would bias a variance.

    Args:
        samples, noise_level, sigma, seed: As of `SmoothGrad`.
        confidence: Level of an interval for every element, such as 0.95, in
            `extras["interval_low"]` and `extras["interval_high"]`; None for no interval.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.arange(8.0).view(2, 4), sf.VarGrad(sigma=0.5)
        >>> att = sf.explain(lambda x: (x**2).sum(1), x, method=method)
        >>> bool((att.values.mean() - 1.0).abs() < 0.3)  # of 2 (x + noise): 4 * 0.5^2
        True
    """

    confidence: float | None = None
    name = "vargrad"

    def __post_init__(self) -> None:
        least = 2 if self.confidence is None else 2 * GROUPS
        self._check(least)
        checks.positive("confidence", self.confidence, optional=True)
        if self.confidence is not None and self.confidence >= 1:
            raise InputError(f"confidence is a probability under 1: got {self.confidence}")

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, False)
        if self.confidence is not None:
            samples, confidence = self.samples, self.confidence
            rounds = partial(variance_rounds, noise=noise, samples=samples, confidence=confidence)
            # Means and squares of all groups, and at the end their logarithms and temporaries.
            return RoundsRecipe(rounds, samples, held=5 * GROUPS)
        return WeightedSum(noise, samples_level(self.samples, False), "variance")


@dataclass(frozen=True)
class ExpectedGradients:
    """Integrated Gradients averaged over a set of baselines, by sampling (Erion, 2021).

    Mean of (x - x') * gradient at a random point between x and a random row x' of the baselines
    [M, *]. `Attribution.error` is the sampling error; the sum meets the gain over the mean baseline
    only on average, and the delta is given where the set has at most `samples` rows.

    Args:
        samples: Random points of each example.
        noise_level: Standard deviation of noise on the input end, as a share of its range.
        seed: An int, or one for each example.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> method = sf.ExpectedGradients(samples=8)
        >>> sf.explain(model, x, target=1, method=method, baseline=torch.zeros(5, 4)).values.shape
        torch.Size([2, 4])
    """

    samples: int = 200
    noise_level: float = 0.0
    seed: Seed = 0
    name = "expected_gradients"

    def __post_init__(self) -> None:
        checks.whole("samples", self.samples, 1)
        if self.noise_level != 0:
            checks.positive("noise_level", self.noise_level)
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        lines = RandomLine(self.noise_level, self.seed)
        return WeightedSum(lines, samples_level(self.samples, False), factor="line", baseline="set")


@dataclass(frozen=True)
class GradientShap:
    """`ExpectedGradients` under Captum's name and with its defaults (Lundberg, 2017).

    Args:
        samples: Random points of each example.
        sigma: Standard deviation of noise on the input end, in units of the input.
        seed: An int, or one for each example.

    Raises:
        InputError, InputTypeError: A field has another type or is out of range.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> method = sf.GradientShap()
        >>> sf.explain(model, x, target=1, method=method, baseline=torch.zeros(5, 4)).values.shape
        torch.Size([2, 4])
    """

    samples: int = 5
    sigma: float = 0.0
    seed: Seed = 0
    name = "gradient_shap"

    def __post_init__(self) -> None:
        checks.whole("samples", self.samples, 1)
        if self.sigma != 0:
            checks.positive("sigma", self.sigma)
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        lines = RandomLine(0.0, self.seed, float(self.sigma))
        return WeightedSum(lines, samples_level(self.samples, False), factor="line", baseline="set")
