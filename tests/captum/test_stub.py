"""Editors and type checkers read the arguments of the facade from a stub, which this file writes:
`python tests/captum/test_stub.py`. They are made at run time, where no static tool sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import saliency_fast.captum as facade

STUB = Path(facade.__file__).with_suffix(".pyi")
HEAD = '''\
# Written by tests/captum/test_stub.py from the signatures of the classes.
# fmt: off
# ruff: noqa: E501, N801
# mypy: disable-error-code="override, misc"
"""The classes of Captum 0.9 on this library's engine: only the import changes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saliency_fast.captum import visualization as visualization

def __getattr__(name: str) -> Any: ...
'''
ATTRIBUTES = [
    "    def __getattr__(self, name: str) -> Any: ...",
    "    def __setattr__(self, name: str, value: Any) -> None: ...",
]
TYPES = {
    "inputs": "Tensor | tuple[Tensor, ...]",
    "internal_batch_size": "int | None",
    "nt_samples_batch_size": "int | None",
    "stdevs": "float | tuple[float, ...]",
}
"""Arguments whose type the default does not tell."""


def with_type(one: inspect.Parameter) -> inspect.Parameter:
    """A parameter with its type: the annotated one, or that of its default."""
    kind: Any = one.annotation
    if kind is one.empty and one.name not in ("self", "cls"):
        plain = isinstance(one.default, (bool, int, float, str))
        kind = TYPES.get(one.name, type(one.default).__name__ if plain else "Any")
    default = ... if callable(one.default) and one.default is not one.empty else one.default
    return one.replace(annotation=kind, default=default)


def signature_of(function: Any) -> str:
    own = inspect.signature(function)
    returned = "Any" if own.return_annotation is own.empty else own.return_annotation
    several = [with_type(one) for one in own.parameters.values()]
    text = str(own.replace(parameters=several, return_annotation=returned))
    names = {one.annotation for one in several} | {returned}
    for name in names - {inspect.Parameter.empty}:
        text = text.replace(repr(name), str(name))
    return text.replace("torch.nn.", "nn.").replace("Ellipsis", "...")


def bases_of(kind: type) -> Iterator[type]:
    """The public bases of a class, through those that are not public."""
    for base in kind.__bases__:
        if base.__name__ in facade.__all__:
            yield base
        elif base.__module__.startswith(facade.__name__):
            yield from bases_of(base)


def members(kind: type) -> dict[str, Any]:
    """What a class has and its public bases do not: its own, and that of classes not public."""
    inherited = {one for base in bases_of(kind) for one in base.__mro__}
    own = (one for one in kind.__mro__ if one not in inherited)
    mine = [one for one in own if one.__module__.startswith(facade.__name__)]
    names = sorted({name for one in mine for name in vars(one)})
    public = (name for name in names if not name.startswith("_") or name == "__init__")
    return {name: inspect.getattr_static(kind, name) for name in public}


def class_lines(kind: type) -> list[str]:
    names = ", ".join(dict.fromkeys(base.__name__ for base in bases_of(kind)))
    # Roots have attributes, which their instances set.
    lines = [] if names else ATTRIBUTES[:]
    for name, value in members(kind).items():
        if isinstance(value, (property, staticmethod, classmethod)):
            lines.append(f"    @{type(value).__name__}")
            value = value.fget if isinstance(value, property) else value.__func__
        if isinstance(value, FunctionType):
            lines.append(f"    def {name}{signature_of(value)}: ...")
    head = f"class {kind.__name__}({names}):" if names else f"class {kind.__name__}:"
    return ["", head, *lines] if lines else ["", f"{head} ..."]


def stub() -> str:
    lines, done = [], set[str]()
    own = [getattr(facade, name) for name in facade.__all__ if name != "visualization"]
    while own:
        one = own.pop(0)
        if isinstance(one, type) and not done.issuperset(b.__name__ for b in bases_of(one)):
            own.append(one)
            continue
        done.add(one.__name__)
        if isinstance(one, type):
            lines += class_lines(one)
        else:
            lines += ["", f"def {one.__name__}{signature_of(one)}: ..."]
    return HEAD + "\n".join(lines) + "\n"


def test_the_stub_has_the_signatures_of_the_classes() -> None:
    assert STUB.read_text() == stub(), "run `python tests/captum/test_stub.py`"


if __name__ == "__main__":
    STUB.write_text(stub())
