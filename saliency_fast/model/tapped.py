"""The model as a function from points to scores and gradients at taps inside of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.graph.gradients import gradients
from saliency_fast.model.failures import BACKWARD, FORWARD
from saliency_fast.model.function import PointFunction
from saliency_fast.model.layers import Taps


@dataclass
class TappedFunction(PointFunction):
    """A point function whose gradients are those at the taps; without `backward` it takes none, and
    tells what the tapped tensors are.
    """

    taps: Taps | None = None
    backward: bool = True

    @classmethod
    def of(cls, function: PointFunction, taps: Taps, *, backward: bool = True) -> TappedFunction:
        """`function` with taps."""
        given = {one.name: getattr(function, one.name) for one in fields(function)}
        return cls(**given, taps=taps, backward=backward)

    def _one(self, item: Tensor, rows: Inputs) -> Any:
        """What the model returns for one row of the first example's."""
        with self.failing(FORWARD, item[:1]):
            return self.route(list(rows), *self.rows(item[:1]))

    def _gradients(
        self, points: Inputs, item: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Inputs]]:
        """Scores, classes, and in the list the activations first, then each target's gradients."""
        taps = self.taps
        assert taps is not None
        taps.look(partial(self._one, item), tuple(one[:1] for one in self.taken(points)))
        given, tapped = list(self.taken(points)), list[Tensor]()
        forward = partial(self.route, given, *self.rows(item))

        def call() -> Any:
            raw, found = taps.run(forward)
            tapped.extend(found)
            return raw

        with torch.set_grad_enabled(self.backward):
            scores, classes = self.read(self.called(call, given, item), item)
        if not self.backward:
            return scores, classes, [tuple(one.detach() for one in tapped)]
        last, several = scores.shape[1] - 1, []
        for k in range(scores.shape[1]):
            found: tuple[Tensor | None, ...] = (None,) * len(tapped)
            if scores.requires_grad:
                with self.failing(BACKWARD, item):
                    total = scores[:, k].sum()
                    found = gradients(total, tapped, retain_graph=k < last, allow_unused=True)
            several.append(found)
        taps.need([any(one is not None for one in own) for own in zip(*several, strict=True)])
        grads = []
        for found in several:
            pairs = zip(found, tapped, strict=True)
            grads.append(tuple(torch.zeros_like(t) if g is None else g for g, t in pairs))
        return scores.detach(), classes, [tuple(one.detach() for one in tapped), *grads]
