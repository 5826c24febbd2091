"""Coalitions: points that keep some features of an example, with the baseline for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.features import numbered
from saliency_fast.engine.points import Seed, seeds
from saliency_fast.engine.recipe import Maps, Round, RoundContext
from saliency_fast.methods.parts.maps import every_row
from saliency_fast.model.layout import Layouts
from saliency_fast.ops import random_bits, segment_points

PARTIAL_MAPS = 16
"""Partial maps that a call with random points yields."""
Write = Callable[[Tensor, Tensor], Inputs]
Members = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(example [R], number [R]) -> (coalitions bool [M, F] of a launch, the one of each row [R])."""


@dataclass(frozen=True)
class Game:
    """The cooperative game whose players are a call's features. segments: each element's feature,
    int64 [B | 1, *].
    """

    context: RoundContext
    segments: Inputs
    count: int

    @staticmethod
    def of(context: RoundContext) -> Game:
        return Game(context, *features_of(context))

    @property
    def device(self) -> torch.device:
        return self.context.scores.device

    def writer(self, members: Members) -> Write:
        """Writes the points of the coalitions that `members` gives."""

        def write(example: Tensor, number: Tensor) -> Inputs:
            present, row = members(example, number)
            parts = zip(self.context.inputs, self.context.baselines, self.segments, strict=True)
            return tuple(
                segment_points(x, baseline, segment.view(len(segment), -1), present, example, row)
                for x, baseline, segment in parts
            )

        return write

    def table(self, present: Tensor) -> Round:
        """All coalitions of a table bool [1 | B, M, F], coalitions outermost."""
        flat, count = present.flatten(0, 1), present.shape[1]
        shift = count if len(present) > 1 else 0
        write = self.writer(lambda example, number: (flat, number + shift * example))
        return Round(write, *every_row(self.context, count))

    def table_scores(self, scores: Tensor) -> Tensor:
        """The scores of `table` as [B, K, M]."""
        batch = len(self.context.inputs[0])
        return scores.view(-1, batch, scores.shape[1]).permute(1, 2, 0)

    def random_words(self, seed: Seed, draws: Tensor, count: int, stream: int) -> Tensor:
        """Random words int64 [1 | B, N, count] of the draws int64 [N]."""
        own = own_seeds(seed, self.context)
        rows = own.repeat_interleave(len(draws)), draws.repeat(len(own))
        words: Tensor = random_bits(*rows, count, 0, stream)
        return words.view(len(own), len(draws), count)

    def elements(self) -> Tensor:
        """How many elements each feature has: float64 [B | 1, F]."""
        rows = max(len(one) for one in self.segments)
        counts = torch.zeros(rows, self.count, dtype=torch.float64, device=self.device)
        for one in self.segments:
            own = one.view(len(one), -1).expand(rows, -1)
            counts.scatter_add_(1, own, torch.ones_like(own, dtype=torch.float64))
        return counts

    def maps(self, values: Tensor, variance: Tensor | None, *, sums: bool) -> Maps:
        """Maps in which every element has the value [B, K, F] of its feature. variance [B, K, F]:
        of the values' sampling errors, for the map's error; sums: whether values add up to the
        gain. The values are an extra result where the call has features.
        """
        error = None
        if variance is not None:
            weight = self.elements()[:, None]
            norm = (weight * values.square()).sum(2).clamp_min(torch.finfo(torch.float64).tiny)
            error = ((weight * variance).sum(2) / norm).sqrt()
        batch, targets, _ = values.shape
        maps = []
        for x, segment in zip(self.context.inputs, self.segments, strict=True):
            own = segment.view(len(segment), 1, -1).expand(batch, targets, -1)
            # Scores of inputs that are whole numbers keep all their digits.
            dtype = x.dtype if x.is_floating_point() else torch.float64
            maps.append(values.gather(2, own).to(dtype).view(batch, targets, *x.shape[1:]))
        extras = {"features": values} if self.context.features else {}
        return Maps(tuple(maps), error, values.sum(2) if sums else None, extras)


def features_of(context: RoundContext) -> tuple[Inputs, int]:
    """The feature of each element, int64 [B | 1, *] per input, and how many features there are."""
    segments = context.features or numbered(None, context.inputs)
    return segments, feature_count(context.inputs, segments)


def feature_count(inputs: Inputs, features: Inputs, layouts: Layouts | None = None) -> int:
    if not features:
        return sum(x[:1].numel() for x in inputs)
    return 1 + max(int(one.max()) for one in features)


def own_seeds(seed: Seed, context: RoundContext) -> Tensor:
    """int64 [1] where examples share their draws, or [B]."""
    every = seeds(seed, context.inputs[0])
    return every[:1] if isinstance(seed, int) else every
