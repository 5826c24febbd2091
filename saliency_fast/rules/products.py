"""LRP of calls of two tensors: sums by their shares, products by halves, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast.rules.intercept import Answer
from saliency_fast.rules.layers import product
from saliency_fast.rules.names import named
from saliency_fast.rules.relevance import Relevance, is_first, linear_in, passed
from saliency_fast.rules.shares import ratio


class _Sum(torch.autograd.Function):
    """a + factor * b: relevance in proportion to the summands (Bach, 2015)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, factor: float, epsilon: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.factor, ctx.epsilon = factor, epsilon
        return torch.add(a, b, alpha=factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        a, b = ctx.saved_tensors
        rate = ratio(relevance, torch.add(a, b, alpha=ctx.factor), ctx.epsilon)
        found = [None, None]
        for number, term in enumerate((a, b * ctx.factor)):
            if ctx.needs_input_grad[number]:
                found[number] = (term * rate).sum_to_size(term.shape)
        return *found, None, None


class _Halves(torch.autograd.Function):
    """a * b of two tensors that depend on the points: each gets half (Achtibat, 2024)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.shapes = a.shape, b.shape
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        half = relevance / 2
        return tuple(half.sum_to_size(shape) for shape in ctx.shapes)


class _Bilinear(torch.autograd.Function):
    """A sum of products of elements of a and b, shared among the products, which halve theirs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, call: Any, epsilon: float) -> Any:
        ctx.save_for_backward(a, b)
        ctx.call, ctx.epsilon = call, epsilon
        return call(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [one.detach().requires_grad_() for one in saved]
            z = ctx.call(*leaves)
        rate = ratio(relevance / 2, z.detach(), ctx.epsilon)
        grads = torch.autograd.grad(z, leaves, rate)
        return *(one * grad for one, grad in zip(saved, grads, strict=True)), None, None


class _Softmax(torch.autograd.Function):
    """R_i = x_i (R_i - s_i sum_j R_j), softmax's first-order expansion at x (Achtibat, 2024)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        y = torch.softmax(x, dim, dtype=dtype)
        ctx.save_for_backward(x, y)
        ctx.dim = dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        x, y = ctx.saved_tensors
        found = x * (relevance - y * relevance.sum(ctx.dim, keepdim=True))
        # Masked places are -inf.
        return torch.where(y == 0, 0.0, found).to(x.dtype), None, None


def _varies(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _two(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    named = [kwargs[name] for name in ("input", "other", "mat2", "vec2") if name in kwargs]
    first, second = (*args, *named)[:2]
    return first, second


def _added(calls: Relevance, a: Any, b: Any, factor: float) -> Any:
    """A + factor * b; constants are biases, but for changes of the input's units."""
    varying = a if _varies(a) else b
    if not (_varies(a) and _varies(b)) and is_first(varying):
        with torch.no_grad():
            y = torch.add(a, b, alpha=factor) if isinstance(a, Tensor) else a + factor * b
        return passed(varying.expand(y.shape), y)
    a, b = (
        one if isinstance(one, Tensor) else torch.as_tensor(one, device=varying.device)
        for one in (a, b)
    )
    return _Sum.apply(a, b, factor, calls.settings.epsilon)  # type: ignore[no-untyped-call]


def _add(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    return _added(calls, *_two(args, kwargs), kwargs.get("alpha", 1))


def _subtract(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    return _added(calls, *_two(args, kwargs), -kwargs.get("alpha", 1))


def _subtracted_from(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    b, a = _two(args, kwargs)
    return _added(calls, a, b, -kwargs.get("alpha", 1))


def _negate(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        y = func(*args, **kwargs)
    return passed(args[0], y)


def _multiply(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = _two(args, kwargs)
    if _varies(a) and _varies(b):
        return _Halves.apply(a, b)  # type: ignore[no-untyped-call]
    x, factor = (a, b) if _varies(a) else (b, a)
    with torch.no_grad():
        y = x * factor
    # What is multiplied with nothing, as masks do, gives nothing.
    open = factor != 0 if isinstance(factor, Tensor) else None
    return passed(x.expand(y.shape), y, open)


def _divide(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    """A divisor is a normalisation's, and gets nothing where the dividend varies."""
    a, b = _two(args, kwargs)
    return _quotient(a, b, func, kwargs)


def _divided_from(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    b, a = _two(args, kwargs)
    return _quotient(a, b, torch.div, {})


def _quotient(a: Any, b: Any, func: Any, kwargs: Any) -> Any:
    mode = kwargs.get("rounding_mode")
    x = a if _varies(a) else b
    with torch.no_grad():
        y = torch.div(torch.as_tensor(a, device=x.device), b, rounding_mode=mode)
    return passed(x.expand(y.shape), y)


def _bilinear(calls: Relevance, a: Any, b: Any, call: Callable[..., Any]) -> Any:
    if _varies(a) and _varies(b):
        return _Bilinear.apply(a, b, call, calls.settings.epsilon)  # type: ignore[no-untyped-call]
    if _varies(a):
        return linear_in(calls, a, lambda a: call(a, b))
    return linear_in(calls, b, lambda b: call(a, b))


def _matmul(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = _two(args, kwargs)
    if calls.weights and not (_varies(a) and _varies(b)):
        x, weight = (a, b) if _varies(a) else (b, a)
        return product(calls, x, weight, left=x is b)
    return _bilinear(calls, a, b, torch.matmul)


def _matmul_from(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    b, a = _two(args, kwargs)
    return _matmul(calls, torch.matmul, (a, b), {})


def _einsum(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    varying = [number for number, one in enumerate(operands) if _varies(one)]
    if not isinstance(equation, str) or len(varying) > 2:
        return NotImplemented

    def call(*given: Tensor) -> Any:
        filled = list(operands)
        for number, one in zip(varying, given, strict=True):
            filled[number] = one
        return torch.einsum(equation, *filled)

    if len(varying) == 1:
        return linear_in(calls, operands[varying[0]], call)
    return _bilinear(calls, operands[varying[0]], operands[varying[1]], call)


def _addmm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    """Bias + x @ weight: a linear layer with its weight turned, or a sum and a product."""
    if len(args) == 3 and not kwargs and calls.weights and _varies(args[1]):
        bias, x, weight = args
        if not (_varies(bias) or _varies(weight)):
            return product(calls, x, weight, bias)
    return _baddbmm(calls, func, args, kwargs)


def _baddbmm(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)

    def apart(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        product = torch.matmul(a, b) * alpha
        return torch.add(product, base, alpha=beta) if beta else product

    with calls:
        return apart(*args[:3])


def _softmax(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(("input", "dim", "dtype"), args, kwargs)
    x, dim = given["input"], given["dim"]
    dtype = given.get("dtype")
    # Tensor.softmax may be handed a flag for what it warns of.
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    if calls.settings.softmax == "constant":
        with torch.no_grad():
            return torch.softmax(x, dim, dtype=dtype)
    return _Softmax.apply(x, dim, dtype)  # type: ignore[no-untyped-call]


def _attention(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = named(names, args, kwargs)
    if given.get("dropout_p"):
        return NotImplemented
    with calls:
        return _scaled_dot_product(given)


def _scaled_dot_product(given: Mapping[str, Any]) -> Tensor:
    """Scaled dot-product attention, in calls that have rules."""
    query, key, value = given["query"], given["key"], given["value"]
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if given.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(times, -3) for one in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), value)


def _cosine_similarity(calls: Relevance, func: Any, args: Any, kwargs: Any) -> Any:
    given = named(("x1", "x2", "dim", "eps"), args, kwargs)
    dim, eps = given.get("dim", 1), given.get("eps", 1e-8)
    with calls:
        sides = (given[name] for name in ("x1", "x2"))
        a, b = (one / one.norm(dim=dim, keepdim=True).clamp_min(eps) for one in sides)
        return (a * b).sum(dim)


TABLE: dict[str, Answer] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _subtract),
    **dict.fromkeys(("rsub", "__rsub__"), _subtracted_from),
    **dict.fromkeys(("neg", "negative", "__neg__"), _negate),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _divide),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), _divided_from),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "__matmul__"), _matmul),
    "__rmatmul__": _matmul_from,
    "einsum": _einsum,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    "cosine_similarity": _cosine_similarity,
}
