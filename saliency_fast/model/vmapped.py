"""Vmapped: what models leave behind, and what PyTorch warns of, when they run under vmap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from saliency_fast.model.state import modules_of

_FUNCTORCH: Any = torch._C._functorch
_LOCK = threading.Lock()
_QUIET: list[int] = [0]
"""How many calls want no warnings: PyTorch's flag is the whole process's."""


@dataclass(frozen=True)
class Confined:
    """A model for `torch.func.vmap`, whose modules keep no tensor of vmap's own from one call to
    the next: outside of the vmap that made it nothing can read it. What the model kept before comes
    back in its place.
    """

    model: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tables = [(table, table.copy()) for one in modules_of(self.model) for table in _tables(one)]
        try:
            with _without_warnings():
                return self.model(*args, **kwargs)
        finally:
            for now, before in tables:
                _put_back(now, before)


def _tables(module: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """What a module keeps tensors in: its attributes, its buffers, its lists and dictionaries."""
    own = vars(module)
    yield own
    yield own["_buffers"]
    for name, value in list(own.items()):
        if not name.startswith("_") and isinstance(value, (dict, list)):
            yield value


def _put_back(now: Any, before: Any) -> None:
    if isinstance(now, list):
        if any(map(_of_vmap, now)):
            now[:] = before
        return
    for name in [name for name, value in now.items() if _of_vmap(value)]:
        if name in before:
            now[name] = before[name]
        else:
            del now[name]


def _of_vmap(value: Any) -> bool:
    """Whether a value is a tensor of vmap's, or a container that holds one."""
    leaves = tree_leaves(value) if isinstance(value, (tuple, list, dict)) else (value,)
    tensors = (one for one in leaves if isinstance(one, Tensor))
    return any(map(_FUNCTORCH.is_functorch_wrapped_tensor, tensors))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside, PyTorch does not ask to file an issue for each operator that it runs row by row: the
    caller has not chosen vmap, and to run all rows one by one would take longer.
    """
    with _LOCK:
        _QUIET[0] += 1
        _FUNCTORCH._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        with _LOCK:
            _QUIET[0] -= 1
            if _QUIET[0] == 0:
                _FUNCTORCH._set_vmap_fallback_warning_enabled(True)
