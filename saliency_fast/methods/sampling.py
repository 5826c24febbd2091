"""Gradients at random points: SmoothGrad and its variants, expected gradients, GradientSHAP."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import norm_of
from saliency_fast.engine.points import Noise, RandomLine, Seed
from saliency_fast.engine.recipe import (
    Level,
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
    Rows,
    WeightedSum,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.maps import accumulators, by_example, every_row

GROUPS = 8
"""More groups narrow the interval by a tenth at most, and each costs the memory of maps."""
LEAST_SHARE = 1e-6
"""Least share of a variance that is left without one group, so that it has a logarithm."""


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
        checks.fields(self, samples=least, noise_level=checks.positive, seed=checks.seed)
        checks.fields(self, sigma=checks.optional(checks.positive))


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

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.SmoothGrad(samples=8)
        >>> sf.explain(lambda x: x @ torch.tensor([3.0, -1.0]), x, method=method).values
        tensor([[ 3., -1.]])
    """

    antithetic: bool = True
    standard_error: bool = False
    shared_axis: int | None = None
    name = "smoothgrad"

    def __post_init__(self) -> None:
        checks.fields(self, antithetic=checks.boolean, standard_error=checks.boolean)
        self._check((2 + 2 * self.antithetic) if self.standard_error else 1)
        checks.fields(self, shared_axis=checks.optional(1))

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, self.antithetic, self.shared_axis)
        if self.standard_error:
            rounds = partial(_smooth_rounds, noise=noise, samples=self.samples)
            return RoundsRecipe(rounds, self.samples, held=2 * GROUPS)
        return WeightedSum(noise, samples_level(self.samples, self.antithetic))


@dataclass(frozen=True)
class SmoothGradSquared(_Noisy):
    """Mean squared gradient of noisy copies of the input (Hooker, 2019).

    Args:
        samples, noise_level, sigma, seed, antithetic: As of `SmoothGrad`.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.SmoothGradSquared(samples=8)
        >>> sf.explain(lambda x: x @ torch.tensor([3.0, -1.0]), x, method=method).values
        tensor([[9., 1.]])
    """

    antithetic: bool = True
    name = "smoothgrad_squared"

    def __post_init__(self) -> None:
        checks.boolean("antithetic", self.antithetic)
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
        self._check(2 if self.confidence is None else 2 * GROUPS)
        checks.fields(self, confidence=checks.optional(checks.positive))
        if self.confidence is not None and self.confidence >= 1:
            raise InputError(f"confidence is a probability under 1: got {self.confidence}")

    def recipe(self) -> Recipe:
        noise = Noise(self.noise_level, self.sigma, self.seed, False)
        if self.confidence is not None:
            samples, confidence = self.samples, self.confidence
            rounds = partial(_variance_rounds, noise=noise, samples=samples, confidence=confidence)
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

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.ExpectedGradients(samples=8)
        >>> sf.explain(lambda x: x.sum(1), x, method=method, baseline=torch.zeros(5, 2)).values
        tensor([[1., 2.]])
    """

    samples: int = 200
    noise_level: float = 0.0
    seed: Seed = 0
    name = "expected_gradients"

    def __post_init__(self) -> None:
        _check_lines(self, "noise_level")

    def recipe(self) -> Recipe:
        lines = RandomLine(self.noise_level, self.seed)
        return WeightedSum(lines, samples_level(self.samples, False), factor="line", baseline="set")


@dataclass(frozen=True)
class GradientShap:
    """`ExpectedGradients` under Captum's name and with its defaults (Lundberg, 2017).

    Args:
        samples, seed: As of `ExpectedGradients`.
        sigma: Standard deviation of noise on the input end, in units of the input.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.GradientShap()
        >>> sf.explain(lambda x: x.sum(1), x, method=method, baseline=torch.zeros(5, 2)).values
        tensor([[1., 2.]])
    """

    samples: int = 5
    sigma: float = 0.0
    seed: Seed = 0
    name = "gradient_shap"

    def __post_init__(self) -> None:
        _check_lines(self, "sigma")

    def recipe(self) -> Recipe:
        lines = RandomLine(0.0, self.seed, float(self.sigma))
        return WeightedSum(lines, samples_level(self.samples, False), factor="line", baseline="set")


def _check_lines(method: ExpectedGradients | GradientShap, noise: str) -> None:
    checks.fields(method, samples=1, seed=checks.seed)
    if getattr(method, noise) != 0:
        checks.positive(noise, getattr(method, noise))


# --- Sampling errors --------------------------------------------------------------------------


Group = tuple[Tensor, Tensor, Tensor]
"""Of one input: means [S, G, *] and sums of squared deviations of each group's gradients for every
map, and the groups' sizes [G, 1, ...].
"""


def _groups(
    context: RoundContext, noise: Noise, samples: int, *, moments: bool
) -> Generator[Round | Maps, RoundResult, list[Group]]:
    """Gradients at all samples, dealt to the groups in turn; a pair of opposite noise is in one
    group. Without `moments` the sums of squared deviations are the means.
    """
    together = 2 if noise.antithetic else 1
    count = min(GROUPS, samples // (2 if moments else together))
    source = noise.bind(context.inputs, context.baselines)
    (batch, targets), slots = context.scores.shape, context.scores.numel() * count
    means = accumulators(context.inputs, slots)
    squares = accumulators(context.inputs, slots) if moments else means
    example, sample = every_row(context, samples)
    group = sample // together % count
    sizes = torch.bincount(group, minlength=count).double() / batch
    seen = [sizes.new_zeros(slots) for _ in means]

    def write(example: Tensor, sample: Tensor) -> Inputs:
        return source.write(Rows(example, sample, sample.double(), example))

    def each(rows: slice, result: RoundResult) -> None:
        for k, grads in enumerate(result.grads):
            slot = (example[rows] * targets + k) * count + group[rows]
            for number, gradient in enumerate(grads):
                if moments:
                    state = means[number], squares[number], seen[number]
                    ops.accumulate_moments(*state, gradient, slot)
                else:
                    ops.accumulate(means[number], gradient, slot, 1.0 / sizes[group[rows]], "sum")

    yield Round(write, example, sample, gradients=True, each=each)
    found = []
    for mean, square in zip(means, squares, strict=True):
        own = (-1, count, *mean.shape[1:])
        size = sizes.to(mean.dtype).view(-1, *(1,) * (mean.dim() - 1))
        found.append((mean.view(own), square.view(own), size))
    return found


def _smooth_rounds(context: RoundContext, noise: Noise, samples: int) -> Rounds:
    """Mean gradients, with standard errors from the differences of the groups' means."""
    values, errors = [], []
    for means, _, size in (yield from _groups(context, noise, samples, moments=False)):
        count, share = len(size), size / samples
        mean = (share * means).sum(1)
        square = (share * (means - mean[:, None])).square_().sum(1)
        values.append(mean)
        errors.append(square.mul_(count / (count - 1)).sqrt_())
    return _maps(context, values, errors, {"standard_error": errors})


