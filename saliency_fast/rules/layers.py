"""LRP of layers with weights: convolutions and linear layers, whose rule the composite chooses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.graph.intercept import lean_call
from saliency_fast.rules.intercept import Answer
from saliency_fast.rules.names import named
from saliency_fast.rules.relevance import Relevance, shared
from saliency_fast.rules.shares import Affine


def weighted(calls: Relevance, name: str, x: Tensor, layer: Affine) -> Any:
    """A layer by the rule of its kind."""
    rule = calls.rule_of(name, x)
    with torch.no_grad():
        y = layer.call(x, layer.weight, layer.bias)
    return shared(x, y, layer, rule, weighted=True)


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _convolution(
    names: tuple[str, ...],
    outputs: int,
    calls: Relevance,
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    given = named(names, args, kwargs)
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if _moves(weight) or _moves(bias):
        return NotImplemented

    def convolved(x: Tensor, weight: Any, bias: Any) -> Tensor:
        found: Tensor = lean_call(func, (x, weight, bias), given)
        return found

    # Weights of grouped transposed convolutions number the outputs of one group alone.
    merges = outputs == 0 or given.get("groups", 1) == 1
    layer = Affine(convolved, weight, bias, x.dim() - weight.dim() + 1, outputs if merges else None)
    return weighted(calls, func.__name__, x, layer)


def _linear(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(("input", "weight", "bias"), args, kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if _moves(weight) or _moves(bias):
        return NotImplemented
    return weighted(calls, "linear", x, Affine(functional.linear, weight, bias, x.dim() - 1, 0))


def product(
    calls: Relevance, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, left: bool = False
) -> Any:
    """X @ weight + bias, or weight @ x where `left`, with a parameter of the model."""
    if left:
        return weighted(calls, "linear", x, Affine(_by_left, weight, None, max(x.dim() - 2, 0)))
    outputs = 1 if weight.dim() == 2 else None
    return weighted(calls, "linear", x, Affine(_by_right, weight, bias, x.dim() - 1, outputs))


def _by_right(x: Tensor, weight: Any, bias: Any) -> Tensor:
    z = torch.matmul(x, weight)
    return z if bias is None else z + bias


def _by_left(x: Tensor, weight: Any, bias: Any) -> Tensor:
    return torch.matmul(weight, x)


_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")

TABLE: dict[str, Answer] = {
    "linear": _linear,
    **{f"conv{n}d": partial(_convolution, _NAMES, 0) for n in (1, 2, 3)},
    **{
        f"conv_transpose{n}d": partial(_convolution, (*_TRANSPOSED, "dilation"), 1)
        for n in (1, 2, 3)
    },
}
