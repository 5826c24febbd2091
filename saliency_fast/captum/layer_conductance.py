"""LayerConductance: a layer's changes on the line from a baseline, times the gradients there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.captum.apart import calls_of
from saliency_fast.captum.contract import (
    as_args,
    as_baselines,
    as_target,
    as_tuple,
    check_baselines,
    filled,
    floating,
    public,
)
from saliency_fast.captum.inside import Inside
from saliency_fast.captum.integrated_gradients import RULES, check_steps
from saliency_fast.captum.layer import LayerGradientAttribution
from saliency_fast.captum.noise import samples_at_once
from saliency_fast.captum.run import _repeated


class LayerConductance(LayerGradientAttribution):
    """The gradient at a layer where each of n_steps begins times what changes (Dhamdhere, 2018)."""

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Like the layer's tensors, and the delta of each example [B] where it is asked for.

        internal_batch_size: at most so many points at once; without it chunks are of bounded
        memory.
        """
        parts = floating(as_tuple(inputs))
        given = as_baselines(baselines, parts)
        check_baselines(parts, given)
        check_steps(n_steps, method)
        starts, further = filled(parts, given), as_args(additional_forward_args)
        inside = Inside.of(self, attribute_to_layer_input)
        alphas = RULES[method].points(n_steps + 1)[0].tolist()
        batch = len(parts[0])
        pairs = list(zip(parts, starts, strict=True))
        at_once = samples_at_once(parts, n_steps + 1)
        if internal_batch_size is not None:
            at_once = internal_batch_size // batch
        shared = calls_of(self.forward_func, further, *inside.layers)

        def at(chunk: list[float]) -> tuple[Inputs, Inputs]:
            """The layer's values and the gradients there at points of the path, step-major."""
            rows = tuple(torch.cat([s + alpha * (x - s) for alpha in chunk]) for x, s in pairs)
            own = tuple(_repeated(one, len(chunk)) for one in further)
            wanted = _repeated(as_target(target), len(chunk))
            values, gradients = inside.gradients(rows, wanted, own, grad_kwargs)
            return values[0], gradients[0]

        def meet(chunk: list[float]) -> bool:
            points = (torch.stack([s + alpha * (x - s) for alpha in chunk]) for x, s in pairs)
            return shared.meet(tuple(points))

        # Chunks share a point: each change is between two of one chunk.
        step = max(1, at_once - 1)
        chunks = [alphas[first : first + step + 1] for first in range(0, n_steps, step)]
        apart, total = any(map(meet, chunks)), list[Tensor]()
        for chunk in chunks:
            if apart:
                several = [at([alpha]) for alpha in chunk]
                values, gradients = (
                    tuple(torch.cat(one) for one in zip(*side, strict=True))
                    for side in zip(*several, strict=True)
                )
            else:
                values, gradients = at(chunk)
            found = [_sum(*pair, batch) for pair in zip(values, gradients, strict=True)]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        maps: Inputs = tuple(total)
        formatted = inside.like_layers([maps])
        if not return_convergence_delta:
            return formatted
        delta = self.compute_convergence_delta(maps, starts, parts, target, further or None)
        return formatted, delta

    def has_convergence_delta(self) -> bool:
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


def _sum(values: Tensor, gradients: Tensor, batch: int) -> Tensor:
    """The sum over steps of rows that are step-major."""
    changes = (values[batch:] - values[:-batch]) * gradients[:-batch]
    return changes.view(-1, batch, *values.shape[1:]).sum(0)
