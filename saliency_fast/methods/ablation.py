"""Ablation and permutation: what the score loses without a feature, or with another's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import (
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import Game, players
from saliency_fast.model.axes import Layouts
from saliency_fast.ops import philox, random_bits, segment_points


@dataclass(frozen=True)
class FeatureAblation:
    """The score less the score with one feature at its baseline, for each feature (Zeiler, 2014).

    `features=` of the call says what a feature is; without it every element is one. Every element
    gets its feature's value.
    """

    name = "feature_ablation"

    def recipe(self) -> Recipe:
        return RoundsRecipe(_ablated, players, baseline="fill", gradients=False, features=True)


def _ablated(asked: RoundContext) -> Rounds:
    game = Game.of(asked)
    values = asked.scores.new_zeros((*asked.scores.shape, game.count))
    # Examples may have segments of their own: the features that one has not cost it nothing.
    place, item = (game.elements() > 0).expand(len(values), -1).T.nonzero().unbind(1)

    def members(item: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(place), device=place.device)
        present = torch.ones(len(place), game.count, dtype=torch.bool, device=place.device)
        present[row, place] = False
        return present, row

    def each(rows: slice, found: RoundResult) -> None:
        own = item[rows]
        values[own, :, place[rows]] = asked.scores[own] - found.scores

    yield Round(game.writer(members), item, place, each=each)
    return game.maps(values, None, sums=False)


@dataclass(frozen=True)
class FeaturePermutation:
    """The score less the score with one feature's values permuted within the batch, for each
    feature (Breiman, 2001).

    repeats: permutations of each feature, whose differences are averaged. seed: one int. A batch
    of two or more examples is needed, and a map depends on the others in the batch.
    """

    repeats: int = 1
    seed: int = 0
    name = "feature_permutation"

    def __post_init__(self) -> None:
        checks.whole("repeats", self.repeats, 1)
        checks.seed(self.seed)
        if not isinstance(self.seed, int):
            raise InputTypeError(
                f"seed must be one int, since examples are permuted together: got {self.seed!r}"
            )

    def recipe(self) -> Recipe:
        rounds = partial(_permuted, repeats=self.repeats, seed=self.seed)

        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return self.repeats * players(inputs, features)

        return RoundsRecipe(rounds, points, gradients=False, features=True)


def _permuted(asked: RoundContext, repeats: int, seed: int) -> Rounds:
    game, batch = Game.of(asked), len(asked.inputs[0])
    if batch < 2:
        raise InputError(
            "feature_permutation permutes features within the batch: got 1 example, expected 2 or "
            "more; use feature_ablation for one"
        )

    def write(item: Tensor, place: Tensor) -> Inputs:
        row = torch.arange(len(place), device=place.device)
        present = torch.ones(len(place), game.count, dtype=torch.bool, device=place.device)
        present[row, place % game.count] = False
        other = permutations(place, batch, seed)[row, item]
        found = []
        for x, segment in zip(asked.inputs, game.segments, strict=True):
            own = segment if len(segment) == 1 else segment[item]
            found.append(
                segment_points(x[item], x[other], own.view(len(own), -1), present, row, row)
            )
        return tuple(found)

    kept = asked.scores.new_zeros((repeats * game.count, *asked.scores.shape))

    def each(rows: slice, found: RoundResult) -> None:
        own = item[rows]
        kept[place[rows], own] = asked.scores[own] - found.scores

    place = torch.arange(repeats * game.count, device=game.device).repeat_interleave(batch)
    item = torch.arange(batch, device=game.device).repeat(repeats * game.count)
    yield Round(write, item, place, each=each)
    drawn = kept.view(repeats, game.count, *asked.scores.shape).permute(2, 3, 1, 0)
    # Of one permutation nothing is known: the variance is 0 / 0.
    spread = (drawn - drawn.mean(3, keepdim=True)).square().sum(3)
    return game.maps(drawn.mean(3), spread / (repeats * (repeats - 1.0)), sums=False)


def permutations(number: Tensor, batch: int, seed: int) -> Tensor:
    """The permutation of that number of a batch, never the identity: int64 [R, B]."""
    words = random_bits(torch.full_like(number, seed), number, batch, 0, philox.ORDER)
    order = words.argsort(dim=1, stable=True)
    still = (order == torch.arange(batch, device=order.device)).all(1, keepdim=True)
    return torch.where(still, order.roll(1, 1), order)
