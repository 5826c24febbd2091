"""Outputs: the tensors in whatever a model returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output, however nested."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        else:
            found += [one for _, value in _parts(leaf) for one in tensors_of(value)]
    return found


def rows_of(output: Any, part: slice, rows: int) -> Any:
    """Some rows of an output of so many; what has no rows is left, to be refused."""
    return map_tensors(lambda one: one[part] if one.dim() and len(one) == rows else one, output)


def map_tensors(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """An output with each of its tensors changed: containers, dataclasses, mappings and objects of
    the user's own are copied, and stay what they are.
    """
    leaves, tree = tree_flatten(output)
    return tree_unflatten([_changed(change, one) for one in leaves], tree)


def _changed(change: Callable[[Tensor], Tensor], leaf: Any) -> Any:
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


def _parts(leaf: Any) -> Iterator[tuple[Any, Any]]:
    """The values with tensors of an object that PyTorch does not know as a container."""
    if isinstance(leaf, (nn.Module, type)):
        return
    if isinstance(leaf, Mapping):
        named = dict(leaf.items())
    elif is_dataclass(leaf):
        named = {one.name: getattr(leaf, one.name, None) for one in fields(leaf)}
    else:
        named = dict(getattr(leaf, "__dict__", {}))
        slots = [getattr(kind, "__slots__", ()) for kind in type(leaf).__mro__]
        names = [one for own in slots for one in ((own,) if isinstance(own, str) else own)]
        named |= {one: getattr(leaf, one) for one in names if hasattr(leaf, one)}
    for name, value in named.items():
        if isinstance(value, (Tensor, tuple, list, Mapping)) or is_dataclass(value):
            yield name, value
