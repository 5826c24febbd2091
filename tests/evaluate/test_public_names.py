"""Public names of `saliency_fast.evaluate` have examples, which tests/test_doctests.py runs."""

from __future__ import annotations

import inspect

import pytest

from saliency_fast import evaluate

RESULTS = {
    *("AdversarialScore", "Agreement", "AttackRoc", "Attacked", "Manipulated", "Report", "Roc"),
    "Subject",
}
"""Classes whose examples are those of the functions that make them."""


@pytest.mark.parametrize("name", sorted(set(evaluate.__all__) - RESULTS))
def test_what_is_public_has_an_example(name: str) -> None:
    one = getattr(evaluate, name)
    if callable(one):
        assert ">>> " in (inspect.getdoc(one) or "")
