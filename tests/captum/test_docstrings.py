"""The examples of docstrings run, and public classes and functions have docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import saliency_fast.captum as facade

MODULES = [one.name for one in pkgutil.iter_modules(facade.__path__, "saliency_fast.captum.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


@pytest.mark.parametrize("name", [one for one in facade.__all__ if one != "visualization"])
def test_public_names_are_documented(name: str) -> None:
    own = getattr(facade, name)
    assert inspect.getdoc(own)
    if (
        name.startswith(("Lime", "Layer", "Neuron", "Feature", "Shapley"))
        and name[-9:] != "tribution"
    ):
        assert "Example:" in own.__doc__
        assert own.attribute.__doc__
