"""Models that give gradients of their own: custom functions, hooks, packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.model.lean_models import Case, Net, seeded
from tests.models import randn


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `apply` of a custom function."""
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Custom", (torch.autograd.Function,), parts).apply


def saved(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x.view_as(x)


def two(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = x > 0
    ctx.mark_non_differentiable(mask)
    ctx.set_materialize_grads(False)
    return x.view_as(x), mask


def dirty(ctx: Any, x: Tensor) -> Tensor:
    ctx.mark_dirty(x)
    return x


reverse = function(lambda ctx, x: x.view_as(x), lambda ctx, grad: -grad)
itself = function(lambda ctx, x: x, lambda ctx, grad: 3 * grad)
part = function(lambda ctx, x: x[:, :4], lambda ctx, grad: 2 * grad)
copied = function(lambda ctx, x: x.clone(), lambda ctx, grad: 2 * grad)
rounded = function(lambda ctx, x: x.round(), lambda ctx, grad: grad)
clipped = function(saved, lambda ctx, grad: grad.clamp(-0.01, 0.01))
normed = function(lambda ctx, x: x.clone(), lambda ctx, grad: grad / (1e-9 + grad.norm()))
several = function(two, lambda ctx, grad, _: None if grad is None else -grad)
marked = function(dirty, lambda ctx, grad: 5 * grad)
swapped = function(lambda ctx, a, b: (b, a), lambda ctx, a, b: (a, 2 * b))

CUSTOM: dict[str, Callable[[Tensor], Tensor]] = {
    "view": reverse,
    "itself": itself,
    "slice": part,
    "copy": copied,
    "straight through": rounded,
    "clipped": clipped,
    "normed over all rows": normed,
    "hook that looks at all rows": lambda y: _hooked(y, lambda g: g / (1e-9 + g.norm())) or y,
    "several outputs": lambda y: several(y)[0] * several(y)[1],
    "marked dirty": lambda y: marked(y * 1),
    "of overwritten memory": lambda y: reverse(y.mul(2).relu_()),
    "a view of it": lambda y: reverse(y).flatten(1).view_as(y),
    "written to": lambda y: copied(y).add_(y),
    "two of it": lambda y: sum(swapped(y, 2 * y)),
    "hook": lambda y: _hooked(y) or y,
    "hook of a node": lambda y: (y.grad_fn and y.grad_fn.register_prehook(_threefold), y)[1],
    "packed": lambda y: _packed(y),
    "inside a checkpoint": lambda y: checkpoint(reverse, y, use_reentrant=False),
}
"""What a branch does to its values of shape [R, 4, 6, 6]."""


def _threefold(grads: Any) -> Any:
    return tuple(None if one is None else 3 * one for one in grads)


def _hooked(y: Tensor, hook: Callable[[Tensor], Tensor] = lambda grad: 3 * grad) -> None:
    if y.requires_grad:
        y.register_hook(hook)


def _packed(y: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda one: 3 * one, lambda one: one):
        return y * y


def silent(branch: Callable[[Net, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """A body whose branch is silent for small inputs, and most of the gradient for others."""

    def body(m: Net, x: Tensor) -> Tensor:
        y = m.first(x)
        return 0.01 * y + 50 * F.threshold(branch(m, y), 3.0, 0.0)

    return body


def rows(first: float) -> Tensor:
    """Three examples, of which the first is small."""
    x = 2 * randn(3, 2, 6, 6, seed=3)
    x[0] *= first
    return x


def custom(name: str) -> Case:
    """A model with a custom gradient in a branch that is silent at the first example."""
    branch = CUSTOM[name]
    make = lambda: seeded(lambda: Net(silent(lambda m, y: branch(y))))  # noqa: E731
    return Case(make, "", inputs=(rows(0.05),))


def _third(module: nn.Module, *grads: Any) -> Any:
    return tuple(None if one is None else 3 * one for one in grads[0])


def _legacy(module: nn.Module, taken: Any, given: Any) -> Any:
    return tuple(None if one is None else 3 * one for one in taken)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    # Of a module; each triples a gradient or only looks.
    "full": lambda one: one.register_full_backward_hook(_third),
    "full, that looks": lambda one: one.register_full_backward_hook(lambda *_: None),
    "before": lambda one: one.register_full_backward_pre_hook(_third),
    "before, that looks": lambda one: one.register_full_backward_pre_hook(lambda *_: None),
    "legacy": lambda one: one.register_backward_hook(_legacy),
    "of outputs": lambda one: one.register_forward_hook(
        lambda module, taken, given: _hooked(given)
    ),
    "of inputs": lambda one: one.register_forward_pre_hook(lambda module, taken: _hooked(taken[0])),
}
GLOBAL: dict[str, Callable[[], Any]] = {
    "full": lambda: nn.modules.module.register_module_full_backward_hook(_third),
    "before": lambda: nn.modules.module.register_module_full_backward_pre_hook(_third),
    "forward": lambda: nn.modules.module.register_module_forward_hook(
        lambda module, taken, given: _hooked(given)
    ),
}
MODULES: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
    # The hooked module's name, and the branch that it is in.
    "convolution": ("second", lambda m, y: m.second(y)),
    "normalisation": ("norm", lambda m, y: m.norm(m.second(y))),
    "a module before one in place": ("norm", lambda m, y: m.relu(m.norm(m.second(y)) + 0)),
    "the whole": ("", lambda m, y: m.second(y)),
}
