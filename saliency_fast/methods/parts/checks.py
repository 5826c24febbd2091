"""Validation of a method's own fields, when it is made."""

from __future__ import annotations

import math

from saliency_fast.errors import InputError, InputTypeError

MOST = 2**31
"""No field counts as many as this."""


def integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} must be a whole number: got {value!r}")


def whole(name: str, value: object, least: int) -> None:
    integer(name, value)
    assert isinstance(value, int)
    if value < least:
        raise InputError(f"{name} must be at least {least}: got {value}")
    if value >= MOST:
        raise InputError(f"{name} must be less than {MOST}: got {value}")


def positive(name: str, value: object, *, optional: bool = False) -> None:
    """A positive finite number; with `optional` also None."""
    if optional and value is None:
        return
    if not (math.isfinite(given := number(name, value)) and given > 0):
        raise InputError(f"{name} must be a positive finite number: got {value}")


def share(name: str, value: object) -> None:
    if not 0.0 <= number(name, value) <= 1.0:
        raise InputError(f"{name} is a share, from 0 to 1: got {value}")


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number: got {value!r}")
    return value


def choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise InputError(f"{name} must be one of {', '.join(valid)}: got {value!r}")


def seed(value: object) -> None:
    """One int, or one for each example."""
    for one in (value or (None,)) if isinstance(value, tuple) else (value,):
        if isinstance(one, bool) or not isinstance(one, int) or not -(2**63) <= one < 2**63:
            raise InputTypeError(f"seed must be a 64-bit int or a tuple of them: got {value!r}")


def flag(name: str, value: object) -> None:
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
        whole("grid", one, 1)
    return tuple(value)
