"""What all backward rules share: what they are as data, and how a model runs under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saliency_fast._torch_compat import OpOverload, OpOverloadPacket, kind_of_step
from saliency_fast.errors import ModelError, warn
from saliency_fast.graph.gradients import steps_behind
from saliency_fast.graph.intercept import INNER_GRADIENTS, Calls, lean_call
from saliency_fast.graph.outputs import map_tensors, tensors_of
from saliency_fast.model.preserve import rewind, uncompiled, without_recomputation

Answer = Callable[..., Any]
"""A rule for calls of one name: (the mode, the call, its arguments, its named ones) -> result."""

_WHOLE = (torch.nn.functional.softsign,)
"""Python functions that have rules as a whole, rather than what they call."""


class Ruling(Calls):
    """Inside its `with`, calls that depend on points and whose name is in `table` have a rule.

    Calls in place are answered as calls that are not, and written over their input. met: how many
    calls had a rule. paired: points are followed by as many references; rows: of both.
    hidden: kinds of autograd's steps that no call under these rules takes.
    """

    paired = False
    hidden = frozenset(("Relu", "DifferentiableGraph"))

    def __init__(self, name: str, table: Mapping[str, Answer]) -> None:
        super().__init__()
        self.name, self.table = name, table
        self.met = self.rows = 0

    def opens(self, func: FunctionType) -> bool:
        """Whether a Python function is seen by the calls that it makes."""
        return func not in _WHOLE and super().opens(func)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in INNER_GRADIENTS:
            raise ModelError(
                "the model takes gradients of its own, which backward rules would change: use a "
                "method without such rules, such as integrated gradients"
            )
        return super().call(func, args, kwargs)

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        name, outside = call_name(func)
        rule = self.table.get(name)
        if rule is None:
            return self.other(func, args, kwargs)
        if outside is None:
            found = rule(self, func, args, kwargs)
        else:
            target = args[0]
            # What a rule keeps must not be written over.
            given = target.clone() if self.keeps(name) else target
            found = rule(self, outside, (given, *args[1:]), kwargs)
        if found is NotImplemented:
            return self.other(func, args, kwargs)
        self.met += 1
        return found if outside is None else target.copy_(found)

    def keeps(self, name: str) -> bool:
        """Whether the rule of `name` keeps its input for the way back."""
        return False

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A call without a rule."""
        return lean_call(func, args, kwargs)

    def check(self, node: Any) -> None:
        """Refuses a step of autograd's that is none of a call this mode has seen."""
        kind = kind_of_step(node)
        if kind in self.hidden:
            raise ModelError(
                f"the rules of {self.name} cannot see into all of the model: got {node.name()} "
                "from code that PyTorch runs by itself, such as a scripted function; pass the "
                "model with plain functions"
            )

    def run(
        self,
        model: Callable[..., Any],
        points: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the model returns for `points`, under these rules; ModelError where they cannot
        see into it.
        """
        _check_visible(model, self.name)
        if self.paired:
            self.rows = len(points[0])
        with uncompiled(), without_recomputation(), self:
            raw = model(*points, *args, **kwargs)
        for node in steps_behind(tensors_of(raw)):
            self.check(node)
        return map_tensors(_mirrored, raw) if self.paired else raw


@cache
def call_name(func: Callable[..., Any]) -> tuple[str, Callable[..., Any] | None]:
    """How PyTorch names a call, and for a call in place the same call that is not.

    The name is of functions and methods alike: torch.relu, Tensor.relu and Tensor.relu_ are
    "relu". "" for operators of other libraries.
    """
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        space, _, name = str(func).partition(".")
        name = name.partition(".")[0]
        if space != "aten" or name.endswith("_"):
            return "", None
        return name, None
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None) or getattr(func, "__objclass__", None)
    if name == "__get__":
        return getattr(owner, "__name__", ""), None
    for space in ("special_", "linalg_"):
        name = name.removeprefix(space)
    if name.endswith("_") and not name.endswith("__"):
        # Functions of the `torch` namespace name no owner.
        outside = getattr(torch if owner is None else owner, name[:-1], None)
        return (name, None) if outside is None else (name[:-1], outside)
    return name, None


class _Mirrored(torch.autograd.Function):
    """Asks of references what is asked of their points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[: len(grad) // 2].repeat(2, *(1,) * (grad.dim() - 1))


def _mirrored(raw: Tensor) -> Any:
    if not raw.requires_grad or raw.dim() == 0 or len(raw) % 2:
        return raw
    return _Mirrored.apply(raw)  # type: ignore[no-untyped-call]


def _check_visible(model: Callable[..., Any], name: str) -> None:
    """Scripted parts run where no function mode sees their calls."""
    scripted = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    parts = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
    for path, part in parts:
        if isinstance(part, scripted):
            raise ModelError(
                f"the rules of {name} cannot see into scripted code: got a "
                f"{type(part).__name__}{f' at {path!r}' if path else ''}; pass the model that it "
                "was scripted from"
            )


class Rules(Protocol):
    """Backward rules that a model runs under, instead of the chain rule; see `rules`.

    references: points are followed by a row of the baseline for each; relevance: what flows back
    is what the score owes to an output, its own for a single one, not its derivative. unmet: what
    to warn of where a run made no call that has a rule; "" for nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def references(self) -> bool: ...

    @property
    def relevance(self) -> bool: ...

    @property
    def unmet(self) -> str: ...

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling: ...


@dataclass(frozen=True)
class RulesExecutor:
    """The model as it is, call by call under backward rules.

    Where `rules.references`, points and arguments come with their references behind them, and so
    do outputs.
    """

    model: Callable[..., Any]
    rules: Rules

    def __call__(
        self, points: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        rewind()
        calls = self.rules.calls(self.model)
        raw = calls.run(self.model, points, args, kwargs)
        # Without gradients no call needs a rule.
        if calls.met == 0 and self.rules.unmet and torch.is_grad_enabled():
            warn(self.rules.unmet)
        return raw
