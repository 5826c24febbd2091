"""Captured launches need a recorded program: also calls of few points are recorded here, and
captured at once, however long they take.
"""

from __future__ import annotations

import math

import pytest

from tests.configured import RECORDED, configure


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, **RECORDED, graph_calls=1, graph_seconds=math.inf)
