"""Sight: a layer's activations and the score's gradients there, place by place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_fast.engine.recipe import (
    Maps,
    Recipe,
    RoundContext,
    RoundResult,
    Rounds,
    RoundsRecipe,
)
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.methods.parts.canvas import Canvas

Each = Callable[[slice, RoundResult], None]


@dataclass(frozen=True)
class LayerSight:
    """What a layer gives and how the score depends on it, as `extras` "activations" and "gradients"
    [B, C, *s]; its values, the product summed over channels, are at the layer's places, too.

    layer, grid, special: as class activation maps have them.
    """

    layer: str = "auto"
    grid: tuple[int, ...] | None = None
    special: int | None = None
    name = "layer_sight"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checks.grid(self.grid))

    def recipe(self) -> Recipe:
        return RoundsRecipe(self.rounds, 1, at_input=True, layers=self.layer)

    def rounds(self, asked: RoundContext) -> Rounds:
        """One round, at the inputs."""
        if asked.scores.shape[1] > 1:
            raise InputError("target must be one per example: got several; take one of them")
        canvas = Canvas(asked, False, self.grid, self.special)
        seen: dict[str, list[Tensor]] = {"activations": [], "gradients": []}

        def each(rows: slice, found: RoundResult) -> None:
            (output, *_) = canvas.of_layers(found)
            seen["activations"].append(canvas.read(0, output).detach())
            seen["gradients"].append(canvas.read(0, found.grads[0][0]).detach())

        yield canvas.inputs_round(each, gradients=True)
        extras = {name: torch.cat(parts)[:, None] for name, parts in seen.items()}
        evidence = (extras["activations"] * extras["gradients"]).sum(2)
        return Maps((evidence,), extras=extras)
