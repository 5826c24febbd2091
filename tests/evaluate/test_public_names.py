"""Public names of `saliency_fast.evaluate` have examples, which tests/test_doctests.py runs."""

from __future__ import annotations

import inspect

import pytest

from saliency_fast import evaluate

RESULTS = {
    *("AdversarialScore", "Agreement", "AttackRoc", "Attacked", "Manipulated", "Report", "Roc"),
    "EvaluationInput",
}
"""Classes whose examples are those of the functions that make them."""


@pytest.mark.parametrize("name", sorted(set(evaluate.__all__) - RESULTS))
def test_what_is_public_has_an_example(name: str) -> None:
    one = getattr(evaluate, name)
    if callable(one):
        assert ">>> " in (inspect.getdoc(one) or "")


def test_the_old_name_of_the_evaluation_input_warns() -> None:
    with pytest.deprecated_call(match=r"removed in 0\.3: use evaluate\.EvaluationInput"):
        assert evaluate.Subject is evaluate.EvaluationInput
    assert not hasattr(evaluate, "Subjects")
