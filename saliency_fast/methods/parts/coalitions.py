"""Coalitions: points that keep some features of an example, the others are its baseline's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.features import numbered
from saliency_fast.engine.points import Seed, seeds
from saliency_fast.engine.recipe import Maps, Round, RoundContext
from saliency_fast.model.axes import Layouts
from saliency_fast.ops import segment_points

Write = Callable[[Tensor, Tensor], Inputs]
Members = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(item [R], place [R]) -> (bool [M, F], row [R]): the coalitions of a launch, each row's own."""


@dataclass(frozen=True)
class Game:
    """The features of a call as players. segments: int64 [B | 1, *] per input."""

    asked: RoundContext
    segments: Inputs
    count: int

    @staticmethod
    def of(asked: RoundContext) -> Game:
        segments = asked.features or numbered(None, asked.inputs)
        return Game(asked, segments, players(asked.inputs, segments))

    @property
    def device(self) -> torch.device:
        return self.asked.scores.device

    def writer(self, members: Members) -> Write:
        """Writes the points whose coalitions `members` tells."""

        def write(item: Tensor, place: Tensor) -> Inputs:
            present, row = members(item, place)
            parts = zip(self.asked.inputs, self.asked.baselines, self.segments, strict=True)
            return tuple(
                segment_points(x, fill, segment.view(len(segment), -1), present, item, row)
                for x, fill, segment in parts
            )

        return write

    def table(self, present: Tensor) -> Round:
        """All coalitions of a table bool [1 | B, M, F], coalitions outermost, examples within."""
        batch, (groups, coalitions, _) = len(self.asked.inputs[0]), present.shape
        flat = present.flatten(0, 1)
        # With one table for all, every example finds its coalitions in it.
        shift = coalitions if groups > 1 else 0
        item = torch.arange(batch, device=self.device).repeat(coalitions)
        place = torch.arange(coalitions, device=self.device).repeat_interleave(batch)
        return Round(self.writer(lambda item, place: (flat, place + shift * item)), item, place)

    def answers(self, scores: Tensor) -> Tensor:
        """The scores of `table` as [B, K, M]."""
        batch = len(self.asked.inputs[0])
        return scores.view(-1, batch, scores.shape[1]).permute(1, 2, 0)

    def gain(self) -> Tensor:
        """What all features together are worth, [B, K]."""
        assert self.asked.baseline_scores is not None
        return self.asked.scores - self.asked.baseline_scores

    def elements(self) -> Tensor:
        """How many elements each feature has: float64 [B | 1, F]."""
        rows = max(len(one) for one in self.segments)
        found = torch.zeros(rows, self.count, dtype=torch.float64, device=self.device)
        for one in self.segments:
            own = one.view(len(one), -1).expand(rows, -1)
            found.scatter_add_(1, own, torch.ones_like(own, dtype=torch.float64))
        return found

    def maps(self, values: Tensor, variance: Tensor | None, *, sums: bool) -> Maps:
        """Maps from values [B, K, F], every element with its feature's; variance of the values'
        sampling errors [B, K, F]; sums: whether they add up to the gain. Where the call has
        features, their values are an extra result.
        """
        total = values.sum(2) if sums else None
        extras = {"features": values} if self.asked.features else {}
        return Maps(self.spread(values), self._error(values, variance), total, extras)

    def spread(self, values: Tensor) -> Inputs:
        """Every element with its feature's value, per input [B, K, *]."""
        batch, targets, _ = values.shape
        found = []
        for x, segment in zip(self.asked.inputs, self.segments, strict=True):
            own = segment.view(len(segment), 1, -1).expand(batch, targets, -1)
            # Scores of inputs that are whole numbers keep all their digits.
            kind = x.dtype if x.is_floating_point() else torch.float64
            found.append(values.gather(2, own).to(kind).view(batch, targets, *x.shape[1:]))
        return tuple(found)

    def _error(self, values: Tensor, variance: Tensor | None) -> Tensor | None:
        """Relative L2 over the elements of the map."""
        if variance is None:
            return None
        weight = self.elements()[:, None]
        norm = (weight * values.square()).sum(2).clamp_min(torch.finfo(torch.float64).tiny)
        return ((weight * variance).sum(2) / norm).sqrt()


def players(inputs: Inputs, features: Inputs, layouts: Layouts | None = None) -> int:
    """How many features a call has."""
    if not features:
        return sum(x[:1].numel() for x in inputs)
    return 1 + max(int(one.max()) for one in features)


def own_seeds(seed: Seed, asked: RoundContext) -> Tensor:
    """int64 [1] where examples share their draws, or [B]."""
    found = seeds(seed, asked.inputs[0])
    return found[:1] if isinstance(seed, int) else found
