"""DeepLIFT's rescale rule (Shrikumar, 2017): slopes between a point and its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import InputError, ModelError
from saliency_fast.graph.gradients import differentiable
from saliency_fast.rules.intercept import (
    ELEMENTWISE,
    OperatorRule,
    Rules,
    RulesMode,
    call_name,
    named,
    only_input_varies,
    register,
    split,
)

CAPTUM = ("relu", "elu", "leaky_relu", "sigmoid", "tanh", "softplus")
"""The elementwise operators that Captum's DeepLift has the rule for."""
DEEPLIFT: dict[str, OperatorRule] = {}
"""The rules of operators by name."""
deeplift_rule = partial(register, DEEPLIFT)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Points and their references."""
    return x[: len(x) // 2], x[len(x) // 2 :]


def _both(multiplier: Tensor) -> Tensor:
    """The same for points and for references."""
    return torch.cat([multiplier, multiplier])


def _multipliers(change: Tensor, change_out: Tensor, slope: Tensor, epsilon: float) -> Tensor:
    """change_out / change, and the gradient `slope` where `change` is tiny (or NaN)."""
    # float16 has no number as small as epsilon, which is zero there.
    changed = (change.abs() >= epsilon) & (change != 0)
    return torch.where(changed, change_out / change, slope)


class Paired(RulesMode):
    """Compares points with references, each a half of the first axis."""

    paired = True

    def __init__(self, rules: Rescale) -> None:
        table: Mapping[str, OperatorRule] = DEEPLIFT
        if rules.captum:
            other = ELEMENTWISE.difference(CAPTUM)
            table = {name: rule for name, rule in DEEPLIFT.items() if name not in other}
        super().__init__(rules.name, table)
        self.rules = rules
        self._ruled = WeakIdKeyDictionary()

    def answer(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        x = args[0] if args else kwargs.get("input")
        follows = self.rules.captum and isinstance(x, Tensor) and x in self._ruled
        if follows and call_name(func)[0] in self.table:
            return self.other(func, args, kwargs)
        met = self.met
        result = super().answer(func, args, kwargs)
        if self.rules.captum and self.met > met and isinstance(result, Tensor):
            self._ruled[result] = True
        return result

    def need_pairs(self, x: Tensor) -> None:
        """Points and references must be the halves of the first axis."""
        rows = max(self.rows, 2)
        if x.dim() == 0 or len(x) % rows:
            raise ModelError(
                "DeepLIFT compares examples with their references along the first axis: got an "
                f"activation of {tuple(x.shape)} for {rows} rows; keep the batch on the first axis "
                "(batch_first=True)"
            )


@deeplift_rule(*ELEMENTWISE)
def _elementwise(mode: Paired, func: Function, args: Args, kwargs: Kwargs) -> Any:
    if not only_input_varies(args, kwargs):
        return NotImplemented
    x, apply = split(func, args, kwargs)
    mode.need_pairs(x)
    with torch.no_grad():
        y = apply(x)
    (point, reference), (out, out_reference) = _halves(x.detach()), _halves(y)
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        (slope,) = torch.autograd.grad(apply(leaf).sum(), leaf)
    multiplier = _multipliers(point - reference, out - out_reference, slope, mode.rules.epsilon)
    return differentiable(x, lambda _: (y, (multiplier,)), lambda grad, m: grad * _both(m))


@deeplift_rule("softmax")
def _softmax(mode: Paired, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Multipliers less their mean, since shifts of the input change nothing."""
    given = named(("input", "dim", "dtype"), args, kwargs)
    dim, dtype = given.get("dim"), given.get("dtype")
    if not isinstance(dim, int) or not isinstance(dtype, torch.dtype | None):
        return NotImplemented
    mode.need_pairs(x := given["input"])
    rules = mode.rules
    with torch.no_grad():
        y = torch.softmax(x, dim, dtype=dtype)
        (point, reference), (out, out_reference) = _halves(x), _halves(y)
        changes = point - reference, out - out_reference

    def back(grad: Tensor, y: Tensor, change: Tensor, change_out: Tensor) -> Tensor:
        slope = y * (grad - (grad * y).sum(dim, keepdim=True))
        result = _multipliers(_both(change), grad * _both(change_out), slope, rules.epsilon)
        axes = range(0 if rules.captum else 1, result.dim())
        return (result - result.mean(tuple(axes), keepdim=True)).to(change.dtype)

    return differentiable(x, lambda _: (y, (y, *changes)), back)


def _max_pool(
    mode: Paired, func: Any, args: Args, kwargs: Kwargs, axes: int, pool: Function, indices: bool
) -> Any:
    """The maximum's change goes to the positions of the point's and the reference's maxima."""
    x, apply = split(pool, args, kwargs)
    mode.need_pairs(x)
    if x.dim() != axes + 2:
        raise ModelError(f"DeepLIFT needs a batch to pool: got an activation of {tuple(x.shape)}")
    rules = mode.rules
    with torch.no_grad():
        y, index = apply(x)
        (point, reference), (out, out_reference) = _halves(x), _halves(y)
        change = point - reference

    def back(
        grad: Tensor, index: Tensor, change: Tensor, out: Tensor, out_reference: Tensor
    ) -> Tensor:
        (at, at_reference), (grad, grad_reference) = _halves(index), _halves(grad)
        if not rules.captum:
            grad_reference = grad
        larger = torch.maximum(out, out_reference)
        gained = _unpooled(grad * (larger - out_reference), at, change)
        lost = _unpooled(grad_reference * (out - larger), at_reference, change)
        slope = _unpooled(grad, at, change)
        return _both(_multipliers(change, gained + lost, slope, rules.epsilon))

    kept = (index, change, out, out_reference)
    y = differentiable(x, lambda _, plain=y: (plain, kept), back)
    return (y, index) if indices else y


for _axes in (1, 2, 3):
    for _name, _kind, _indices in (
        (f"max_pool{_axes}d", f"max_pool{_axes}d", False),
        (f"max_pool{_axes}d_with_indices", f"max_pool{_axes}d", True),
        (f"adaptive_max_pool{_axes}d", f"adaptive_max_pool{_axes}d", True),
    ):
        _pool = getattr(functional, f"{_kind}_with_indices")
        deeplift_rule(_name, axes=_axes, pool=_pool, indices=_indices)(_max_pool)


def _unpooled(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return zeros.flatten(2).scatter_add_(2, index.flatten(2), values.flatten(2)).view(like.shape)


@dataclass(frozen=True)
class Rescale(Rules):
    """DeepLIFT's rescale rule: a nonlinearity's gradient becomes change out / change in.

    Changes are between a point and its reference, the other half of the batch; below `epsilon` the
    gradient stays. Softmax's multipliers lose their mean over the example. Linear operators,
    normalisations by the data and products of two tensors keep their gradient. captum: as in Captum
    0.9, only the elementwise operators `CAPTUM` have the rule, a nonlinearity directly after
    another keeps its gradient, softmax's mean is the whole batch's, and pools weigh references by
    their own gradients.
    """

    epsilon: float = 1e-10
    captum: bool = False
    name: ClassVar[str] = "DeepLIFT"
    references: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise InputError(f"epsilon must be a positive finite number: got {self.epsilon}")

    def mode(self, model: Function | None = None) -> RulesMode:
        return Paired(self)
