"""Shapley values: the mean gain of adding a feature to those before it, over all orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import Round, RoundContext, Rounds, RoundsRecipe
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import PARTIAL_MAPS, Game, feature_count
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import philox

MOST = 20
"""Most features of which all coalitions are evaluated: a million points."""


@dataclass(frozen=True)
class ShapleyValues:
    """Exact Shapley values from all 2^F coalitions of at most 20 features (Shapley, 1953).

    `features=` of the call says what a feature is. Values sum to the gain over the baseline.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.ShapleyValues()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1] + x[:, 2], x, method=method).values
        tensor([[1., 1., 3.]])
    """

    name = "shapley_values"

    def recipe(self) -> RoundsRecipe:
        return RoundsRecipe(_exact, _coalitions, baseline="one", gradients=False, features=True)


@dataclass(frozen=True)
class ShapleySampling:
    """Shapley values by random orders of the features (Castro, 2009).

    `features=` of the call says what a feature is. Values sum to the gain over the baseline.

    Args:
        permutations: Orders of F - 1 points each; where all 2^F coalitions are no more points,
            these are evaluated instead, and values are exact.
        antithetic: Whether every order comes with its reverse, which lowers the error for the same
            number of points (Mitchell, 2022).
        seed: An int, or one for each example.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.ShapleySampling()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1] + x[:, 2], x, method=method).values
        tensor([[1., 1., 3.]])
    """

    permutations: int = 25
    antithetic: bool = True
    seed: Seed = 0
    name = "shapley_sampling"

    def __post_init__(self) -> None:
        checks.fields(self, permutations=1, antithetic=checks.boolean, seed=checks.seed)

    def recipe(self) -> RoundsRecipe:
        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            count = feature_count(inputs, features)
            return min((1 << count) - 2, self.permutations * (count - 1))

        return RoundsRecipe(self._rounds, points, baseline="one", gradients=False, features=True)

    def _rounds(self, context: RoundContext) -> Rounds:
        game = Game.of(context)
        if 2**game.count - 2 <= self.permutations * (game.count - 1):
            return (yield from exact_rounds(game))

        def ranks(start: int, stop: int) -> Tensor:
            """Random orders; every other antithetic one is the reverse of the one before."""
            number = torch.arange(start, stop, device=game.device)
            drawn = number // 2 if self.antithetic else number
            words = game.random_words(self.seed, drawn, game.count, philox.ORDER)
            # The rank of random words is as random as an order by them.
            rank = words.argsort(dim=2, stable=True).argsort(dim=2)
            if self.antithetic:
                rank = torch.where((number % 2 == 1)[:, None], game.count - 1 - rank, rank)
            return rank

        together = 2 if self.antithetic else 1
        return (yield from permutation_rounds(game, self.permutations, ranks, together))


def _coalitions(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
    """How many coalitions there are between none and all."""
    count = feature_count(inputs, features)
    if count > MOST:
        raise InputError(
            f"exact Shapley values take 2^F points: got {count} features, expected at most "
            f"{MOST}; use ShapleySampling or KernelShap, or fewer features"
        )
    return (1 << count) - 2


def _exact(context: RoundContext) -> Rounds:
    return (yield from exact_rounds(Game.of(context)))


def exact_rounds(game: Game) -> Rounds:
    """All coalitions; the scores of the empty and of the full one are in the context."""
    number = torch.arange(2**game.count, device=game.device)
    present = ((number[:, None] >> torch.arange(game.count, device=game.device)) & 1).bool()
    between = game.context.scores.new_zeros((*game.context.scores.shape, 0))
    if game.count > 1:
        result = yield game.table(present[None, 1:-1])
        between = game.table_scores(result.scores)
    worth = _with_ends(game, between)
    # A coalition of s features counts for each feature it has, and against each one it lacks.
    sizes = torch.arange(game.count + 1, dtype=torch.float64, device=game.device)
    equal = [comb(game.count, size) for size in range(game.count + 1)]
    number_of_size = torch.tensor(equal, device="cpu").to(sizes)
    gain = 1.0 / (sizes * number_of_size)
    loss = 1.0 / ((game.count - sizes) * number_of_size)
    gain[0] = loss[-1] = 0.0
    size = present.sum(1)
    both, against = worth * (gain + loss)[size], (worth * loss[size]).sum(2)
    values = [both[..., own].sum(2) - against for own in present.T]
    return game.maps(torch.stack(values, dim=2), None, sums=True)


def permutation_rounds(
    game: Game, orders: int, ranks: Callable[[int, int], Tensor], together: int
) -> Rounds:
    """Mean gains along orders of the features. ranks(start, stop): int64 [1 | B, stop - start, F],
    the position of every feature in these orders. together: orders that are one draw. With one draw
    alone the error is unknown.
    """
    total = game.context.scores.new_zeros((*game.context.scores.shape, game.count))
    mean, square, draws = total.clone(), total.clone(), 0
    step = together * -(-orders // (PARTIAL_MAPS * together))
    for start in range(0, orders, step):
        stop = min(start + step, orders)
        own = ranks(start, stop)
        result = yield _walk(game, own)
        gains = _gains(game, own, game.table_scores(result.scores))
        total += gains.sum(2)
        for one in torch.split(gains, together, dim=2):
            # Welford's mean and sum of squared deviations (1962), draw by draw.
            draws, change = draws + 1, one.mean(2) - mean
            mean += change / draws
            square += change * (one.mean(2) - mean)
        variance = square / (draws * (draws - 1)) if draws > 1 else square * torch.nan
        maps = game.maps(total / stop, variance, sums=True)
        if stop < orders:
            yield maps
    return maps


def _walk(game: Game, ranks: Tensor) -> Round:
    """The coalitions along orders int64 [1 | B, P, F], between none and all."""
    steps = game.count - 1
    flat, shift = ranks.flatten(0, 1), ranks.shape[1] if len(ranks) > 1 else 0

    def members(example: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        present = flat[number // steps + shift * example] <= (number % steps)[:, None]
        return present, torch.arange(len(number), device=number.device)

    return Round(game.writer(members), *every_row(game.context, ranks.shape[1] * steps))


def _gains(game: Game, ranks: Tensor, scores: Tensor) -> Tensor:
    """The gain of each feature in each order, [B, K, P, F], from the scores of `_walk`."""
    batch, targets, _ = scores.shape
    worth = _with_ends(game, scores.reshape(batch, targets, ranks.shape[1], game.count - 1))
    return worth.diff(dim=3).gather(3, ranks[:, None].expand(batch, targets, -1, -1))


def _with_ends(game: Game, scores: Tensor) -> Tensor:
    """Scores [B, K, *, M] with the empty coalition's before and the full one's behind them."""
    context, shape = game.context, (*scores.shape[:-1], 1)
    assert context.baseline_scores is not None
    begin, end = (
        one.view(*one.shape, *(1,) * (len(shape) - 2)).expand(shape)
        for one in (context.baseline_scores, context.scores)
    )
    return torch.cat((begin, scores, end), dim=-1)
