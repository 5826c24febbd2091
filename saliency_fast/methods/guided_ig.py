"""Guided Integrated Gradients: along a path that moves first where the gradient is small."""

from __future__ import annotations

from dataclasses import dataclass

from saliency_fast.engine.recipe import Maps, Recipe, Round, RoundContext, Rounds, RoundsRecipe
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.neighbours import unknown
from saliency_fast.methods.parts.walk import HELD, Walk


@dataclass(frozen=True)
class GuidedIG:
    """Integrated Gradients on a path that is chosen step by step (Kapishnikov, 2021).

    Each of the `steps` goes 1/steps of the L1 distance to the input: the `fraction` of features
    with the smallest gradients moves first, and no feature leaves the straight path by more than
    `max_dist` of its own way; 0 is the straight path, 1 leaves it free.
    """

    steps: int = 200
    fraction: float = 0.25
    max_dist: float = 0.02
    name = "guided_ig"

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 1)
        checks.share("fraction", self.fraction)
        checks.share("max_dist", self.max_dist)

    def recipe(self) -> Recipe:
        return RoundsRecipe(self._rounds, self.steps, baseline="one", held=HELD)

    def _rounds(self, asked: RoundContext) -> Rounds:
        walk = Walk(asked)
        for number in range(self.steps):
            # One after another: where a point lies follows from the gradient at the last one.
            yield Round(walk.write, walk.item, walk.place, gradients=True, each=walk.note)
            walk.step((number + 1) / self.steps, self.fraction, self.max_dist)
            yield Maps(walk.values, unknown(asked))
        return Maps(walk.values, unknown(asked))
