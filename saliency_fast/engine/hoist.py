"""Hoist: a call's sums taken behind the model's affine prefix, and brought back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.recipe import Recipe
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.half import FLOAT32, arithmetic
from saliency_fast.graph.program import tensors_among
from saliency_fast.model.executors import RecordedExecutor
from saliency_fast.model.function import PointFunction

LEAST_POINTS = 4
"""Points per example from which two forwards and two transposes of the prefix pay."""


def hoistable(recipe: Recipe) -> bool:
    """Whether a recipe's sum may be taken behind a linear map, and is long enough to gain by it."""
    linear = recipe.reduction == "sum" and recipe.factor not in ("line", "path")
    linear = linear and recipe.rules is None and recipe.rounds is None
    return linear and recipe.count >= LEAST_POINTS


@dataclass(frozen=True)
class Hoist:
    """A prefix at work for a call. line: its points are written behind the prefix; else they go
    through it, and only its transpose is spared. rows: how many go through it at a time.
    """

    prefix: Prefix
    call: Call
    line: bool
    rows: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.prefix.shapes

    def lift(self, table: Inputs, item: Tensor | None = None) -> Inputs:
        """The places of every row of `table`: inputs [B, *], baselines [B | 1, *], or points of the
        examples `item` [R].
        """
        if item is None:
            # One baseline for all examples has a place for each where their stems differ.
            rows = self.call.batch if self.prefix.conditional else max(map(len, table))
            table = tuple(one.expand(rows, *one.shape[1:]) for one in table)
            item = torch.arange(rows, device=table[0].device) % self.call.batch
        parts = []
        for part in self._parts(item.numel()):
            extras = self._extras(item[part])
            with arithmetic(FLOAT32, item.device):
                parts.append(self.prefix.lift(tuple(one[part] for one in table), extras))
        return _joined(parts)

    def lower(self, sums: Inputs, among: Tensor | None = None) -> Inputs:
        """Sums of gradients [S, *] at the places, as they are at the inputs; S = B * K slots, or
        those of the examples `among` alone.
        """
        parts = []
        if among is None:
            among = torch.arange(self.call.batch, device=sums[0].device)
        each = max(1, len(sums[0]) // len(among))
        for part in self._parts(len(sums[0])):
            slot = torch.arange(part.start, part.stop, device=sums[0].device)
            rows, item = tuple(one[part] for one in sums), among[slot // each]
            with arithmetic(FLOAT32, sums[0].device):
                parts.append(self.prefix.lower(rows, self.call.inputs, self._extras(item)))
        return _joined(parts)

    def first(self) -> tuple[Inputs, list[Tensor]]:
        """The first example and its further arguments, as a launch of one row."""
        item = torch.zeros(1, dtype=torch.int64, device=self.call.device)
        return tuple(x[:1] for x in self.call.inputs), self._extras(item)

    def _parts(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.rows):
            yield slice(start, min(start + self.rows, count))

    def _extras(self, item: Tensor) -> list[Tensor]:
        function = PointFunction(
            RecordedExecutor(self.prefix.rest), self.call.targets, self.call.args, self.call.kwargs
        )
        return tensors_among(*function.rows(item))


def _joined(parts: list[Inputs]) -> Inputs:
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
