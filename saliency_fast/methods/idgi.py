"""Important-direction gradient integration: each step's gain, shared out by squared gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saliency_fast import ops
from saliency_fast.engine.accumulate import square_norm
from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    Round,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.neighbours import Neighbours, maps_of, totals_like, unknown


@dataclass(frozen=True)
class IDGI:
    """Sum over steps on the straight path of g^2 (f' - f) / <g, g>: gradient g and score f where a
    step begins, f' where it ends (Yang, 2023).

    The values meet the score's gain whatever the steps, unless a gradient vanishes; they have its
    sign everywhere where the score rises, or falls, all along the path.
    """

    steps: int = 50
    name = "idgi"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps + 1, baseline="one")

    def _rounds(self, asked: RoundContext) -> Rounds:
        maps = asked.scores.shape[1]
        totals = totals_like(asked.inputs, asked.scores.numel())
        path = Neighbours(asked, [step / self.steps for step in range(self.steps + 1)])

        def each(rows: slice, found: RoundResult) -> None:
            for item, weight, here, there in path.pairs(rows, found):
                gain = (there.scores - here.scores) * weight[:, None]
                for k, grads in enumerate(here.grads):
                    norm = torch.stack([square_norm(one) for one in grads]).sum(0)
                    share = torch.where(norm > 0, gain[:, k] / norm, 0.0)
                    for total, gradient in zip(totals, grads, strict=True):
                        ops.accumulate(total, gradient, item * maps + k, share, "square")

        yield Round(path.write, path.item, path.place, gradients=True, each=each)
        return Maps(maps_of(totals, maps), unknown(asked))
