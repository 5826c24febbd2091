"""Shapley values: the mean gain that a feature brings to those before it, over all orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.points import Seed
from saliency_fast.engine.recipe import Recipe, Round, RoundContext, Rounds, RoundsRecipe
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import Game, own_seeds, players
from saliency_fast.model.axes import Layouts
from saliency_fast.ops import philox, random_bits

MOST = 20
"""Features whose coalitions are all taken: a million points."""
LOOKS = 16
"""Maps so far that a call gives on the way."""


@dataclass(frozen=True)
class ShapleyValues:
    """Shapley values from all coalitions of the features (Shapley, 1953), exact.

    There are 2^F of them, for at most 20 features; `features=` of the call says what they are.
    Values add up to the gain over the baseline.
    """

    name = "shapley_values"

    def recipe(self) -> Recipe:
        return RoundsRecipe(_exact, _coalitions, baseline="one", gradients=False, features=True)


@dataclass(frozen=True)
class ShapleySampling:
    """Shapley values by random orders of the features (Castro, 2009).

    permutations: orders, of F - 1 points each; where all 2^F coalitions are no more, these are
    taken and the values are exact. antithetic: every order comes with its reverse (Mitchell, 2022),
    which lowers the error for the same number. Values add up to the gain over the baseline. seed:
    an int, or one per example. `features=` of the call says what a feature is.
    """

    permutations: int = 25
    antithetic: bool = True
    seed: Seed = 0
    name = "shapley_sampling"

    def __post_init__(self) -> None:
        checks.whole("permutations", self.permutations, 1)
        checks.flag("antithetic", self.antithetic)
        checks.seed(self.seed)

    def recipe(self) -> Recipe:
        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            count = players(inputs, features)
            return min((1 << count) - 2, self.permutations * (count - 1))

        return RoundsRecipe(self._rounds, points, baseline="one", gradients=False, features=True)

    def _rounds(self, asked: RoundContext) -> Rounds:
        game = Game.of(asked)
        if 2**game.count - 2 <= self.permutations * (game.count - 1):
            return (yield from exact_rounds(game))

        def ranks(start: int, stop: int) -> Tensor:
            return random_ranks(game, start, stop, self.seed, antithetic=self.antithetic)

        return (yield from walked(game, self.permutations, ranks, 2 if self.antithetic else 1))


def _coalitions(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
    """How many there are but none and all."""
    count = players(inputs, features)
    if count > MOST:
        raise InputError(
            f"exact Shapley values take 2^F points: got {count} features, expected at most "
            f"{MOST}; use ShapleySampling or KernelShap, or fewer features"
        )
    return (1 << count) - 2


def _exact(asked: RoundContext) -> Rounds:
    return (yield from exact_rounds(Game.of(asked)))


def exact_rounds(game: Game) -> Rounds:
    """All coalitions but none and all, whose scores are known."""
    number = torch.arange(2**game.count, device=game.device)
    present = ((number[:, None] >> torch.arange(game.count, device=game.device)) & 1).bool()
    asked = game.asked
    assert asked.baseline_scores is not None
    between = asked.scores.new_zeros((*asked.scores.shape, 0))
    if game.count > 1:
        found = yield game.table(present[None, 1:-1])
        between = game.answers(found.scores)
    ends = asked.baseline_scores[..., None], asked.scores[..., None]
    worth = torch.cat((ends[0], between, ends[1]), dim=2)
    # A coalition of s features counts for each one it has, and against each one it lacks.
    sizes = torch.arange(game.count + 1, dtype=torch.float64, device=game.device)
    ways = torch.tensor([comb(game.count, s) for s in range(game.count + 1)], device="cpu").to(
        sizes
    )
    gain, loss = 1.0 / (sizes * ways), 1.0 / ((game.count - sizes) * ways)
    gain[0] = loss[-1] = 0.0
    size = present.sum(1)
    both, against = worth * (gain + loss)[size], (worth * loss[size]).sum(2)
    values = [both[..., own].sum(2) - against for own in present.T]
    return game.maps(torch.stack(values, dim=2), None, sums=True)


def walked(game: Game, orders: int, ranks: Callable[[int, int], Tensor], together: int) -> Rounds:
    """Mean gains along orders of the features.

    ranks(start, stop): int64 [1 | B, stop - start, F], the place of every feature in those orders.
    together: orders that are one draw. With one draw alone the error is not known.
    """
    total = game.asked.scores.new_zeros((*game.asked.scores.shape, game.count))
    mean, square, draws = total.clone(), total.clone(), 0
    step = together * -(-orders // (LOOKS * together))
    for start in range(0, orders, step):
        stop = min(start + step, orders)
        own = ranks(start, stop)
        found = yield _walk(game, own)
        gains = _gains(game, own, game.answers(found.scores))
        total += gains.sum(2)
        for one in torch.split(gains, together, dim=2):
            # The mean and the squares about it, draw by draw (Welford, 1962).
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
    batch, steps = len(game.asked.inputs[0]), game.count - 1
    flat, shift = ranks.flatten(0, 1), ranks.shape[1] if len(ranks) > 1 else 0

    def members(item: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        last = place % steps
        present = flat[place // steps + shift * item] <= last[:, None]
        return present, torch.arange(len(place), device=place.device)

    place = torch.arange(ranks.shape[1] * steps, device=game.device)
    item = torch.arange(batch, device=game.device).repeat(len(place))
    return Round(game.writer(members), item, place.repeat_interleave(batch))


def _gains(game: Game, ranks: Tensor, answers: Tensor) -> Tensor:
    """What each feature brings in each order, [B, K, P, F], from the answers of `_walk`."""
    asked = game.asked
    assert asked.baseline_scores is not None
    batch, targets, orders = *asked.scores.shape, ranks.shape[1]
    wide = (batch, targets, orders, 1)
    begin = asked.baseline_scores[..., None, None].expand(wide)
    end = asked.scores[..., None, None].expand(wide)
    worth = torch.cat((begin, answers.reshape(batch, targets, orders, -1), end), dim=3)
    own = ranks[:, None].expand(batch, targets, -1, -1)
    return worth.diff(dim=3).gather(3, own)


def random_ranks(game: Game, start: int, stop: int, seed: Seed, *, antithetic: bool) -> Tensor:
    """The place of every feature in orders `start` to `stop`, int64 [1 | B, stop - start, F]; of
    antithetic ones every other is the reverse of the one before.
    """
    own = own_seeds(seed, game.asked)
    number = torch.arange(start, stop, device=own.device)
    drawn = number // 2 if antithetic else number
    words = random_bits(
        own.repeat_interleave(len(number)),
        drawn.repeat(len(own)),
        game.count,
        0,
        philox.ORDER,
    )
    # The rank of random words is as random as an order by them.
    rank: Tensor = words.argsort(dim=1, stable=True).argsort(dim=1).view(len(own), -1, game.count)
    if antithetic:
        rank = torch.where((number % 2 == 1)[:, None], game.count - 1 - rank, rank)
    return rank
