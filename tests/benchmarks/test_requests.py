"""The benchmark of requests: callers take turns and are all counted, and every way has a row."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import end_to_end, requests, tables
from benchmarks.contenders import CAPTUM
from benchmarks.requests import ALONE, BATCH, MANY, ONE_BY_ONE, SUBMIT, drive, percentile


def test_percentile() -> None:
    assert percentile(range(100, 0, -1), 0.95) == 95
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([7.0], 0.95) == 7.0


def test_callers_run_at_the_same_time() -> None:
    together, seen = threading.Barrier(4), []

    def call(number: int) -> None:
        # Passes only where all four are inside.
        together.wait(10)
        seen.append(number)

    with ThreadPoolExecutor(4) as pool:
        seconds, latencies = drive(call, pool, 4, 3)
    assert sorted(seen) == sorted([0, 1, 2, 3] * 3)
    assert len(latencies) == 12
    assert 0 < max(latencies) <= seconds


def test_what_goes_wrong_in_a_caller_is_raised() -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        drive(lambda number: 1 / number, pool, 2, 1)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick run, by way of the file that it is saved in."""
    out = tmp_path_factory.mktemp("results")
    found = requests.measure(quick=True)
    end_to_end.save(found, requests.table(found), out, "requests-cpu")
    read: dict[str, Any] = json.loads((out / "requests-cpu.json").read_text())
    return read


def test_every_way_has_a_row(document: dict[str, Any]) -> None:
    (load,) = requests.QUICK_LOADS
    found = [
        (row["callers"], row["way"], row["calls"])
        for row in document["rows"]
        if row["part"] == "callers"
    ]
    assert found == [(n, way, 6) for n in load.callers for way in (ALONE, SUBMIT, CAPTUM)]
    at_once = [row for row in document["rows"] if row["part"] == "at once"]
    assert [row["way"] for row in at_once] == [ONE_BY_ONE, MANY, BATCH]
    assert at_once[0]["times_one_by_one"] == 1.0


def test_all_ways_give_the_same_maps(document: dict[str, Any]) -> None:
    rows = [row for row in document["rows"] if row["part"] == "callers"]
    assert all(row["from_captum"] < 1e-5 for row in rows)


def test_what_the_service_counted(document: dict[str, Any]) -> None:
    for row in (row for row in document["rows"] if row["part"] == "callers"):
        assert 0 < row["median_seconds"] <= row["slow_seconds"]
        assert (row["way"] == SUBMIT) == ("fill" in row)
        if row["way"] == SUBMIT:
            assert row["points"] == row["calls"] * requests.QUICK_LOADS[0].setting.points
            assert 1 <= row["launches"] <= row["calls"]
            assert 0 < row["fill"] <= 1
            assert 0 < row["queue_seconds"] < row["slow_seconds"]


def test_tables(document: dict[str, Any], tmp_path: Path) -> None:
    text = requests.table(document)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block) - 2 for block in blocks] == [6, 3]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    (tmp_path / "requests-cpu.json").write_text(json.dumps(document))
    assert tables.table("requests-cpu", tmp_path) == text
    summary = tables.table("requests-cpu-summary", tmp_path)
    lines = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(lines) == len(requests.QUICK_LOADS[0].callers) + 2
    assert len({line.count("|") for line in lines}) == 1
