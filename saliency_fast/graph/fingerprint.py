"""Tells whether a model is still the one that was recorded."""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saliency_fast._torch_compat import HOOKS_OF_ALL_MODULES
from saliency_fast.graph.outputs import attributes_of

_PLAIN = (int, float, complex, str, bytes, range, type(None), np.generic, torch.dtype, torch.device)
_FREQUENT = frozenset((int, float, bool, str, type(None)))
_TABLES = frozenset((dict, OrderedDict, list, tuple, set))
_TENSORS = frozenset((Tensor, nn.Parameter))
_OTHERS = frozenset(("torch", "numpy", *sys.stdlib_module_names))
"""Packages whose own code is taken to stay the same."""
_OPAQUE = frozenset(("logging", "threading", "_thread", "io", "_io"))
"""Packages whose objects no result depends on."""
_DEPTH = 4
"""How far objects are followed that are neither modules nor containers of PyTorch's."""
_ARRAY = 2**16
"""Bytes up to which an array of NumPy's counts by its numbers."""
_DESCRIPTORS = frozenset(
    (type(int.real), type(int.__add__), type(int.from_bytes), type(FunctionType.__code__))
)
"""Types of attributes of classes that are written in C."""

Known = dict[int, tuple[object, ...]]
"""Fingerprints by the ids of models."""
_HELD = threading.local()


def fingerprint(*values: object) -> tuple[object, ...]:
    """Equal for equal modules, settings and code: tensors by identity (programs read their numbers
    anew), numbers and text by value, functions by their code and what they close over or read.
    """
    walk = _Walk()
    for value in (*values, *HOOKS_OF_ALL_MODULES):
        walk.visit(value, _DEPTH)
    return tuple(walk.found)


def model_fingerprint(model: object, *, anew: bool = False) -> tuple[object, ...]:
    """The fingerprint of a model; inside `unchanging` that of its beginning, but for `anew`."""
    known: Known | None = getattr(_HELD, "known", None)
    if known is None or anew:
        return fingerprint(model)
    if id(model) not in known:
        known[id(model)] = fingerprint(model)
    return known[id(model)]


@contextmanager
def unchanging(known: Known | None = None) -> Iterator[None]:
    """Inside, this thread takes models to be as at its first look; known: filled."""
    outer: Known | None = getattr(_HELD, "known", None)
    if known is None:
        known = {} if outer is None else outer
    for model, found in (outer or {}).items():
        known.setdefault(model, found)
    _HELD.known = known
    try:
        yield
    finally:
        _HELD.known = outer


