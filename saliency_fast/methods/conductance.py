"""Conductance: what flows through the units of a layer on the way from the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.layers import need_batch_first
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.neighbours import Neighbours, maps_of, totals_like, unknown
from saliency_fast.methods.parts.quadrature import RULES
from saliency_fast.model.guard import same_draws
from saliency_fast.model.layers import LayerTaps


@dataclass(frozen=True)
class Conductance:
    """Integral of the gradient at a layer times the layer's change on the straight path in the
    input (Dhamdhere, 2018): a sum over steps of the gradient where each begins times what changes.

    The call's `at` names the layer; the last spatial one unless given. rule: where its `steps` + 1
    points lie; "trapezoid" reaches both ends.
    """

    steps: int = 50
    rule: str = "trapezoid"
    name = "conductance"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.choice("rule", self.rule, tuple(RULES))

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one", layers="auto")

    def _rounds(self, asked: RoundContext) -> Rounds:
        if len(asked.layers) > 1:
            raise InputError(
                f"conductance is about one layer: got {len(asked.layers)}; call once for each, "
                "since every layer's values sum to the whole gain"
            )
        maps, totals = asked.scores.shape[1], list[Inputs]()
        path = Neighbours(asked, sorted(RULES[self.rule].points(self.steps + 1)[0].tolist()))

        def each(rows: slice, found: RoundResult) -> None:
            need_batch_first(found.taps, rows.stop - rows.start)
            totals[:] = totals or [totals_like(found.taps, asked.scores.numel())]
            for item, weight, here, there in path.pairs(rows, found):
                changes = [b - a for a, b in zip(here.taps, there.taps, strict=True)]
                for k, grads in enumerate(here.grads):
                    for total, gradient, change in zip(totals[0], grads, changes, strict=True):
                        slot = item * maps + k
                        ops.accumulate(total, gradient * change, slot, weight, "sum")

        taps = _BatchFirst(asked.layers, asked.layer_input)
        yield Round(path.write, path.item, path.place, taps=taps, each=each)
        return Maps(maps_of(totals[0], maps), unknown(asked))


@dataclass(frozen=True)
class _BatchFirst(LayerTaps):
    """Taps at layers whose tensors have the batch on their first axis, as is found out once."""

    _looked: list[bool] = field(default_factory=list, compare=False)

    def look(self, run: Callable[[Inputs], Any], rows: Inputs) -> None:
        """Raises InputError where one row alone shows another axis in front: a launch may have as
        many rows as there are steps.
        """
        if self._looked:
            return
        with torch.no_grad(), same_draws(lambda: True, rows[0].device):
            _, found = self.run(lambda: run(tuple(one.clone() for one in rows)))
        need_batch_first(found, 1)
        self._looked.append(True)
