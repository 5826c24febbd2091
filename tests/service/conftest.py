"""Small models, recorded and as they are."""

from __future__ import annotations

import pytest

from saliency_fast.engine import probe as probes


@pytest.fixture(params=["recorded", "as it is"], autouse=True)
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(probes, "LEAN_FROM", 0 if request.param == "recorded" else 2**40)
    return request.param
