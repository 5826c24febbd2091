"""Piecewise linear activations that keep one bit per element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast import ops
from saliency_fast._torch_compat import NN
from saliency_fast.graph.gradients import differentiable, passes
from saliency_fast.graph.opinfo import lean
from saliency_fast.ops.masks import DTYPES, layout_of

SLOPE = 0.01
"""The default slope of leaky_relu."""


class _Ramp(torch.autograd.Function):
    """relu_mask: 0 < scale x + shift + residual < upper lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        # scale, shift, residual, slope, upper, and whether in place.
        *args, inplace = options
        if inplace and layout_of(x) is not None:
            y, mask = x, ops.relu_mask_(x, *args)
        else:
            y, mask = ops.relu_mask(x, *args)
        ctx.channels_last, ctx.slope = not y.is_contiguous(), args[3]
        if inplace:
            y = x if y is x else x.copy_(y)
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask, args[0])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask, scale = ctx.saved_tensors
        both = scale is not None and ctx.needs_input_grad[3]
        found, passed = ops.relu_mask_backward(
            grad, mask, scale, ctx.slope, "standard", both, ctx.channels_last
        )
        residual = (passed if both else found) if ctx.needs_input_grad[3] else None
        return found, None, None, residual, None, None, None


def ramp(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    slope: float = 0.0,
    upper: float = math.inf,
    inplace: bool = False,
) -> Any:
    """A rectifier of scale x + shift + residual; `inplace` writes into `x`."""
    if x.dtype not in DTYPES or x.dim() == 0:
        return NotImplemented
    if scale is shift is residual is None and not torch.is_grad_enabled():
        # Nothing is kept: PyTorch's own are as fast.
        if slope:
            return (NN.leaky_relu_ if inplace else NN.leaky_relu)(x, slope)
        if upper < math.inf:
            return torch.clamp(x, 0.0, upper, out=x if inplace else None)
        return torch.relu_(x) if inplace else torch.relu(x)
    return _Ramp.apply(x, scale, shift, residual, slope, upper, inplace)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Rectifier:
    """A call that `relu_mask` serves: its plain version, upper bound and slope below 0."""

    plain: Callable[..., Any]
    upper: float = math.inf
    leaky: bool = False
    inplace: bool = False

    def agrees(self) -> bool:
        """Whether PyTorch's gradient at 0 and at the upper end is that of `relu_mask`."""
        args, slope = ((0.25,), 0.25) if self.leaky else ((), 0.0)
        ends = (0.0, -0.0) if self.upper == math.inf else (0.0, -0.0, self.upper)
        return all(one is False for one in passes(self.plain, args, ends, slope))

    def __call__(self, input: Tensor, negative_slope: float = SLOPE) -> Any:
        slope = negative_slope if self.leaky else 0.0
        if not self.agrees():
            return NotImplemented
        return ramp(input, slope=slope, upper=self.upper, inplace=self.inplace)


RECTIFIERS: dict[Callable[..., Any], Rectifier] = {
    torch.relu: Rectifier(torch.relu),
    Tensor.relu: Rectifier(torch.relu),
    torch.relu_: Rectifier(torch.relu, inplace=True),
    Tensor.relu_: Rectifier(torch.relu, inplace=True),
    NN.relu6: Rectifier(NN.relu6, upper=6.0),
    NN.relu6_: Rectifier(NN.relu6, upper=6.0, inplace=True),
    NN.leaky_relu: Rectifier(NN.leaky_relu, leaky=True),
    NN.leaky_relu_: Rectifier(NN.leaky_relu, leaky=True, inplace=True),
}
for _call, _rectifier in RECTIFIERS.items():
    lean(_call)(_rectifier)


def _gate(x: Tensor, apply: Callable[[Tensor], Tensor], flags: Tensor, slope: Any = None) -> Any:
    """An activation whose gradient is 1 where `flags` are set and `slope` elsewhere."""
    if x.dtype not in DTYPES or not x.requires_grad:
        return NotImplemented
    flags = flags.contiguous() if layout_of(flags) is None else flags
    last = not flags.is_contiguous()

    def back(grad: Tensor, mask: Tensor, slope: Tensor | None) -> Any:
        found, _ = ops.relu_mask_backward(grad, mask, None, 0.0, "standard", False, last)
        # grad where the bit is set, slope * grad elsewhere.
        return found if slope is None else found + slope * (grad - found)

    return differentiable(x, lambda one: (apply(one), (ops.pack_mask(flags), slope)), back)


@lean(NN.hardtanh)
def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    low, high = passes(NN.hardtanh, (-1.0, 1.0), (-1.0, 1.0))
    return _clamped(input, min_val, max_val, low, high)


@lean(torch.clamp, Tensor.clamp)
def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Any:
    if isinstance(min, Tensor) or isinstance(max, Tensor) or (min is None and max is None):
        return NotImplemented
    asked = (None if min is None else -1.0, None if max is None else 1.0)
    low, high = passes(torch.clamp, asked, (-1.0, 1.0))
    return _clamped(input, min, max, low, high)


def _clamped(x: Tensor, least: Any, most: Any, low: bool | None, high: bool | None) -> Any:
    """low, high: whether the bounds themselves pass gradients, None where that is not known."""
    if low is None or high is None:
        return NotImplemented
    plain = x.detach()
    flags = torch.ones_like(plain, dtype=torch.bool) if least is None else _above(plain, least, low)
    if most is not None:
        flags &= plain <= most if high else plain < most
    return _gate(x, lambda one: torch.clamp(one, least, most), flags)


@lean(torch.threshold)
def _threshold(input: Tensor, threshold: float, value: float) -> Any:
    (at,) = passes(torch.threshold, (0.5, 0.5), (0.5,))
    if at is None:
        return NotImplemented
    flags = _above(input.detach(), threshold, at)
    return _gate(input, lambda x: torch.threshold(x, threshold, value), flags)


def _prelu_of_a_quarter(x: Tensor) -> Tensor:
    return torch.prelu(x, x.new_tensor([0.25]))


@lean(torch.prelu, Tensor.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Any:
    (at,) = passes(_prelu_of_a_quarter, (), (0.0,), 0.25)
    if weight.requires_grad or at is None:
        return NotImplemented
    wide = weight.view(-1, *(1,) * (input.dim() - 2)) if weight.numel() > 1 else weight.view(())
    return _gate(input, lambda x: torch.prelu(x, weight), _above(input.detach(), 0.0, at), wide)


def _above(x: Tensor, bound: float, itself: bool) -> Tensor:
    return x >= bound if itself else x > bound
