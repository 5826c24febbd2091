"""A recorder for the CPU with the laws of CUDA graphs, to test what uses one.

It logs the operators that a body asks for, with the very tensors. A replay runs the same operators
on the same memory: no Python of the body, no number that was the host's, no new memory. To record
changes nothing, and to ask for a number meanwhile is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")


class Tape:
    """One recorder; `made` counts what was recorded, `replayed` what was replayed."""

    made = replayed = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited = self.finished = 0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        log = _Log()
        try:
            with log:
                body()
        finally:
            log.undo()
        type(self).made += 1
        return partial(self._replay, log.calls)

    def _replay(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        type(self).replayed += 1
        with torch.no_grad():
            for func, args, kwargs, made in calls:
                found = func(*args, **kwargs)
                pairs = zip(_made(func, made), _made(func, found), strict=True)
                for (kind, old), (_, new) in pairs:
                    # A view is what it was; what is new goes where the first run had it.
                    if kind.alias_info is None:
                        for a, b in zip(tree_iter(old), tree_iter(new), strict=True):
                            if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr():
                                a.detach().copy_(b)

    def beside(self, parts: Any) -> list[Any]:
        return [part() for part in parts]

    def done(self) -> None:
        self.finished += 1

    def wait(self) -> None:
        self.waited += 1


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in _ASKS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for value, about in zip(args, func._schema.arguments, strict=False):
            if about.alias_info is not None and about.alias_info.is_write:
                self._changed(value)
        made = func(*args, **kwargs)
        for kind, one in _made(func, made):
            if kind.alias_info is None:
                self._own.update(t.untyped_storage().data_ptr() for t in tree_iter(one) if _has(t))
        self.calls.append((func, args, kwargs, made))
        return made

    def _changed(self, tensor: Tensor) -> None:
        """Keeps what a tensor from outside held."""
        key = tensor.untyped_storage().data_ptr()
        if key not in self._own and key not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[key] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)


def _made(func: Any, result: Any) -> list[tuple[Any, Any]]:
    """What an operator returns, with what its schema says of it."""
    kinds = func._schema.returns
    return list(zip(kinds, result if len(kinds) > 1 else [result][: len(kinds)], strict=True))


def _has(value: Any) -> bool:
    return isinstance(value, Tensor)
