"""Models that memory-efficient executors could get wrong, against naive autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest

import saliency_fast as sf
from tests.model.answers import METHODS, always_lean, check, way_of, why
from tests.model.lean_layers import CASES


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name: str, method: Any) -> None:
    case = CASES[name]
    engine = sf.Engine(case.make(), method, points_per_launch=case.launch)
    check(engine, case)
    assert way_of(engine) == case.way, why(engine)
