"""Which embedding tables turn the explained input into vectors, and in which of their calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from saliency_fast.errors import InputError
from saliency_fast.model.guard import uncompiled
from saliency_fast.model.layers import Layer, OneCall, module_of, names_of
from saliency_fast.model.recomputation import without_recomputation

_FIRST = frozenset("expand_as view_as reshape_as type_as to".split())
"""Calls of which other arguments tell a shape or a type."""
_SHAPES = ("_like", "new_")
"""Calls that make new numbers in the shape of an argument."""


@dataclass(frozen=True)
class Lookup:
    """One call of a table with ids that come from the explained input."""

    table: nn.Module
    call: int
    ids: Tensor
    several: bool = False
    """Whether the table runs more than once."""

    @property
    def layer(self) -> Layer:
        """The table, or the one of its calls."""
        return OneCall(self.table, self.call) if self.several else self.table


def lookups(model: object, run: Callable[[], Any], inputs: Sequence[Tensor]) -> list[Lookup]:
    """The calls of embedding tables in `run` whose ids are numbers of `inputs`, however these were
    cut, moved, added to or cast; not tables of positions or of types, whose ids follow from shapes
    or from comparisons alone.

    Raises InputError where there is none.
    """
    module = module_of(model)
    kinds = (nn.Embedding, nn.EmbeddingBag)
    tables: list[nn.Module] = [one for one in module.modules() if isinstance(one, kinds)]
    named = getattr(module, "get_input_embeddings", None)
    own = named() if callable(named) else None
    if isinstance(own, nn.Module) and not any(one is own for one in tables):
        tables.append(own)
    if not tables:
        raise InputError(
            "at='embeddings': the model has no torch.nn.Embedding and no get_input_embeddings(); "
            "name the layer that makes vectors of tokens"
        )
    mode, found, counts = _Follows(inputs), list[Lookup](), dict[nn.Module, int]()
    thread = threading.get_ident()

    def before(table: nn.Module, args: Any, kwargs: Any = None) -> None:
        if threading.get_ident() == thread:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            mode.inside.append(_Inside(given[:1]))

    def after(table: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread:
            number = counts[table] = counts.get(table, -1) + 1
            # Tables of positions may be given the tokens for the sake of their number.
            ids = mode.inside.pop()
            own = [one for one in ids.looked_up or ids.given if mode.follows(one)]
            found.extend(Lookup(table, number, one.detach()) for one in own[:1])

    with uncompiled(), without_recomputation(), ExitStack() as stack, torch.no_grad():
        for table in tables:
            stack.callback(table.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(table.register_forward_hook(after).remove)
        with mode:
            run()
    if not found:
        names = ", ".join(map(repr, names_of(model, tables)))
        raise InputError(
            f"at='embeddings': no table of the model gets ids from the explained input: it has "
            f"{names}; name the layer that makes vectors of the input"
        )
    return [replace(one, several=counts[one.table] > 0) for one in found]


def embeddings(
    model: object, run: Callable[[], Any], inputs: Sequence[Tensor]
) -> tuple[Layer, ...]:
    """The layers that `at="embeddings"` means, in the order in which they run."""
    return tuple(one.layer for one in lookups(model, run, inputs))


@dataclass
class _Inside:
    """A table at work: the tensor that it was given, and those that it looks up."""

    given: list[Tensor]
    looked_up: list[Tensor] = field(default_factory=list)


class _Follows(TorchFunctionMode):
    """Follows numbers of some tensors through the calls of a model.

    By identity, with weak references: activations are let go of as they would be.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self.inside: list[_Inside] = []
        for one in inputs:
            self._add(one)

    def follows(self, value: object) -> bool:
        """Whether a tensor holds numbers of the inputs, or of what was made from them."""
        known = self._known.get(id(value))
        return known is not None and known() is value

    def _add(self, tensor: Tensor) -> None:
        self._known[id(tensor)] = weakref.ref(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("embedding", "embedding_bag") and self.inside:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.inside[-1].looked_up += [one for one in given if not one.is_floating_point()]
        result = func(*args, **kwargs)
        if any(part in name for part in _SHAPES):
            return result
        sources = args[:1] if name in _FIRST else (args, kwargs)
        if any(self.follows(one) for one in tree_leaves(sources)):
            # What was compared is no number of the input's any more.
            made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
            if name in ("__setitem__", "copy_") or (name.endswith("_") and not name.endswith("__")):
                made += [one for one in args[:1] if isinstance(one, Tensor)]
            for one in made:
                if one.dtype != torch.bool:
                    self._add(one)
        return result
