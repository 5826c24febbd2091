"""DeepLIFT's rescale rule (Shrikumar, 2017): slopes between a point and its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from saliency_fast.errors import InputError, ModelError
from saliency_fast.rules.intercept import Answer, Ruling, call_name
from saliency_fast.rules.names import ELEMENTWISE, named, only_input

CAPTUM = ("relu", "elu", "leaky_relu", "sigmoid", "tanh", "softplus")
"""The elementwise calls that Captum's DeepLift has the rule for."""


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Points and their references."""
    half = len(x) // 2
    return x[:half], x[half:]


def _both(found: Tensor) -> Tensor:
    """The same for points and for references."""
    return torch.cat([found, found])


class _Multiplied(torch.autograd.Function):
    """y of x, which depends on it by the multipliers [points, *]; found: (y, multipliers)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
        # In a tuple: autograd takes a tensor that goes in and out for a view.
        y, multiplier = found
        ctx.save_for_backward(multiplier)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (multiplier,) = ctx.saved_tensors
        return grad * _both(multiplier), None


class _Softmax(torch.autograd.Function):
    """Multipliers of softmax less their mean, as shifts of its input change nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: Any, rules: Rescale) -> Tensor:
        y = torch.softmax(x, dim, dtype=dtype)
        (point, reference), (out, out_reference) = _halves(x), _halves(y)
        ctx.save_for_backward(y, point - reference, out - out_reference)
        ctx.dim, ctx.rules = dim, rules
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, change, change_out = ctx.saved_tensors
        slope = y * (grad - (grad * y).sum(ctx.dim, keepdim=True))
        found = slopes(_both(change), grad * _both(change_out), slope, ctx.rules.epsilon)
        axes = range(0 if ctx.rules.captum else 1, found.dim())
        found = found - found.mean(tuple(axes), keepdim=True)
        return found.to(change.dtype), None, None, None


class _MaxPool(torch.autograd.Function):
    """Shares a maximum's change out to where the point's and the reference's maxima lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Callable[..., Any], rules: Rescale) -> Any:
        y, index = pool(x)
        (point, reference), (out, out_reference) = _halves(x), _halves(y)
        ctx.save_for_backward(index, point - reference, out, out_reference)
        ctx.rules = rules
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        index, change, out, out_reference = ctx.saved_tensors
        (at, at_reference), (grad, grad_reference) = _halves(index), _halves(grad)
        if not ctx.rules.captum:
            grad_reference = grad
        larger = torch.maximum(out, out_reference)
        gained = _unpooled(grad * (larger - out_reference), at, change)
        lost = _unpooled(grad_reference * (out - larger), at_reference, change)
        slope = _unpooled(grad, at, change)
        found = slopes(change, gained + lost, slope, ctx.rules.epsilon)
        return _both(found), None, None


