"""Ablation and permutation: the change of the score without a feature, or with another's values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.recipe import Round, RoundContext, RoundResult, Rounds, RoundsRecipe
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.coalitions import Game, feature_count
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import philox, random_bits, segment_points


@dataclass(frozen=True)
class FeatureAblation:
    """Score less the score with one feature at its baseline, for each feature (Zeiler, 2014).

    `features=` of the call says what a feature is; without it every element is one. Every element
    gets its feature's value.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0, 3.0]]), sf.FeatureAblation()
        >>> sf.explain(lambda x: x[:, 0] * x[:, 1], x, method=method).values
        tensor([[2., 2., 0.]])
    """

    name = "feature_ablation"

    def recipe(self) -> RoundsRecipe:
        return RoundsRecipe(
            _ablated, feature_count, baseline="fill", gradients=False, features=True
        )


def _ablated(context: RoundContext) -> Rounds:
    game = Game.of(context)
    values = context.scores.new_zeros((*context.scores.shape, game.count))
    # Examples may have segments of their own: values of features that one lacks are zero.
    feature, example = (game.elements() > 0).expand(len(values), -1).T.nonzero().unbind(1)

    def members(example: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        return _all_but(feature, game.count), torch.arange(len(feature), device=feature.device)

    def each(rows: slice, result: RoundResult) -> None:
        own = example[rows]
        values[own, :, feature[rows]] = context.scores[own] - result.scores

    yield Round(game.writer(members), example, feature, each=each)
    return game.maps(values, None, sums=False)


def _all_but(feature: Tensor, count: int) -> Tensor:
    """Coalitions bool [R, F] of all features but one."""
    return torch.arange(count, device=feature.device) != feature[:, None]


@dataclass(frozen=True)
class FeaturePermutation:
    """Score less the score with one feature permuted within the batch (Breiman, 2001).

    `features=` of the call says what a feature is. A map depends on the other examples of the
    batch, of which there must be two or more.

    Args:
        repeats: Permutations of each feature, whose differences are averaged.
        seed: One int.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), sf.FeaturePermutation()
        >>> sf.explain(lambda x: x.sum(1), x, method=method).values
        tensor([[-2.,  0.],
                [ 2.,  0.]])
    """

    repeats: int = 1
    seed: int = 0
    name = "feature_permutation"

    def __post_init__(self) -> None:
        checks.fields(self, repeats=1, seed=checks.seed)
        if not isinstance(self.seed, int):
            raise InputTypeError(
                f"seed must be one int, since examples are permuted together: got {self.seed!r}"
            )

    def recipe(self) -> RoundsRecipe:
        rounds = partial(_permuted, repeats=self.repeats, seed=self.seed)

        def points(inputs: Inputs, features: Inputs, layouts: Layouts) -> int:
            return self.repeats * feature_count(inputs, features)

        return RoundsRecipe(rounds, points, gradients=False, features=True)


def _permuted(context: RoundContext, repeats: int, seed: int) -> Rounds:
    game, batch = Game.of(context), len(context.inputs[0])
    if batch < 2:
        raise InputError(
            "feature_permutation permutes features within the batch: got 1 example, expected 2 or "
            "more; use feature_ablation for one"
        )

    def write(example: Tensor, draw: Tensor) -> Inputs:
        row = torch.arange(len(draw), device=draw.device)
        present = _all_but(draw % game.count, game.count)
        other = permutations(draw, batch, seed)[row, example]
        points = []
        for x, segment in zip(context.inputs, game.segments, strict=True):
            own = segment if len(segment) == 1 else segment[example]
            columns = own.view(len(own), -1), present, row, row
            points.append(segment_points(x[example], x[other], *columns))
        return tuple(points)

    losses = context.scores.new_zeros((repeats * game.count, *context.scores.shape))

    def each(rows: slice, result: RoundResult) -> None:
        own = example[rows]
        losses[draw[rows], own] = context.scores[own] - result.scores

    example, draw = every_row(context, repeats * game.count)
    yield Round(write, example, draw, each=each)
    drawn = losses.view(repeats, game.count, *context.scores.shape).permute(2, 3, 1, 0)
    # The variance of a single permutation is unknown: 0 / 0.
    spread = (drawn - drawn.mean(3, keepdim=True)).square().sum(3)
    return game.maps(drawn.mean(3), spread / (repeats * (repeats - 1.0)), sums=False)


def permutations(number: Tensor, batch: int, seed: int) -> Tensor:
    """The permutations of these numbers of a batch, never the identity: int64 [R, B]."""
    words = random_bits(torch.full_like(number, seed), number, batch, 0, philox.ORDER)
    order = words.argsort(dim=1, stable=True)
    still = (order == torch.arange(batch, device=order.device)).all(1, keepdim=True)
    return torch.where(still, order.roll(1, 1), order)
