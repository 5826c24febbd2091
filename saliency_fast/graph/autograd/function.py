"""The autograd function of calls whose backward pass is our own: it keeps what that is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Forward = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]
Backward = Callable[..., Tensor | tuple[Tensor | None, ...]]


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Forward, back: Backward, *inputs: Tensor) -> Tensor:
        y, kept = run(*inputs)
        ctx.save_for_backward(*kept)
        ctx.back = back
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = ctx.back(grad, *ctx.saved_tensors)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def differentiable(x: Tensor, run: Forward, back: Backward, *others: Tensor) -> Any:
    """`run(x, *others)` gives the result and the tensors that its backward pass keeps;
    `back(gradient, *kept)` gives the gradient with respect to x, or a tuple of all.
    """
    return _Lean.apply(run, back, x, *others)  # type: ignore[no-untyped-call]
