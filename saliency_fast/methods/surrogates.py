"""Surrogates: linear models of the score on which features are there, LIME and Kernel SHAP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import is_finite
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import Recipe, RoundContext, Rounds, RoundsRecipe
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import Game, own_seeds, players
from saliency_fast.methods.parts.regression import FITS, Slopes, fit, fit_shares
from saliency_fast.methods.shapley import exact_rounds
from saliency_fast.model.axes import Layouts
from saliency_fast.ops import philox, random_bits

Draw = Callable[[Game], Tensor]
"""A table of coalitions bool [1 | B, M, F] for the features of a call."""
Weigh = Callable[[Game, Tensor], Tensor]
"""The weights float64 [1 | B, M] of such a table."""


@dataclass(frozen=True)
class Lime:
    """Slopes of a linear model of the score on which features are there (Ribeiro, 2016).

    samples: random coalitions, each feature there with a chance of one half. fit: "ridge", "lasso"
    (scikit-learn) or "linear", with the penalty `alpha`. A coalition at distance d of the whole
    weighs exp(-d^2 / (2 kernel_width^2)); distance: "features", the cosine distance of the features
    that are there, or "cosine" or "euclidean" of the points themselves. seed: an int, or one per
    example. `features=` of the call says what a feature is.
    """

    samples: int = 1000
    kernel_width: float = 0.25
    distance: str = "features"
    fit: str = "ridge"
    alpha: float = 1.0
    seed: Seed = 0
    name = "lime"

    def __post_init__(self) -> None:
        checks.whole("samples", self.samples, 2)
        checks.positive("kernel_width", self.kernel_width)
        checks.choice("distance", self.distance, tuple(DISTANCES))
        checks.choice("fit", self.fit, FITS)
        checks.positive("alpha", self.alpha)
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        def draw(game: Game) -> Tensor:
            return coin_tosses(game, self.samples, self.seed)

        def weigh(game: Game, present: Tensor) -> Tensor:
            d = distances(game, present, self.distance)
            return torch.exp(-d.square() / (2.0 * self.kernel_width**2))

        def rounds(asked: RoundContext) -> Rounds:
            return fitted(asked, draw, weigh, self.fit, self.alpha)

        return RoundsRecipe(rounds, self.samples, baseline="fill", gradients=False, features=True)


@dataclass(frozen=True)
class KernelShap:
    """Shapley values by weighted regression on random coalitions (Lundberg and Lee, 2017).

    samples: coalitions; where all of them are no more, they are all taken and the values are exact.
    paired: every coalition comes with its complement, which lowers the error for the same number
    (Covert and Lee, 2021). Values add up to the gain over the baseline. seed: an int, or one per
    example. `features=` of the call says what a feature is.
    """

    samples: int = 2048
    paired: bool = True
    seed: Seed = 0
    name = "kernel_shap"

    def __post_init__(self) -> None:
        checks.flag("paired", self.paired)
        checks.whole("samples", self.samples, 2)
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return min((1 << players(inputs, features)) - 2, self.samples)

        return RoundsRecipe(self._rounds, points, baseline="one", gradients=False, features=True)

    def _rounds(self, asked: RoundContext) -> Rounds:
        game = Game.of(asked)
        if 2**game.count <= self.samples + 2:
            return (yield from exact_rounds(game))
        if self.samples <= game.count:
            raise InputError(
                f"kernel_shap needs more samples than features: got {self.samples} for "
                f"{game.count}; group elements with features=, such as 'grid:8' or 'slic', or "
                "raise samples"
            )
        present = kernel_coalitions(game, self.samples, self.seed, paired=self.paired)
        found = yield game.table(present)
        assert asked.baseline_scores is not None
        answers = game.answers(found.scores) - asked.baseline_scores[..., None]
        slopes = _per_group(
            present,
            answers,
            lambda number, table, y, own: fit_shares(table, y, own, paired=self.paired),
            game.gain(),
        )
        return game.maps(*slopes, sums=True)


def fitted(asked: RoundContext, draw: Draw, weigh: Weigh, how: str, alpha: float) -> Rounds:
    """Slopes of the score on the coalitions that are drawn, as they are weighed."""
    game = Game.of(asked)
    present = draw(game)
    weight = weigh(game, present)
    found = yield game.table(present)
    answers = game.answers(found.scores)
    if len(weight) > len(present):
        present = present.expand(len(weight), -1, -1)
    slopes = _per_group(
        present,
        answers,
        lambda number, table, y, _: fit(table, y, weight[number], how, alpha),
        game.asked.scores,
    )
    return game.maps(*slopes, sums=False)


def _per_group(
    present: Tensor,
    answers: Tensor,
    solve: Callable[[int, Tensor, Tensor, Tensor], Slopes],
    gain: Tensor,
) -> tuple[Tensor, Tensor]:
    """Slopes and variances [B, K, F] from answers [B, K, M]; examples that share their coalitions
    are solved for at once.
    """
    batch, targets, count = answers.shape
    shared = len(present) == 1
    groups = answers.reshape(1 if shared else batch, -1, count)
    gains = gain.reshape(len(groups), -1)
    found = [
        solve(number, table, y.T, own)
        for number, (table, y, own) in enumerate(zip(present, groups, gains, strict=True))
    ]
    values = torch.cat([one.values.T for one in found]).view(batch, targets, -1)
    return values, torch.cat([one.variance.T for one in found]).view(batch, targets, -1)


def coin_tosses(game: Game, samples: int, seed: Seed) -> Tensor:
    """Coalitions that every feature is in with a chance of one half, bool [1 | B, M, F]."""
    words = _words(game, samples, seed, game.count)
    return words >= 2**31


def kernel_coalitions(game: Game, samples: int, seed: Seed, *, paired: bool) -> Tensor:
    """Coalitions of s of F features with a chance proportional to 1 / (s (F - s)), which is the
    Shapley kernel's of all of that size: bool [1 | B, M, F]. paired: every other one is the
    complement of the one before, and an odd sample is left out.
    """
    size = torch.arange(1, game.count, dtype=torch.float64, device=game.device)
    chance = 1.0 / (size * (game.count - size))
    bounds = chance.cumsum(0) / chance.sum()
    words = _words(game, samples // 2 if paired else samples, seed, game.count + 1)
    share = ((words[..., 0] >> 8).double() + 0.5) * 2.0**-24
    wanted = torch.searchsorted(bounds, share.contiguous()) + 1
    rank = words[..., 1:].argsort(dim=-1, stable=True).argsort(dim=-1)
    present = rank < wanted[..., None]
    return torch.stack((present, ~present), dim=2).flatten(1, 2) if paired else present


def _words(game: Game, samples: int, seed: Seed, count: int) -> Tensor:
    """Random words int64 [1 | B, samples, count]."""
    own = own_seeds(seed, game.asked)
    number = torch.arange(samples, device=own.device).repeat(len(own))
    words: Tensor = random_bits(own.repeat_interleave(samples), number, count, 0, philox.COALITION)
    return words.view(len(own), samples, count)


def _of_features(game: Game, present: Tensor) -> Tensor:
    """Cosine distance of the features that are there from all, float64 [1 | B, M]."""
    return 1.0 - (present.double().sum(2) / game.count).sqrt()


def _cosine(game: Game, present: Tensor) -> Tensor:
    """Cosine distance of points from their examples, float64 [B, M]."""
    z = present.double()
    both = _sums(game, z, lambda x, fill: x * x) + _sums(game, 1 - z, lambda x, fill: x * fill)
    point = _sums(game, z, lambda x, fill: x * x) + _sums(game, 1 - z, lambda x, fill: fill * fill)
    whole = _sums(game, torch.ones_like(z), lambda x, fill: x * x)
    return 1.0 - both / (point.sqrt() * whole.sqrt()).clamp_min(1e-8)


def _euclidean(game: Game, present: Tensor) -> Tensor:
    """Distance of points from their examples, float64 [B, M]."""
    return _sums(game, 1.0 - present.double(), lambda x, fill: (x - fill).square()).sqrt()


def _sums(game: Game, share: Tensor, each: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sums over elements of what each gives, times its feature's share [1 | B, M, F]: [B, M]."""
    asked, batch = game.asked, len(game.asked.inputs[0])
    total = share.new_zeros(batch, game.count)
    for x, fill, segment in zip(asked.inputs, asked.baselines, game.segments, strict=True):
        amount = each(x.double(), fill.double()).expand_as(x).reshape(batch, -1)
        total.scatter_add_(1, segment.view(len(segment), -1).expand(batch, -1), amount)
    return (share @ total[:, :, None])[..., 0]


DISTANCES = {"features": _of_features, "cosine": _cosine, "euclidean": _euclidean}


def distances(game: Game, present: Tensor, kind: str) -> Tensor:
    """How far coalitions are from the whole, float64 [1 | B, M]; raises InputError where values
    that are missing have no distance.
    """
    found = DISTANCES[kind](game, present)
    if not is_finite(found):
        raise InputError(
            f"distance={kind!r} is undefined for inputs or baselines that hold NaN or infinity; "
            "use distance='features'"
        )
    return found
