"""Small models, recorded and as they are."""

from __future__ import annotations

import pytest

from tests.configured import configure


@pytest.fixture(params=["recorded", "as it is"], autouse=True)
def way(request, monkeypatch) -> str:
    configure(monkeypatch, lean_from=0 if request.param == "recorded" else 2**40)
    return request.param
