"""Validation of a method's own fields, when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable

from saliency_fast.errors import InputError, InputTypeError

MOST = 2**31 - 1
"""No field counts more than this."""
Rule = int | tuple[str, ...] | Callable[[str, object], object]
"""The smallest whole number, the valid names, or a function of the field's name and value."""


def fields(method: object, **rules: Rule) -> None:
    """Validates fields of a method by a rule for each."""
    for name, rule in rules.items():
        _field(name, getattr(method, name), rule)


def _field(name: str, value: object, rule: Rule) -> None:
    if isinstance(rule, int):
        integer(name, value, rule)
    elif isinstance(rule, tuple):
        choice(name, value, rule)
    else:
        rule(name, value)


def optional(rule: Rule) -> Rule:
    """A rule that also allows None."""
    return lambda name, value: None if value is None else _field(name, value, rule)


def integer(name: str, value: object, least: int | None = None, most: int = MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} must be a whole number: got {value!r}")
    if least is not None and value < least:
        raise InputError(f"{name} must be at least {least}: got {value}")
    if least is not None and value > most:
        raise InputError(f"{name} must be at most {most}: got {value}")


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number: got {value!r}")
    return value


def positive(name: str, value: object) -> None:
    if not (math.isfinite(given := number(name, value)) and given > 0):
        raise InputError(f"{name} must be a positive finite number: got {value}")


def fraction(name: str, value: object) -> None:
    if not 0.0 <= number(name, value) <= 1.0:
        raise InputError(f"{name} is a share, from 0 to 1: got {value}")


def positive_fraction(name: str, value: object) -> None:
    positive(name, value)
    if number(name, value) > 1:
        raise InputError(f"{name} is a share, at most 1: got {value}")


def choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise InputError(f"{name} must be one of {', '.join(valid)}: got {value!r}")


def seed(name: str, value: object) -> None:
    """One int, or one for each example."""
    for one in (value or (None,)) if isinstance(value, tuple) else (value,):
        if isinstance(one, bool) or not isinstance(one, int) or not -(2**63) <= one < 2**63:
            raise InputTypeError(f"{name} must be a 64-bit int or a tuple of them: got {value!r}")


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputTypeError(f"{name} must be True or False: got {value!r}")


def layers(value: object) -> str | tuple[str, ...]:
    """A layer's name, or several as a tuple."""
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise InputTypeError(
        f'layer must be a name, several names or "auto": got {value!r}; pass modules to the call, '
        "as at="
    )


def grid(value: object) -> tuple[int, ...] | None:
    """None, or a positive whole number for each spatial axis."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or not value:
        raise InputTypeError(f"grid must be a tuple such as (14, 14): got {value!r}")
    for one in value:
        integer("grid", one, 1)
    return tuple(value)
