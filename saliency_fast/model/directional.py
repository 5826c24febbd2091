"""Directional: second derivatives, as gradients of numbers that are linear in the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from saliency_fast._types import Inputs
from saliency_fast.errors import ModelError
from saliency_fast.graph.gradients import gradients
from saliency_fast.graph.intercept import Calls
from saliency_fast.model.failures import BACKWARD
from saliency_fast.model.function import NO_GRADIENT, PointFunction, entered

Project = Callable[[Inputs, Tensor], Tensor]
"""From gradients per input [R, *] of the examples int64 [R] to M numbers [R, M], linear in them."""


def summed(grads: Inputs, item: Tensor) -> Tensor:
    """The simplest of such maps: the sum of all, as one number."""
    return torch.stack([one.flatten(1).sum(1) for one in grads]).sum(0)[:, None]


class _Twice(Calls):
    """Calls whose fast kernels can be differentiated only once, by those that can twice."""

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is torch._C._nn.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`scaled_dot_product_attention` by products and a softmax."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(()).masked_fill(~attn_mask, -torch.inf)
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, *args, **kwargs)[0]


@dataclass
class Directional(PointFunction):
    """A point function that tells second derivatives: for each of K targets, in the place of its
    gradients, (p(g), p(H p'), the gradient g per input, the sum of H p' over its columns per input)
    with the linear map `project` p, its transpose p' and the Hessian H: [R, M], [R, M, M], [R, *].
    """

    project: Project | None = None

    @classmethod
    def of(cls, function: PointFunction, project: Project) -> Directional:
        """`function`, which must go through the model as autograd sees it."""
        given = {one.name: getattr(function, one.name) for one in fields(function)}
        return cls(**given, project=project)

    def _gradients(
        self, points: Inputs, item: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Inputs]]:
        points = self.taken(points)
        like = [torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape) for p in points]
        inside, edges = entered(points)
        del points
        with _Twice():
            scores, classes = self.forward(inside, item)
        if not scores.requires_grad:
            raise ModelError(NO_GRADIENT)
        with self.failing(BACKWARD, item):
            try:
                found = [self._twice(one, edges, like, item) for one in scores.unbind(1)]
            except RuntimeError as error:
                if "is not implemented" not in str(error) and "double backward" not in str(error):
                    raise
                raise ModelError(
                    f"the model has a call without a second derivative: {error}; use another layer "
                    "in its place, or a method of first derivatives"
                ) from error
        return scores.detach(), classes, found

    def _twice(
        self, score: Tensor, edges: list[GradientEdge], like: list[Tensor], item: Tensor
    ) -> Inputs:
        assert self.project is not None
        gradient = _gradient(score, edges, like, again=True)
        first = self.project(gradient, item)
        count = first.shape[1]
        sums = [torch.zeros_like(one) for one in gradient]
        second = first.new_zeros((len(first), count, count))
        # A model that is linear in its inputs has a gradient that depends on nothing.
        for m in range(count) if first.requires_grad else ():
            products = _gradient(first[:, m], edges, like, again=False)
            second[:, m] = self.project(products, item)
            for total, product in zip(sums, products, strict=True):
                total += product
        return first.detach(), second, *(one.detach() for one in gradient), *sums


def _gradient(
    numbers: Tensor, edges: list[GradientEdge], like: list[Tensor], *, again: bool
) -> Inputs:
    """Gradients of numbers [R], each of its own row; again: to be differentiated once more."""
    found = gradients(
        numbers,
        edges,
        torch.ones_like(numbers),
        retain_graph=True,
        create_graph=again,
        allow_unused=True,
    )
    pairs = zip(found, like, strict=True)
    return tuple(one.new_zeros(one.shape) if grad is None else grad for grad, one in pairs)
