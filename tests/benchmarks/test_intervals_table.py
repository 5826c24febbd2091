"""The command that counts how often intervals hold the truth, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import intervals


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["intervals", "--quick", "--out", str(tmp_path)])
    intervals.main()
    document = json.loads((tmp_path / "intervals.json").read_text())
    assert {row["gradient"] for row in document["rows"]} == {k.name for k in intervals.KINDS}
    assert all(0.5 < row["variance"] <= 1 for row in document["rows"])
    assert (tmp_path / "intervals.md").read_text() == intervals.table(document)
