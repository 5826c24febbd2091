"""The tensors in whatever a model returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from saliency_fast._torch_compat import tree_leaves, tree_map
from saliency_fast.graph.intercept import NotLeanError


class Unread:
    """A part of an output that a program does not make: to read it raises NotLeanError."""

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "reason", reason)

    def __getattribute__(self, name: str) -> Any:
        reason = object.__getattribute__(self, "reason")
        raise NotLeanError(f"the target reads a part of the output that is not recorded: {reason}")

    def _read(self, *_: object) -> Any:
        return Unread.__getattribute__(self, "")

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __call__ = _read
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __neg__ = __float__ = _read


def leaves_of(output: Any) -> list[Tensor | None]:
    """The tensors among an output's leaves; None in the place of any other."""
    leaves = tree_leaves(output)
    return [one if type(one) is not Unread and isinstance(one, Tensor) else None for one in leaves]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output, however nested."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if type(leaf) is Unread:
            continue
        if isinstance(leaf, Tensor):
            found.append(leaf)
        else:
            found += [one for _, value in _parts(leaf) for one in tensors_of(value)]
    return found


def rows_of(output: Any, part: slice, rows: int) -> Any:
    """Some rows of an output of so many; what has no rows is left, to be refused."""
    return map_tensors(lambda one: one[part] if one.dim() and len(one) == rows else one, output)


def map_tensors(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """An output, copied, with each of its tensors changed, in containers and objects alike."""

    def changed(leaf: Any) -> Any:
        if type(leaf) is Unread:
            return leaf
        if isinstance(leaf, Tensor):
            return change(leaf)
        found = [(name, map_tensors(change, own)) for name, own in _parts(leaf) if tensors_of(own)]
        made: Any = copy.copy(leaf) if found else leaf
        for name, value in found:
            if isinstance(leaf, Mapping):
                made[name] = value
            else:
                # Frozen dataclasses, too.
                object.__setattr__(made, name, value)
        return made

    return tree_map(changed, output)


def _parts(leaf: Any) -> Iterator[tuple[Any, Any]]:
    """The values with tensors of an object that PyTorch does not know as a container."""
    if isinstance(leaf, (nn.Module, type)):
        return
    if isinstance(leaf, Mapping):
        named = dict(leaf.items())
    elif is_dataclass(leaf):
        named = {one.name: getattr(leaf, one.name, None) for one in fields(leaf)}
    else:
        named = dict(attributes_of(leaf))
    for name, value in named.items():
        if isinstance(value, (Tensor, tuple, list, Mapping)) or is_dataclass(value):
            yield name, value


def attributes_of(value: object) -> Iterator[tuple[str, Any]]:
    """The attributes that an object itself holds, in its slots and its dictionary."""
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()
