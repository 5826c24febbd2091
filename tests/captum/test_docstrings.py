"""Public classes and functions have docstrings; tests/test_doctests.py runs their examples."""

from __future__ import annotations

import inspect

import pytest

import saliency_fast.captum as facade


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
