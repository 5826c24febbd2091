"""Layer-wise relevance propagation (Bach, 2015), call by call: relevance flows as the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saliency_fast.errors import ModelError
from saliency_fast.graph.gradients import steps_behind
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.rules.intercept import Answer, Ruling, call_name
from saliency_fast.rules.names import ELEMENTWISE, VIEWS
from saliency_fast.rules.shares import Affine, Epsilon, Share


@dataclass(frozen=True)
class Settings:
    """The fields of a Composite that hold for calls without weights."""

    epsilon: float
    norms: str
    pools: str
    softmax: str


class Shared(torch.autograd.Function):
    """y, what a layer makes of x; its relevance is shared by a rule. found: (y,).

    weighted: whether y is a layer's with weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, found: tuple[Tensor], layer: Affine, rule: Share, weighted: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.rule, ctx.weighted = layer, rule, weighted
        # In a tuple: autograd takes a tensor that goes in and out for a view.
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.rule(ctx.layer, x, relevance), None, None, None, None


class Passed(torch.autograd.Function):
    """y shaped like x, which gets all its relevance; `open`: where not none. found: (y,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: tuple[Tensor], open: Tensor | None) -> Tensor:
        ctx.save_for_backward(open)
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Any:
        (open,) = ctx.saved_tensors
        return relevance if open is None else relevance * open, None, None


class Relevance(Ruling):
    """Inside its `with`, gradients of what depends on points are relevance.

    kind: the rule of a layer with weights by its call's name; first: of such that no other comes
    before; named: by the identity of a layer's weights.
    """

    hidden = Ruling.hidden | frozenset(
        "Convolution MkldnnConvolution Addmm Mm Bmm Baddbmm Mul Add Sub Rsub Div Neg Pow Exp Gelu "
        "Silu Elu LeakyRelu Hardtanh Sigmoid Tanh Softplus Softmax LogSoftmax Sum Mean "
        "NativeLayerNorm NativeBatchNorm NativeGroupNorm".split()
    )

    def __init__(
        self,
        table: Mapping[str, Answer],
        settings: Settings,
        kind: Callable[[str], Share],
        first: Share | None,
        named: Mapping[int, Share],
    ) -> None:
        super().__init__("LRP", table)
        self.settings, self.kind, self.first, self.named = settings, kind, first, named
        self.own: Share | None = None
        self.weights = False

    @property
    def epsilon(self) -> Epsilon:
        return Epsilon(self.settings.epsilon)

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # Weights are plain tensors afterwards, and no longer known.
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        self.weights = any(isinstance(one, nn.Parameter) for one in given)
        own = (self.named.get(id(one)) for one in given)
        self.own = next((rule for rule in own if rule is not None), None)
        return super().call(func, args, kwargs)

    def keeps(self, name: str) -> bool:
        return name not in ELEMENTWISE

    def rule_of(self, name: str, x: Tensor) -> Share:
        """The rule of a layer with weights."""
        if self.own is not None:
            return self.own
        return self.first if self.first is not None and is_first(x) else self.kind(name)

    def other(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        name, _ = call_name(func)
        found = func(*args, **kwargs)
        if name.removesuffix("_") in VIEWS or name in VIEWS:
            return found
        if any(one.requires_grad for one in tensors_of(found)):
            raise ModelError(
                f"LRP has no rule for {name or func}: relevance cannot go through this call of the "
                "model; use a method by gradients such as integrated gradients, or explain a "
                "layer behind it"
            )
        return found

    def check(self, node: Any) -> None:
        """Functions with a gradient of their own are seen by no mode either."""
        super().check(node)
        # The Python class behind the step, where there is one.
        kind = getattr(type(node), "_forward_cls", None)
        if kind is not None and not kind.__module__.startswith("saliency_fast."):
            raise ModelError(
                f"LRP has no rule for {node.name()}: the model has a function with a gradient "
                "of its own; use a method by gradients such as integrated gradients"
            )


def is_first(x: Tensor) -> bool:
    """Whether no layer with weights lies between the points and x."""
    return not any(getattr(node, "weighted", False) for node in steps_behind([x]))


def shared(x: Tensor, y: Tensor, layer: Affine, rule: Share, weighted: bool = False) -> Any:
    return Shared.apply(x, (y,), layer, rule, weighted)  # type: ignore[no-untyped-call]


def linear_in(calls: Relevance, x: Tensor, apply: Callable[[Tensor], Tensor]) -> Any:
    """A call that is linear in x and has no weights: the epsilon rule."""
    with torch.no_grad():
        y = apply(x)
    return shared(x, y, Affine(lambda x, *_: apply(x)), calls.epsilon)


def passed(x: Tensor, y: Tensor, open: Tensor | None = None) -> Any:
    return Passed.apply(x, (y,), open)  # type: ignore[no-untyped-call]


def parts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The first argument, and what makes of a call the function of it with the others as given."""
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    x = args[0] if args else kwargs["input"]
    return x, lambda func: lambda x: func(x, *args[1:], **rest)
