"""The examples in the docstrings of `saliency_fast.evaluate` print what they say."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest

from saliency_fast import evaluate

MODULES = [one.name for one in pkgutil.walk_packages(evaluate.__path__, f"{evaluate.__name__}.")]
RESULTS = {
    *("AdversarialScore", "Agreement", "AttackRoc", "Attacked", "Manipulated", "Report", "Roc"),
    "Subject",
}
"""Classes whose examples are those of the functions that make them."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(set(evaluate.__all__) - RESULTS))
def test_what_is_public_has_an_example(name: str) -> None:
    one = getattr(evaluate, name)
    if callable(one):
        assert ">>> " in (inspect.getdoc(one) or "")
