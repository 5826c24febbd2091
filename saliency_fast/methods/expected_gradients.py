"""Expected gradients: Integrated Gradients averaged over a set of baselines, by sampling."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.engine.points import RandomLine, Seed
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.methods.parts import checks
from saliency_fast.methods.smoothgrad import samples_level


@dataclass(frozen=True)
class ExpectedGradients:
    """Mean of (x - x') * gradient at a random point between x and a random baseline x' (Erion,
    2021; the sampling of GradientSHAP, Lundberg, 2017).

    baseline: a set [M, *]. noise_level: noise on the input end, as a share of its range. The sum
    meets the score's gain over the mean baseline only on average, and `Attribution.error` is the
    sampling error; the delta is told where the set has at most `samples` rows.
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
    """ExpectedGradients under Captum's name and with its defaults (Lundberg, 2017).

    sigma: standard deviation of the noise on the input end, in units of the input.
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