class _Walk:
    """Collects all that a model's behaviour depends on."""

    def __init__(self) -> None:
        self.found: list[object] = []
        # With the values, so that none is gone and its id another's while the walk lasts.
        self.seen: dict[int, tuple[int, object]] = {}
        self.kinds: set[type] = set()

    def visit(self, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN):
            # True and 1 are equal, and not the same setting.
            self.found.append((type(value), value))
        elif isinstance(value, (Tensor, ModuleType)):
            self.found.append(id(value))
        elif isinstance(value, (type, BuiltinFunctionType)):
            self.found.append(value)
        elif self.is_new(value):
            # Not by its id: containers and bound methods may be made anew for every call.
            self.found.append(type(value))
            if isinstance(value, nn.Module):
                self.module(value, depth)
            elif depth:
                self.parts(value, depth - 1)
            else:
                self.found.append(id(value))

    def is_new(self, value: object) -> bool:
        found = self.seen.get(id(value))
        if found is None:
            self.seen[id(value)] = len(self.seen), value
            return True
        self.found.append(("again", found[0]))
        return False

    def module(self, value: nn.Module, depth: int) -> None:
        """A module costs no depth: its parts count however deep they lie."""
        if type(value) not in self.kinds:
            self.kinds.add(type(value))
            self.member(type(value), "forward", depth)
        # A copy, here and below: other threads may set attributes, or register hooks, meanwhile.
        own = vars(value).copy()
        # Modules have dozens of settings and empty tables each: most of the walk's time.
        names, kinds = tuple(own), tuple(map(type, own.values()))
        settings, tables, others = _sorted_by_kind(names, kinds)
        self.found += (names, kinds, *[own[name] for name in settings])
        for name in tables:
            if part := own[name]:
                self.found.append(name)
                self.visit(part, depth)
        for name in others:
            self.visit(own[name], depth)

    def parts(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self.mapping(value, depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            self.found.append(len(value))
            self.all(tuple(value), depth + 1)
        elif isinstance(value, FunctionType):
            self.function(value, None, depth)
        elif isinstance(value, MethodType):
            self.all((value.__func__, value.__self__), depth + 1)
        elif isinstance(value, functools.partial):
            self.all((value.func, value.args, value.keywords), depth + 1)
        elif _package(type(value)) in _OPAQUE:
            self.found.append(id(value))
        elif isinstance(value, np.ndarray) and value.nbytes <= _ARRAY:
            self.found += (value.dtype.str, value.shape, value.tobytes())
        else:
            self.attributes(value, depth)

    def attributes(self, value: object, depth: int) -> None:
        """An object of another class, by its attributes and its class's."""
        held = dict(attributes_of(value))
        if not held:
            self.found.append(id(value))
        self.member(type(value), "__call__", depth)
        for kind in type(value).__mro__:
            if _package(kind) not in _OTHERS:
                shared = {n: one for n, one in tuple(vars(kind).items()) if type(one) in _FREQUENT}
                self.mapping(shared, depth)
        self.mapping(held, depth)

    def function(self, value: FunctionType, owner: type | None, depth: int) -> None:
        """By its code and what that reads: its globals, its cells, and attributes of `owner`."""
        self.found.append(value.__code__)
        if _package(value) in _OTHERS:
            return
        names = _names(value.__code__)
        for name in names:
            if name in value.__globals__:
                self.named(value.__globals__[name], names, depth)
            if owner is not None:
                self.member(owner, name, depth)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                self.visit(cell.cell_contents, depth)
        self.all((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()), depth)

    def named(self, value: Any, names: tuple[str, ...], depth: int) -> None:
        """A global; of a module or class the attributes that go by one of `names`."""
        if not isinstance(value, (ModuleType, type)) or _package(value) in _OTHERS:
            self.visit(value, depth)
        elif depth:
            held = vars(value)
            for name in names:
                if name in held:
                    self.named(held[name], names, depth - 1)

    def member(self, owner: type, name: str, depth: int) -> None:
        """An attribute of a class, and what it reads if it is code."""
        found = next((vars(kind)[name] for kind in owner.__mro__ if name in vars(kind)), None)
        code = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if isinstance(code, FunctionType):
            if self.is_new(code):
                self.function(code, owner, depth)
        elif found is not None and type(found) not in _DESCRIPTORS:
            self.visit(found, depth)

    def mapping(self, value: Mapping[Any, object], depth: int) -> None:
        self.found.append(len(value))
        for name, part in _items(value):
            kind = type(part)
            self.found.append(name if type(name) in _FREQUENT else id(name))
            if kind in _FREQUENT:
                self.found += (kind, part)
            elif kind in _TENSORS:
                self.found.append(id(part))
            elif kind not in _TABLES or part:
                self.visit(part, depth)

    def all(self, values: Iterable[object], depth: int) -> None:
        for value in values:
            self.visit(value, depth)


def _items(value: Mapping[Any, object]) -> tuple[tuple[Any, object], ...]:
    """A copy, also of an ordered dictionary that another thread changes meanwhile."""
    with suppress(RuntimeError):
        return tuple(value.items())
    return tuple(dict.items(value)) if isinstance(value, dict) else tuple(value.items())


@functools.lru_cache(maxsize=4096)
def _sorted_by_kind(names: tuple[str, ...], kinds: tuple[type, ...]) -> tuple[list[str], ...]:
    """The names of a module's attributes: plain settings, containers and all others."""
    settings, tables, others = list[str](), list[str](), list[str]()
    for name, kind in zip(names, kinds, strict=True):
        (settings if kind in _FREQUENT else tables if kind in _TABLES else others).append(name)
    return settings, tables, others


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function's code, and in functions inside it."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for one in inner for name in _names(one))]))


def _package(value: Any) -> str:
    """The top-level package of a module, class or function."""
    home = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return (home or "").partition(".")[0]
