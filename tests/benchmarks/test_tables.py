"""Pages that hold tables: README and what lies under docs/, all written and all checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import tables

EMPTY = "<!-- benchmark:lean-gpu --><!-- /benchmark:lean-gpu -->\n"
FILLED = f"<!-- benchmark:lean-gpu -->\n{tables.NOT_MEASURED}\n<!-- /benchmark:lean-gpu -->\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", *arguments])
    tables.main()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(FILLED)
    (tmp_path / "docs" / "one.md").write_text(EMPTY)
    found = tables.pages(tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: found)
    return tmp_path


def test_a_page_under_docs_is_checked_and_written(root: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=r"one\.md: stale"):
        run(monkeypatch, "--check")
    assert (root / "docs" / "one.md").read_text() == EMPTY
    run(monkeypatch)
    assert (root / "docs" / "one.md").read_text() == FILLED
    run(monkeypatch, "--check")


def test_pages_can_be_named(root: Path, monkeypatch) -> None:
    run(monkeypatch, "--check", str(root / "README.md"))


def test_every_page_of_the_project_has_current_tables() -> None:
    for path in tables.pages():
        assert tables.splice(path.read_text()) == path.read_text(), path.name
