"""Rules of the rectifier max(0, x) under its names; leaky and bounded ones keep their gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast import ops
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import InputError
from saliency_fast.graph.gradients import differentiable
from saliency_fast.ops.masks import DTYPES
from saliency_fast.rules.intercept import OperatorRule, Rules, RulesMode, split

_WARNING = (
    "the model has no ReLU that {} could change: these are plain gradients (leaky, bounded and "
    "smooth activations keep their gradient); fused layers such as nn.RNN hide theirs"
)
_LINEAR_FROM = 40.0
"""beta * x from which softplus is x to the last digit of a float64; exp of it fits a float32."""


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _bounded(args: Args, kwargs: Kwargs) -> bool:
    """Whether clamp(x, min, max) is max(0, x)."""
    low, high = (*args[1:], None, None)[:2]
    return _is_zero(kwargs.get("min", low)) and kwargs.get("max", high) is None


def _threshold(args: Args, kwargs: Kwargs) -> bool:
    level, value = (*args[1:], None, None)[:2]
    return _is_zero(kwargs.get("threshold", level)) and _is_zero(kwargs.get("value", value))


_IS_RECTIFIER: dict[str, Callable[[Args, Kwargs], bool]] = {
    "relu": lambda args, kwargs: True,
    "clamp": _bounded,
    "clip": _bounded,
    "clamp_min": _bounded,
    "threshold": _threshold,
}


def _table(apply: Callable[[Tensor], Tensor]) -> dict[str, OperatorRule]:
    """`apply` for rectifiers under all their names."""

    def answer(mode: RulesMode, func: Any, args: Any, kwargs: Any, is_rectifier: Any) -> Any:
        x, _ = split(func, args, kwargs)
        if not is_rectifier(args, kwargs) or x.dtype not in DTYPES:
            return NotImplemented
        return apply(x)

    return {name: partial(answer, is_rectifier=check) for name, check in _IS_RECTIFIER.items()}


def _masked(x: Tensor, rule: str) -> Tensor:
    """ReLU with a backward rule of the op `relu_mask_backward`, which saves one bit per element."""
    if x.dim() == 0:
        return _masked(x.view(1), rule).view(())
    with torch.no_grad():
        y, mask = ops.relu_mask(x, None, None, None, 0.0, torch.inf)
    options = (None, 0.0, rule, False, not y.is_contiguous())
    result: Tensor = differentiable(
        x,
        lambda _: (y, (mask,)),
        lambda grad, mask: ops.relu_mask_backward(grad, mask, *options)[0],
    )
    return result


_GUIDED = _table(partial(_masked, rule="guided"))
_DECONV = _table(partial(_masked, rule="deconv"))


@dataclass(frozen=True)
class Guided(Rules):
    """ReLU passes back positive values where its input was positive (Springenberg, 2015)."""

    name: ClassVar[str] = "guided backpropagation"
    warning: ClassVar[str] = _WARNING.format(name)

    def mode(self, model: Function | None = None) -> RulesMode:
        return RulesMode(self.name, _GUIDED)


@dataclass(frozen=True)
class Deconv(Rules):
    """ReLU passes back positive values, whatever its input was (Zeiler and Fergus, 2014)."""

    name: ClassVar[str] = "deconvolution"
    warning: ClassVar[str] = _WARNING.format(name)

    def mode(self, model: Function | None = None) -> RulesMode:
        return RulesMode(self.name, _DECONV)


@dataclass(frozen=True)
class Softplus(Rules):
    """ReLU becomes softplus log(1 + exp(beta x)) / beta, which is smooth (Janizek, 2021)."""

    beta: float = 10.0
    name: ClassVar[str] = "softplus"

    def __post_init__(self) -> None:
        if not 0 < self.beta < torch.inf:
            raise InputError(f"beta must be a positive finite number: got {self.beta}")

    def mode(self, model: Function | None = None) -> RulesMode:
        table = _table(lambda x: functional.softplus(x, self.beta, _LINEAR_FROM))
        return _Smooth(self.name, table)


class _Smooth(RulesMode):
    """Rules that hold without gradients too, by autograd's own operators, twice differentiable."""

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if torch.is_grad_enabled():
            return super().call(func, args, kwargs)
        return self.answer(func, args, kwargs)

    def keeps(self, name: str) -> bool:
        return True

    def other(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        return func(*args, **kwargs)
