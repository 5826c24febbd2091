"""Rows: the methods and controls of a report, each with its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import CONTROLS
from saliency_fast.evaluate.subject import Explainer, Model, Subject, read_maps, read_subject
from saliency_fast.methods import read_method

Given = Explainer | Attribution | Tensor
EXPECTED = (
    "a method, its name, a function (model, inputs, target) -> maps, an Attribution or a tensor of "
    "maps"
)


@dataclass(frozen=True, eq=False)
class Row:
    """A method, or a control, before it has explained."""

    name: str
    given: Given
    control: bool = False

    def subject(self, base: Subject) -> tuple[Subject, tuple[str, ...], dict[str, Any]]:
        """What is judged of this row, the caveats of its maps, and how they were made.

        base: the inputs, with their targets looked up.
        """
        given, model = self.given, cast(Model, base.model)
        if isinstance(given, Tensor):
            return base.beside(base.read(given), None), (), {"kind": "maps"}
        if isinstance(given, Attribution):
            _same_targets(given, base)
            own = read_subject(
                None, base.running.back(base.inputs), given, layout=base.running.letters
            )
            past = own.baseline if base.baseline is None else base.baseline
            return (base.beside(own.values, own.method, past), *_told(given))
        if isinstance(given, str) or hasattr(given, "recipe"):
            method = read_method(cast(Any, given))
            found = base.attribution(method, base.inputs, model)
            if found.many:
                raise InputError(
                    f"{self.name} gave several maps per example, and one is judged: pass target= "
                    "one class, or int64 [B]"
                )
            return (base.beside(base.read(found.values), method), *_told(found))
        # Our own controls know the standard layout alone.
        own_control = given in CONTROLS.values()
        x = base.inputs if own_control else base.running.cast(base.inputs)
        made = cast(Callable[..., Tensor], given)(model, x, base.classes)
        about = {"kind": "control" if self.control else "function", "function": _name_of(given)}
        return base.beside(read_maps(made, x) if own_control else base.read(made), given), (), about


def _told(found: Attribution) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The caveats of an attribution, and how it was made."""
    past, notes = found.provenance, []
    if found.converged is not None and not bool(found.converged.all()):
        count = int((~found.converged).sum())
        notes.append(f"{count} of {len(found.converged)} maps are not within their tolerance")
    about = {
        "kind": "method",
        "method": past.method,
        "parameters": past.parameters,
        "baseline": past.baseline,
        "at": past.at,
        "error": float(found.error.max()),
        "explained_in_seconds": past.seconds,
    }
    return tuple(notes), about


def read_rows(methods: Any, controls: Any) -> list[Row]:
    """Methods and then controls, with names that differ; raises for what is neither."""
    rows = [Row(name, _read(name, one)) for name, one in _named(methods, "methods")]
    if not rows:
        raise InputError(f"methods must hold one at least: got {methods!r}; expected {EXPECTED}")
    for name, one in _named(controls, "controls"):
        if isinstance(one, str):
            if one not in CONTROLS:
                raise InputError(
                    f"controls must be of {', '.join(CONTROLS)}, or functions (model, inputs, "
                    f"target) -> maps: got {one!r}"
                )
            one = CONTROLS[one]
        rows.append(Row(name, _read(name, one), control=True))
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"methods and controls must have names of their own: {', '.join(twice)} is there twice;"
            " pass a mapping from names"
        )
    return rows


def _named(given: Any, what: str) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(str(name), one) for name, one in given.items()]
    if isinstance(given, (str, Tensor, Attribution)) or not isinstance(given, Iterable):
        if isinstance(given, Tensor):
            raise InputTypeError(f"{what} must be named: got a tensor; write {{'mine': maps}}")
        given = [given]
    single = list(given)
    taken: list[str] = []
    for one in single:
        taken.append(_unique(one, taken))
    return list(zip(taken, single, strict=True))


def _unique(one: Any, taken: Sequence[str]) -> str:
    """Its name; where that is taken, with the fields that are not as by default."""
    name = _name_of(one)
    if name in taken and is_dataclass(one):
        told = [
            f"{part.name}={getattr(one, part.name)}"
            for part in fields(one)
            if getattr(one, part.name) is not part.default
        ]
        name = f"{name}({', '.join(told)})"
    return name


def _name_of(one: Any) -> str:
    if isinstance(one, str):
        return one
    if isinstance(one, Attribution):
        return one.provenance.method
    if isinstance(one, Tensor):
        raise InputTypeError("methods must be named: got a tensor; write {'mine': maps}")
    name = getattr(one, "name", None)
    return name if isinstance(name, str) else str(getattr(one, "__name__", type(one).__name__))


def _read(name: str, one: Any) -> Given:
    if isinstance(one, (Attribution, Tensor)):
        return one
    if isinstance(one, str) or hasattr(one, "recipe"):
        return read_method(one)
    if not callable(one):
        raise InputTypeError(f"{name} must be {EXPECTED}: got {type(one).__name__}")
    return cast(Explainer, one)


def _same_targets(found: Attribution, base: Subject) -> None:
    """Raises where an attribution explains other classes than those asked about."""
    classes = base.classes
    if found.classes is None or found.many or not isinstance(classes, (int, list, Tensor)):
        return
    asked = torch.as_tensor(classes, device=found.classes.device)
    if asked.shape not in ((), found.classes.shape) or not bool((found.classes == asked).all()):
        raise InputError(
            f"the attribution by {found.provenance.method} explains other classes than those asked "
            "about: pass target=attribution.classes"
        )