def _variance_rounds(
    context: RoundContext, noise: Noise, samples: int, confidence: float
) -> Rounds:
    """Variances of gradients, with intervals by the jackknife (Miller, 1974) of logarithms."""
    values, errors, lows, highs = [], [], [], []
    for means, squares, size in (yield from _groups(context, noise, samples, moments=True)):
        count = len(size)
        total, left = _without_each_group(means, squares, size, samples)
        values.append(total / samples)
        whole = (total / (samples - 1)).clamp_min(torch.finfo(total.dtype).tiny)
        others = (left / (samples - size - 1)).maximum(LEAST_SHARE * whole[:, None]).log_()
        pseudo = count * whole.log()[:, None] - (count - 1) * others
        middle, deviation = pseudo.mean(1), pseudo.var(1).div_(count).sqrt_()
        reach = student(confidence, count - 1) * deviation
        lows.append((middle - reach).exp_().masked_fill_(total == 0, 0.0))
        highs.append((middle + reach).exp_().masked_fill_(total == 0, 0.0))
        errors.append(deviation * values[-1])
    return _maps(context, values, errors, {"interval_low": lows, "interval_high": highs})


def _without_each_group(
    means: Tensor, squares: Tensor, size: Tensor, samples: int
) -> tuple[Tensor, Tensor]:
    """Sums of squared deviations [S, *] of all samples, and [S, G, *] without each group."""
    mean = (size * means).sum(1, keepdim=True) / samples
    away = (means - mean).square_()
    total = (squares + size * away).sum(1)
    # Chan's merge (1983), solved for what is left when a group is taken out.
    left = total[:, None] - squares - away * (size * samples / (samples - size))
    return total, left.clamp_min_(0.0)


def _maps(
    context: RoundContext,
    values: list[Tensor],
    errors: list[Tensor],
    extras: dict[str, list[Tensor]],
) -> Maps:
    targets, scale = context.scores.shape[1], norm_of(tuple(values))
    error = norm_of(tuple(errors)) / scale.clamp_min(torch.finfo(torch.float64).tiny)
    named = {
        name if len(parts) == 1 else f"{name}.{number}": one
        for name, parts in extras.items()
        for number, one in enumerate(by_example(tuple(parts), targets))
    }
    return Maps(by_example(tuple(values), targets), error.view_as(context.scores), extras=named)


def student(confidence: float, freedom: int) -> float:
    """How many standard errors a two-sided interval reaches, by Student's distribution."""
    # Imported here, since the import of scipy.special takes longer than that of this package.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))