def _unpooled(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    found = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return found.flatten(2).scatter_add_(2, index.flatten(2), values.flatten(2)).view(like.shape)


def slopes(change: Tensor, change_out: Tensor, slope: Tensor, epsilon: float) -> Tensor:
    """change_out / change, and the gradient `slope` where `change` is tiny (or no number)."""
    # float16 has no number as small as epsilon, which is zero there.
    changed = (change.abs() >= epsilon) & (change != 0)
    return torch.where(changed, change_out / change, slope)


def _paired(calls: Ruling, x: Tensor) -> None:
    """Points and references must be the halves of the first axis."""
    rows = max(calls.rows, 2)
    if x.dim() == 0 or len(x) % rows:
        raise ModelError(
            "DeepLIFT compares examples with their references along the first axis: got an "
            f"activation of {tuple(x.shape)} for {rows} rows; keep the batch on the first axis "
            "(batch_first=True)"
        )


def _elementwise(
    rules: Rescale, calls: Ruling, func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if not only_input(args, kwargs):
        return NotImplemented
    x = args[0] if args else kwargs["input"]
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    _paired(calls, x)

    def apply(x: Tensor) -> Tensor:
        found: Tensor = func(x, *args[1:], **rest)
        return found

    with torch.no_grad():
        y = apply(x)
    point, reference = _halves(x.detach())
    out, out_reference = _halves(y)
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        (slope,) = torch.autograd.grad(apply(leaf).sum(), leaf)
    multiplier = slopes(point - reference, out - out_reference, slope, rules.epsilon)
    return _Multiplied.apply(x, (y, multiplier))  # type: ignore[no-untyped-call]


def _softmax(
    rules: Rescale,
    calls: Ruling,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    given = named(("input", "dim", "dtype"), args, kwargs)
    dim, dtype = given.get("dim"), given.get("dtype")
    if not isinstance(dim, int) or not isinstance(dtype, torch.dtype | None):
        return NotImplemented
    _paired(calls, given["input"])
    return _Softmax.apply(given["input"], dim, dtype, rules)  # type: ignore[no-untyped-call]


def _pool(
    axes: int,
    pool: Callable[..., Any],
    both: bool,
    rules: Rescale,
    calls: Ruling,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    x = args[0] if args else kwargs["input"]
    _paired(calls, x)
    if x.dim() != axes + 2:
        raise ModelError(f"DeepLIFT needs a batch to pool: got an activation of {tuple(x.shape)}")
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    found = _MaxPool.apply(x, lambda x: pool(x, *args[1:], **rest), rules)  # type: ignore[no-untyped-call]
    return found if both else found[0]


_POOLS: dict[str, Answer] = {}
for _axes in (1, 2, 3):
    _with_index = getattr(functional, f"max_pool{_axes}d_with_indices")
    _POOLS[f"max_pool{_axes}d"] = partial(_pool, _axes, _with_index, False)
    _POOLS[f"max_pool{_axes}d_with_indices"] = partial(_pool, _axes, _with_index, True)
    _adaptive = getattr(functional, f"adaptive_max_pool{_axes}d_with_indices")
    _POOLS[f"adaptive_max_pool{_axes}d"] = partial(_pool, _axes, _adaptive, True)


class Paired(Ruling):
    """Rules that compare points with references, each a half of the first axis.

    alternating: a call right behind one that has a rule keeps its gradient.
    """

    paired = True

    def __init__(self, name: str, table: Mapping[str, Answer], alternating: bool) -> None:
        super().__init__(name, table)
        self.alternating = alternating
        self._ruled = WeakIdKeyDictionary()

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs.get("input")
        behind = self.alternating and isinstance(x, Tensor) and x in self._ruled
        if behind and call_name(func)[0] in self.table:
            return self.other(func, args, kwargs)
        met = self.met
        found = super().answer(func, args, kwargs)
        if self.alternating and self.met > met and isinstance(found, Tensor):
            self._ruled[found] = True
        return found


@dataclass(frozen=True)
class Rescale:
    """DeepLIFT's rescale rule: a nonlinearity's gradient becomes change out / change in.

    Changes are between a point and its reference, the other half of the batch; where the input's
    is below `epsilon` the gradient stays. Softmax's multipliers lose their mean over the example.
    Linear calls, normalisations by the data and products of two tensors keep their gradient.
    captum: as Captum 0.9 has it, for the sake of equal numbers: of the elementwise calls only
    `CAPTUM` have the rule, a nonlinearity right behind another keeps its gradient (sums then miss
    the scores' change), softmax's mean is the whole batch's, and pools weigh references by
    gradients of their own, so that the references' scores are to be differentiated as well.
    """

    epsilon: float = 1e-10
    captum: bool = False
    name: ClassVar[str] = "DeepLIFT"
    references: ClassVar[bool] = True
    relevance: ClassVar[bool] = False
    unmet: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise InputError(f"epsilon must be a positive finite number: got {self.epsilon}")

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        names = CAPTUM if self.captum else ELEMENTWISE
        table: dict[str, Answer] = {name: partial(_elementwise, self) for name in names}
        table |= {name: partial(pool, self) for name, pool in _POOLS.items()}
        return Paired(self.name, table | {"softmax": partial(_softmax, self)}, self.captum)
