"""Intercepts a model's calls of PyTorch while it runs: calls that do not depend on the points run
without autograd, weights are plain numbers in the others, and calls for which autograd would keep
too much have lean versions. A function mode sees the calls of modules and functions alike.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saliency_fast._torch_compat import (
    is_checkpoint,
    is_module_hook,
    saved_tensors_hooks,
    unguarded,
)
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.errors import SaliencyError
from saliency_fast.graph.autograd import LEAN

INNER_GRADIENTS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
_EXACT = ("torch.utils.checkpoint", "torch.autograd.graph")
"""Modules whose hooks return what was saved: it is computed again, or kept elsewhere."""
GRAPH = Tensor.grad_fn.__get__  # type: ignore[union-attr]


class NotLeanError(SaliencyError, RuntimeError):
    """The model does what lean versions or recorded programs cannot serve."""


class FunctionMode(TorchFunctionMode):
    """Hands every call of PyTorch to `call`, also those in its Python functions."""

    def opens(self, func: FunctionType) -> bool:
        """Whether a Python function is seen by the calls that it makes, and not as one call."""
        return True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opened = isinstance(func, FunctionType) and self.opens(func)
        body = unguarded(func) if opened else None
        if body is None:
            return self.call(func, args, kwargs or {})
        with self:
            return body(*args, **(kwargs or {}))

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """One call, outside of the mode."""
        return func(*args, **kwargs)


class Calls(FunctionMode):
    """Calls that depend on points, by their grad_fn, keep only what input gradients need."""

    def __init__(self) -> None:
        super().__init__()
        self._saving = saved_tensors_hooks()

    def opens(self, func: FunctionType) -> bool:
        return func not in INNER_GRADIENTS

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        if func in INNER_GRADIENTS:
            raise NotLeanError("the model takes gradients of its own")
        self.check_saving()
        if func == GRAPH:
            # The node of a lean call has other gradients than autograd's own; that of a module's
            # full backward hooks has the same.
            node = func(*args, **kwargs)
            if not (node is None or is_module_hook(node) or is_checkpoint(node)):
                raise NotLeanError("the model reads the graph of its gradient (grad_fn)")
            return node
        leaves, varying = _gradients((*args, *kwargs.values()))
        if not (leaves or varying) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not varying:
            with torch.no_grad():
                return func(*args, **kwargs)
        if leaves:
            args = _frozen(args)
            kwargs = {name: _frozen(value) for name, value in kwargs.items()}
        return self.answer(func, args, kwargs)

    @property
    def packs(self) -> bool:
        """Whether the model changes what autograd saves, by hooks of its own."""
        found = saved_tensors_hooks()
        return found != self._saving and getattr(found[0], "__module__", "") not in _EXACT

    def check_saving(self) -> None:
        """Raises NotLeanError where it does: lean calls save other tensors than autograd's."""
        if self.packs:
            raise NotLeanError("the model changes what autograd saves (saved_tensors_hooks)")

    def answer(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """A call that depends on the points, its weights plain numbers."""
        return lean_call(func, args, kwargs)


def lean_call(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """`func` by its lean version, or by autograd's own where there is none for these arguments."""
    lean = LEAN.get(func)
    if lean is not None and not autocast_is_on() and all(map(_is_plain, args)):
        result = lean(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


def _is_plain(value: Any) -> bool:
    """False for tensors of a class that may give PyTorch's calls another meaning."""
    return not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter)


def autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _gradients(values: Any) -> tuple[bool, bool]:
    """Whether leaves that require gradients, and whether results that do, are among `values`."""
    leaves = varying = False
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                leaf = value.is_leaf
                leaves, varying = leaves or leaf, varying or not leaf
        elif isinstance(value, (list, tuple)):
            inner = _gradients(value)
            leaves, varying = leaves or inner[0], varying or inner[1]
    return leaves, varying


def _frozen(value: Any) -> Any:
    """`value` with leaves that require gradients as plain tensors of the same memory."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad and value.is_leaf else value
    if type(value) in (list, tuple):
        return type(value)(map(_frozen, value))
    return value
