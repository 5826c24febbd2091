"""The lean benchmark on tiny models: every row is there, in less memory, and tables render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import end_to_end, lean, tables
from benchmarks.contenders import CAPTUM, LEAN_OFF, NO_PREFIX, ONE_LAUNCH, OURS

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick run, by way of the file that it is saved in."""
    out = tmp_path_factory.mktemp("results")
    found = lean.measure(quick=True, cache=out / ".cache")
    end_to_end.save(found, tables.lean(found), out, "lean-cpu")
    read: dict[str, Any] = json.loads((out / "lean-cpu.json").read_text())
    return read


def of(document: dict[str, Any], part: str, workload: str) -> Rows:
    return {
        row.get("contender", ""): row
        for row in document["rows"]
        if (row["part"], row["workload"]) == (part, workload)
    }


def test_every_contender_has_a_row(document: dict[str, Any]) -> None:
    budgeted = [one for one in lean.QUICK_COMPARISONS if one.share]
    wanted = sum(len(one.names) for one in lean.QUICK_COMPARISONS) + len(lean.QUICK_COUNTED)
    tracked = Path("/proc/self/clear_refs").exists()
    assert len(document["rows"]) == wanted + (len(budgeted) if tracked else 0)
    for row in document["rows"]:
        assert row["reason"] is None, row
        if row["part"] != "saved":
            assert row["seconds"] > 0
            # A ReLU on its kink falls either way in float32: for all contenders alike.
            (first, *_) = of(document, row["part"], row["workload"]).values()
            assert row["error"] < 2 * first["error"] + 1e-5, row
            assert row["error"] < 5e-2, row
            assert (row["contender"] == CAPTUM) == (row["planned_bytes"] is None)


def test_ours_takes_less_memory_than_captum(document: dict[str, Any]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("/proc/self/clear_refs is missing: no high-water mark to reset")
    found = of(document, "launch", "tiny-unet3d")
    ours, captum = found[ONE_LAUNCH], found[CAPTUM]
    assert ours["points_per_launch"] == 4
    assert ours["peak_bytes"] < captum["peak_bytes"]
    assert ours["against"][CAPTUM]["memory"] == captum["peak_bytes"] / ours["peak_bytes"]
    assert ours["against"][LEAN_OFF]["memory"] > 1
    (name,) = (name for name in found if name.endswith("MiB"))
    assert abs(int(name.split()[-2]) - captum["peak_bytes"] / 2**21) <= 0.25 * int(name.split()[-2])
    assert found[name]["planned_bytes"] <= int(name.split()[-2]) * 2**20


def test_saved_bytes_are_counted(document: dict[str, Any]) -> None:
    row = of(document, "saved", "tiny-unet3d")[""]
    assert row["saved_before"] > row["saved_after"] > 0
    assert row["times_less"] == row["saved_before"] / row["saved_after"]


def test_the_prefix_is_off_where_it_says_so(document: dict[str, Any]) -> None:
    found = of(document, "prefix", "volume")
    assert "conv3d" in found[OURS]["prefix"]
    assert found[NO_PREFIX]["prefix"] == ""
    assert found[OURS]["against"][NO_PREFIX]["time"] > 0


def test_tables(document: dict[str, Any], tmp_path: Path) -> None:
    text = tables.lean(document)
    # A header for each part, and all rows.
    assert text.count("\n| ") == len(document["rows"]) + 3
    blocks: list[set[int]] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        blocks += [{line.count("|") for line in lines}] if lines else []
    assert [len(widths) for widths in blocks] == [1, 1, 1]
    (tmp_path / "lean-cpu.json").write_text(json.dumps(document))
    spliced = tables.splice("<!-- benchmark:lean-cpu --><!-- /benchmark:lean-cpu -->", tmp_path)
    assert text in spliced
    assert tables.table("lean-gpu", tmp_path) == tables.NOT_MEASURED + "\n"
