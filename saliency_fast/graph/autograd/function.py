"""The autograd function that lean versions share: it keeps what its backward pass is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Forward = Callable[[Tensor], tuple[Tensor, Sequence[Tensor | None]]]
Backward = Callable[..., Tensor]


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Forward, back: Backward) -> Tensor:
        y, kept = run(x)
        ctx.save_for_backward(*kept)
        ctx.back = back
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad, *ctx.saved_tensors), None, None


def differentiable(x: Tensor, run: Forward, back: Backward) -> Any:
    """`run(x)` gives the result and the tensors that its backward pass keeps; `back(gradient,
    *kept)` gives the gradient with respect to x.
    """
    return _Lean.apply(x, run, back)  # type: ignore[no-untyped-call]
