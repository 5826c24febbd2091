"""The model as a function from points to scores and input gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from saliency_fast.errors import ModelError
from saliency_fast.model.targets import Targets

Inputs = tuple[Tensor, ...]


class _Enter(torch.autograd.Function):
    """Makes plain points differentiable without a copy, so that a model may work in place."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(points)
        return points

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


@dataclass
class PointFunction:
    """`model` with its further arguments and targets, on rows of a launch.

    Further arguments that are tensors with the batch's length on their first axis belong to the
    examples and follow them into the rows; all others are passed as they are.
    """

    model: Callable[..., Any]
    targets: Targets
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    _checked: bool = False

    def scores(self, points: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [R, K] without gradients, and the classes [R, K] they belong to."""
        with torch.no_grad():
            return self._forward(points, item)

    def gradients(self, points: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None, list[Inputs]]:
        """Scores [R, K], classes [R, K], and for each of K targets the gradients of the points.

        One forward pass serves all targets; each has its own backward pass. The points are handed
        over: the model may overwrite them.
        """
        anchor = torch.zeros((), requires_grad=True)
        entered = tuple(_Enter.apply(one, anchor) for one in points)  # type: ignore[no-untyped-call]
        edges = [get_gradient_edge(one) for one in entered]
        scores, classes = self._forward(entered, item)
        del entered
        if not scores.requires_grad:
            raise ModelError(
                "the model is not differentiable in its input: its output carries no gradient; "
                "look for detach(), no_grad(), .item(), NumPy or integer steps inside it"
            )
        last = scores.shape[1] - 1
        found = [
            torch.autograd.grad(scores[:, k].sum(), edges, retain_graph=k < last, allow_unused=True)
            for k in range(scores.shape[1])
        ]
        return scores.detach(), classes, _complete(found, points, edges)

    def _forward(self, points: Inputs, item: Tensor) -> tuple[Tensor, Tensor | None]:
        args = [self._rows(value, item) for value in self.args]
        kwargs = {name: self._rows(value, item) for name, value in self.kwargs.items()}
        raw = self.model(*points, *args, **kwargs)
        if not self._checked:
            self.targets.check(raw)
            self._checked = True
        return self.targets.read(raw, item)

    def _rows(self, value: Any, item: Tensor) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == self.targets.batch:
            return value[item]
        return value


def _complete(
    found: Sequence[tuple[Tensor | None, ...]], points: Inputs, edges: list[GradientEdge]
) -> list[Inputs]:
    """Zeros where one target does not see an input; an input that none sees is an error."""
    for number in range(len(edges)):
        if all(grads[number] is None for grads in found):
            raise ModelError(
                f"the model is not differentiable in input {number}: the target does not depend on "
                "it; pass what needs no attribution through forward_args"
            )
    return [
        tuple(
            torch.zeros_like(point) if grad is None else grad.contiguous()
            for grad, point in zip(grads, points, strict=True)
        )
        for grads in found
    ]
