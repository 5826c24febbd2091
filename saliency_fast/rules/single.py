"""LRP of calls of one tensor: activations, sums and means, pools, normalisations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast.errors import ModelError
from saliency_fast.graph.autograd.norms import affine_of
from saliency_fast.graph.intercept import lean_call
from saliency_fast.rules.intercept import Answer
from saliency_fast.rules.names import (
    DROPOUTS,
    ELEMENTWISE,
    LINEAR,
    MAX_POOLS,
    named,
    only_input,
)
from saliency_fast.rules.relevance import Relevance, linear_in, parts, passed, shared
from saliency_fast.rules.shares import Affine, Epsilon


def _elementwise(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    if not only_input(args, kwargs):
        return NotImplemented
    x, bind = parts(args, kwargs)
    with torch.no_grad():
        y = bind(func)(x)
    return passed(x, y)


def _dropout(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    x, bind = parts(args, kwargs)
    with torch.no_grad():
        y = bind(func)(x)
    return passed(x, y, (y != 0) | (x == 0))


def _linear_call(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    if not only_input(args, kwargs):
        return NotImplemented
    x, bind = parts(args, kwargs)
    return linear_in(calls, x, bind(func))


class _Spread(torch.autograd.Function):
    """Variance: homogeneous of degree two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: tuple[Tensor], apply: Any, epsilon: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.apply, ctx.epsilon = apply, epsilon
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        layer = Affine(lambda x, *_: ctx.apply(x))
        return Epsilon(ctx.epsilon)(layer, x, relevance / 2), None, None, None


def _variance(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    x, bind = parts(args, kwargs)
    with torch.no_grad():
        y = bind(func)(x)
    return _Spread.apply(x, (y,), bind(func), calls.settings.epsilon)  # type: ignore[no-untyped-call]


def _max_pool(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    x, bind = parts(args, kwargs)
    if calls.settings.pools == "winner":
        return func(*args, **kwargs)
    with torch.no_grad():
        found = bind(func)(x)
    if isinstance(found, Tensor):
        return linear_in(calls, x, bind(func))
    _, index = found
    return linear_in(calls, x, lambda x: bind(func)(x)[0]), index


def _batch_norm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(_BATCH_NORM, args, kwargs)
    x, weight, bias, eps = (given[name] for name in ("input", "weight", "bias", "eps"))
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"] or mean is None:
        raise ModelError(
            "LRP needs batch normalisation with frozen statistics: got one with the batch's; call "
            "model.eval() and keep track_running_stats"
        )
    scale, shift = affine_of(weight, bias, mean, variance, eps)
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    with torch.no_grad():
        y = lean_call(func, args, kwargs)
    before: Any = x.grad_fn
    if calls.settings.norms == "merge" and calls.own is None and _mergeable(before, x):
        merged = before.layer.scaled(scale, shift)
        if merged is not None:
            return shared(before.saved_tensors[0], y, merged, before.rule, True)

    def normalised(x: Tensor, weight: Any, bias: Any) -> Tensor:
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)

    if weight is None:
        weight = torch.ones_like(mean)
    layer = Affine(normalised, weight, bias)
    return shared(x, y, layer, calls.own or calls.epsilon, calls.own is not None)


def _mergeable(before: Any, x: Tensor) -> bool:
    """Whether x is all that a layer with weights returned, with its channels on axis 1."""
    layer = getattr(before, "layer", None)
    if layer is None or not before.weighted or layer.outputs is None:
        return False
    return bool(layer.channels == 1 or x.dim() == 2)


def _instance_norm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(_BATCH_NORM, args, kwargs)
    own = given.pop("use_input_stats", given["training"])
    if not own:
        return _batch_norm(calls, torch.batch_norm, (), given | {"training": False})
    return _standardised(calls, func, args, kwargs, given, given["input"].flatten(2), 1)


def _layer_norm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    x, shape = given["input"], given["normalized_shape"]
    groups = x.reshape(*x.shape[: x.dim() - len(shape)], -1)
    return _standardised(calls, func, args, kwargs, given, groups, None)


def _group_norm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    groups = given["input"].reshape(len(given["input"]), given["num_groups"], -1)
    return _standardised(calls, func, args, kwargs, given, groups, 1)


def _standardised(
    calls: Relevance,
    func: Any,
    args: Any,
    kwargs: Any,
    given: Mapping[str, Any],
    groups: Tensor,
    channels: int | None,
) -> Any:
    """Normalisation of the last axis of `groups`: with its deviation taken as a constant it is
    affine, and shared by the epsilon rule (Achtibat, 2024). channels: the axis of its weights.
    """
    x, shape = given["input"], groups.shape
    weight, bias = given.get("weight"), given.get("bias")
    with torch.no_grad():
        y = func(*args, **kwargs)
        variance = groups.var(-1, unbiased=False, keepdim=True)
        rate = torch.rsqrt(variance + given.get("eps", 1e-5))
    if channels is not None:
        wide = (-1, *(1,) * (x.dim() - 2))
        weight, bias = (one if one is None else one.view(wide) for one in (weight, bias))

    def affine(x: Tensor, *_: Any) -> Tensor:
        parts = x.reshape(shape)
        z = ((parts - parts.mean(-1, keepdim=True)) * rate).reshape(x.shape)
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    return shared(x, y, Affine(affine), calls.epsilon)


_BATCH_NORM = (
    *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "cudnn_enabled",
)
TABLE: dict[str, Answer] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), _elementwise),
    **dict.fromkeys(LINEAR, _linear_call),
    **dict.fromkeys(DROPOUTS, _dropout),
    **dict.fromkeys(MAX_POOLS, _max_pool),
    "var": _variance,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}
