"""Captured launches need a recorded program: also calls of few points are recorded here."""

from __future__ import annotations

import pytest

from tests.configured import RECORDED, configure


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, **RECORDED)
