"""The examples in the documentation of methods."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from saliency_fast.methods import METHODS


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_examples(kind: Any) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(kind, kind.__name__, globs={})
    assert example.examples
    runner = doctest.DocTestRunner()
    assert runner.run(example).failed == 0
