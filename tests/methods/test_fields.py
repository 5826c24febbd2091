"""Fields of methods: what is none of their kind is refused when the method is made."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from typing import Any

import pytest

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, SaliencyError
from saliency_fast.methods import METHODS

FIELDS = [(kind, field) for kind in METHODS.values() for field in dataclasses.fields(kind)]
FLAGS = [(kind, field.name) for kind, field in FIELDS if isinstance(field.default, bool)]
NUMBERS = [
    (kind, field.name)
    for kind, field in FIELDS
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
]
WRONG: list[Any] = ["x", -1, True, None, [], (), (None,), {}, object(), math.nan, math.inf, 10**40]


def said(pair: Any) -> str:
    return getattr(pair, "__name__", str(pair))


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda one: getattr(one, "name", ""))
@pytest.mark.parametrize("value", WRONG, ids=lambda one: str(one)[:7])
def test_no_error_but_ours(kind: Any, field: Any, value: Any) -> None:
    with suppress(SaliencyError):
        kind(**{field.name: value}).recipe()


@pytest.mark.parametrize(("kind", "name"), FLAGS, ids=said)
def test_flags_are_true_or_false(kind: Any, name: str) -> None:
    for value in ("no", 0, 1, None, 2.5, []):
        with pytest.raises(InputTypeError, match=f"{name} must be True or False: got"):
            kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=said)
def test_numbers_are_numbers(kind: Any, name: str) -> None:
    for value in (math.nan, True, {}, object()):
        with pytest.raises((InputError, InputTypeError), match=name):
            kind(**{name: value})


def test_fields_of_lrp() -> None:
    for bounds in (
        "ab",
        (0.0,),
        (1.0, 0.0),
        ("a", "b"),
        (math.nan, 1.0),
        ([0.0, 0.0, 0.0], [1.0, 2.0]),
    ):
        with pytest.raises((InputError, InputTypeError), match=r"bounds|low"):
            sf.LRP("epsilon_gamma_box", bounds=bounds)
    with pytest.raises(InputError, match=r"bounds are for .*: got .* 'epsilon'"):
        sf.LRP("epsilon", bounds=(0.0, 1.0))
    for layers in (3, "head", ("head",), (("head", "flat", 1),), ((1, "flat"),)):
        with pytest.raises((InputError, InputTypeError), match="layers must be"):
            sf.LRP(layers=layers)


def test_grids_of_tokens() -> None:
    for grid in (3, "14", (), (0, 2), (2.0, 2), object()):
        with pytest.raises((InputError, InputTypeError), match="grid must be"):
            sf.AttentionRollout(grid=grid)
