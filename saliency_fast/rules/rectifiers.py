"""Rules of the rectifier max(0, x): guided backpropagation, deconvolution, softplus.

They hold for a rectifier under each of its names (modules, functions, methods, in place,
clamp(min=0), threshold(0, 0)) and for nothing else: the papers define them for ReLU, and the
two sides of a leaky or bounded one mean something else. Those keep their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from saliency_fast import ops
from saliency_fast.errors import InputError
from saliency_fast.ops.masks import DTYPES
from saliency_fast.rules.intercept import Ruling

_UNMET = (
    "the model has no ReLU that {} could change: these are plain gradients (leaky, bounded and "
    "smooth activations keep their gradient); fused layers such as nn.RNN hide theirs"
)


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: str) -> Tensor:
        y: Tensor
        y, mask = ops.relu_mask(x, None, None, None, 0.0, torch.inf)
        ctx.channels_last, ctx.rule = not y.is_contiguous(), rule
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return ops.relu_mask_backward(grad, mask, None, 0.0, ctx.rule, False, ctx.channels_last)[
            0
        ], None


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _bounded(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether clamp(x, min, max) is max(0, x)."""
    low, high = (*args[1:], None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return _is_zero(low) and high is None


def _threshold(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    level, value = (*args[1:], None, None)[:2]
    return _is_zero(kwargs.get("threshold", level)) and _is_zero(kwargs.get("value", value))


_IS_RECTIFIER: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any]], bool]] = {
    "relu": lambda args, kwargs: True,
    "clamp": _bounded,
    "clip": _bounded,
    "clamp_min": _bounded,
    "threshold": _threshold,
}


def _table(apply: Callable[[Tensor], Any]) -> dict[str, Callable[..., Any]]:
    """`apply` for rectifiers under all their names."""

    def answer(
        is_rectifier: Callable[..., bool], _: Ruling, func: Any, args: Any, kwargs: Any
    ) -> Any:
        x = args[0] if args else kwargs["input"]
        if not is_rectifier(args, kwargs) or x.dtype not in DTYPES:
            return NotImplemented
        return apply(x)

    return {name: partial(answer, check) for name, check in _IS_RECTIFIER.items()}


def _masked(x: Tensor, rule: str) -> Any:
    if x.dim() == 0:
        return _masked(x.view(1), rule).view(())
    return _Rectified.apply(x, rule)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Guided:
    """ReLU hands back what is positive, where its input was (Springenberg, 2015)."""

    name: ClassVar[str] = "guided backpropagation"
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = False
    unmet: ClassVar[str] = _UNMET.format("guided backpropagation")

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        return Ruling(self.name, _GUIDED)


@dataclass(frozen=True)
class Deconv:
    """ReLU hands back what is positive, whatever its input was (Zeiler and Fergus, 2014)."""

    name: ClassVar[str] = "deconvolution"
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = False
    unmet: ClassVar[str] = _UNMET.format("deconvolution")

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        return Ruling(self.name, _DECONV)


_GUIDED = _table(partial(_masked, rule="guided"))
_DECONV = _table(partial(_masked, rule="deconv"))
_LINEAR_FROM = 40.0
"""beta * x from which softplus is x to the last digit of a float64; exp of it fits a float32."""


@dataclass(frozen=True)
class Softplus:
    """ReLU becomes softplus log(1 + exp(beta x)) / beta, forward and backward (Janizek, 2021).

    For second derivatives, which ReLU has none of. Gradients can be differentiated again; scores
    are those of the smooth model.
    """

    beta: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < torch.inf:
            raise InputError(f"beta must be a positive finite number: got {self.beta}")

    name: ClassVar[str] = "softplus"
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = False
    unmet: ClassVar[str] = ""

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        table = _table(lambda x: functional.softplus(x, self.beta, _LINEAR_FROM))
        return _Smooth(self.name, table)


class _Smooth(Ruling):
    """A model that is smooth also where nothing is differentiated.

    Lean versions can be differentiated but once; autograd's own answer here.
    """

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if torch.is_grad_enabled():
            return super().call(func, args, kwargs)
        return self.answer(func, args, kwargs)

    def keeps(self, name: str) -> bool:
        return True

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return func(*args, **kwargs)


__all__ = ["Deconv", "Guided", "Softplus"]
