"""Runs a model under backward rules: calls of operators that have a rule are answered by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from saliency_fast._torch_compat import OpOverload, OpOverloadPacket, kind_of_step
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import ModelError, warn
from saliency_fast.graph.gradients import differentiable, steps_behind
from saliency_fast.graph.intercept import INNER_GRADIENTS, Calls, lean_call
from saliency_fast.graph.outputs import map_tensors, tensors_of
from saliency_fast.model.preserve import rewind, uncompiled, without_recomputation

OperatorRule = Callable[..., Any]
"""The rule of an operator: (the mode, the call, its arguments, its named ones) -> result; or
NotImplemented where the rule does not hold for these arguments."""

_WHOLE = (torch.nn.functional.softsign,)
"""Python functions that have a rule as a whole, rather than the operators that they call."""

ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign tanh sigmoid expit "
    "log_sigmoid logsigmoid hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink "
    "prelu _prelu_kernel threshold clamp clip clamp_min clamp_max".split()
)
ELEMENTWISE = ACTIVATIONS | frozenset(
    "abs absolute square sqrt rsqrt reciprocal pow __rpow__ float_power exp exp2 expm1 log log2 "
    "log10 log1p logit sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv "
    "sign sgn round floor ceil trunc frac nan_to_num".split()
)
"""Operators of which every element of the result depends on one element of the input."""


class RulesMode(Calls):
    """Calls that depend on points and whose name is in `table` have a rule, also in place.

    met: how many calls had a rule. paired: points are followed by as many references; rows: of
    both. hidden: kinds of autograd nodes that no call under these rules creates.
    """

    paired = False
    hidden = frozenset(("Relu", "DifferentiableGraph"))

    def __init__(self, name: str, table: Mapping[str, OperatorRule]) -> None:
        super().__init__()
        self.name, self.table = name, table
        self.met = self.rows = 0

    def opens(self, func: FunctionType) -> bool:
        return func not in _WHOLE and super().opens(func)

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if func in INNER_GRADIENTS:
            raise ModelError(
                "the model takes gradients of its own, which backward rules would change: use a "
                "method without such rules, such as integrated gradients"
            )
        return super().call(func, args, kwargs)

    def answer(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        name, outside = call_name(func)
        rule = self.table.get(name)
        if rule is None:
            return self.other(func, args, kwargs)
        if outside is None:
            result = rule(self, func, args, kwargs)
        else:
            target = args[0]
            # Tensors that a rule saves must not be written over.
            given = target.clone() if self.keeps(name) else target
            result = rule(self, outside, (given, *args[1:]), kwargs)
        if result is NotImplemented:
            return self.other(func, args, kwargs)
        self.met += 1
        return result if outside is None else target.copy_(result)

    def keeps(self, name: str) -> bool:
        """Whether the rule of `name` saves its input for the backward pass."""
        return False

    def other(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        return lean_call(func, args, kwargs)

    def check(self, node: Any) -> None:
        """Refuses an autograd node that was not created by a call of this mode."""
        kind = kind_of_step(node)
        if kind in self.hidden:
            raise ModelError(
                f"the rules of {self.name} cannot see into all of the model: got {node.name()} "
                "from code that PyTorch runs by itself, such as a scripted function; pass the "
                "model with plain functions"
            )

    def run(self, model: Function, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        """The model's output for `points` under these rules; ModelError where calls are hidden."""
        parts = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
        for path, part in parts:
            if isinstance(part, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
                raise ModelError(
                    f"the rules of {self.name} cannot see into scripted code: got a "
                    f"{type(part).__name__}{f' at {path!r}' if path else ''}; pass the model that "
                    "it was scripted from"
                )
        if self.paired:
            self.rows = len(points[0])
        with uncompiled(), without_recomputation(), self:
            raw = model(*points, *args, **kwargs)
        for node in steps_behind(tensors_of(raw)):
            self.check(node)
        return map_tensors(_mirrored, raw) if self.paired else raw


@cache
def call_name(func: Function) -> tuple[str, Function | None]:
    """The operator's name, "relu" of torch.relu, Tensor.relu and Tensor.relu_ and "" of other
    libraries' operators; and for an in-place call the same call out of place.
    """
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        space, _, name = str(func).partition(".")
        name = name.partition(".")[0]
        return ("" if space != "aten" or name.endswith("_") else name), None
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None) or getattr(func, "__objclass__", None)
    if name == "__get__":
        return getattr(owner, "__name__", ""), None
    for space in ("special_", "linalg_"):
        name = name.removeprefix(space)
    if name.endswith("_") and not name.endswith("__"):
        # Functions of the `torch` namespace have no owner.
        outside = getattr(torch if owner is None else owner, name[:-1], None)
        return (name, None) if outside is None else (name[:-1], outside)
    return name, None


def register(
    table: dict[str, OperatorRule], *names: str, **options: Any
) -> Callable[[OperatorRule], OperatorRule]:
    """Decorator that makes a function, with `options`, the rule of the operators in `names`."""

    def add(rule: OperatorRule) -> OperatorRule:
        each = (name for several in names for name in several.split())
        table.update(dict.fromkeys(each, partial(rule, **options) if options else rule))
        return rule

    return add


def named(names: Sequence[str], args: Sequence[Any], kwargs: Kwargs) -> dict[str, Any]:
    """The arguments of a call by name; `names` are those of positional arguments."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def split(func: Function, args: Args, kwargs: Kwargs) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The input of a call, and the call as a function of the input alone."""
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return args[0] if args else kwargs["input"], lambda x: func(x, *args[1:], **rest)


def varies(value: Any) -> bool:
    """Whether `value` is a tensor that depends on the points."""
    return isinstance(value, Tensor) and value.requires_grad


def only_input_varies(args: Args, kwargs: Kwargs) -> bool:
    """Whether the first argument depends on the points, and no other one."""
    rest = (*args[1:], *(value for name, value in kwargs.items() if name != "input"))
    return varies(args[0] if args else kwargs.get("input")) and not any(map(varies, rest))


def _mirrored(raw: Tensor) -> Any:
    """An output whose references get the gradients of their points."""
    if not raw.requires_grad or raw.dim() == 0 or len(raw) % 2:
        return raw
    return differentiable(
        raw,
        lambda x: (x.view_as(x), ()),
        lambda grad: grad[: len(grad) // 2].repeat(2, *(1,) * (grad.dim() - 1)),
    )


class Rules(Protocol):
    """Backward rules that a model runs under, instead of the chain rule.

    references: points are followed by a row of the baseline for each. relevance: backward starts
    from the score itself, not from its derivative 1. warning: given where a run made no call that
    has a rule.
    """

    name: ClassVar[str]
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = False
    warning: ClassVar[str] = ""

    def mode(self, model: Function | None = None) -> RulesMode: ...


@dataclass(frozen=True)
class RulesExecutor:
    """Runs the model itself, call by call under backward rules."""

    model: Function
    rules: Rules

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        mode = self.rules.mode(self.model)
        raw = mode.run(self.model, points, args, kwargs)
        # Without gradients no call needs a rule.
        if mode.met == 0 and self.rules.warning and torch.is_grad_enabled():
            warn(self.rules.warning)
        return raw
