"""The end-to-end benchmarks on tiny settings: right numbers, and tables that render."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, plots, reference, tables
from benchmarks.cases import QUICK_CASES, Case, sized
from benchmarks.contenders import CAPTUM, LOOP, ON_CPU, OURS, TUNED, Setting, search
from benchmarks.processes import Child, ContenderError
from benchmarks.race import Clock, Entry, race, rows


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quick run, by way of the file that it is saved in."""
    out = tmp_path_factory.mktemp("results")
    found = end_to_end.measure(quick=True, cache=out / ".cache")
    end_to_end.save(found, tables.full(found), out, "end-to-end-cpu")
    read: dict[str, Any] = json.loads((out / "end-to-end-cpu.json").read_text())
    return read


def test_every_contender_has_a_row_in_every_race(document: dict[str, Any]) -> None:
    races = sum(len(case.batches) for case in QUICK_CASES) * 3
    assert len(document["rows"]) == races * len(ON_CPU)
    for row in document["rows"]:
        assert row["reason"] is None, row
        assert row["rounds"] >= 1
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["gradients_per_second"] > 0
        assert row["times_captum"] == 1.0 or row["contender"] != CAPTUM


@pytest.mark.parametrize("name", [OURS, CAPTUM, TUNED, LOOP])
def test_exact_methods_agree_with_float64(document: dict[str, Any], name: str) -> None:
    found = [row for row in document["rows"] if row["contender"] == name]
    assert all(row["error"] < 1e-5 for row in found if row["method"] != "smoothgrad")
    # Four samples: far from the mean, but explaining the same thing.
    assert all(row["error"] < 1.0 for row in found if row["method"] == "smoothgrad")


def test_memory_is_reported_where_the_system_measures_it(document: dict[str, Any]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("/proc/self/clear_refs is missing: no high-water mark to reset")
    assert all(row["peak_bytes"] > 0 for row in document["rows"])


def test_the_machine_is_described_without_its_directories(document: dict[str, Any]) -> None:
    about = document["setting"]
    assert {"device", "cores", "torch", "captum", "date", "command"} <= about.keys()
    assert about["command"].startswith("python -m benchmarks.")
    assert str(Path.cwd()) not in json.dumps(document)


def test_tables(document: dict[str, Any]) -> None:
    full, summary = tables.full(document), tables.summary(document)
    assert full.count("\n| ") == len(document["rows"]) + 1
    assert summary.count("\n| ") == len(document["rows"]) / len(ON_CPU) + 1
    for text in (full, summary):
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1
        assert document["setting"]["command"] in text


def test_splice(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "end-to-end-cpu.json").write_text(json.dumps(document))
    name = "end-to-end-cpu-summary"
    text = (
        f"before\n<!-- benchmark:{name} -->\nold\n<!-- /benchmark:{name} -->\nbetween\n"
        "<!-- benchmark:end-to-end-gpu --><!-- /benchmark:end-to-end-gpu -->\nafter\n"
    )
    once = tables.splice(text, tmp_path)
    assert tables.summary(document) in once
    assert "old" not in once
    assert f"{tables.NOT_MEASURED}\n<!-- /benchmark:end-to-end-gpu -->" in once
    assert [part in once for part in ("before\n", "\nbetween\n", "\nafter\n")] == [True] * 3
    assert tables.splice(once, tmp_path) == once
    assert tables.splice("no marker", tmp_path) == "no marker"


def test_a_failure_is_a_row_with_its_reason() -> None:
    case = Case("mlp", (1,))
    entries = {OURS: Entry(reason="out of memory"), CAPTUM: Entry([2.0, 1.0, 4.0])}
    found = rows(case, 1, Setting("gradient"), entries)
    assert [row["times_captum"] for row in found] == [None, 1.0]
    assert found[1]["seconds"] == 2.0
    text = tables.full({"setting": end_to_end.machine("cpu"), "rows": found})
    assert "| saliency_fast | out of memory | - |" in text


def test_contenders_that_would_be_late_are_named() -> None:
    expected = {OURS: 5.0}
    late: dict[str, Any] = {OURS: None}
    entries = race(
        late, Setting("gradient"), None, Clock(1.0), seconds=1, rounds=1, expected=expected
    )
    assert entries[OURS].reason == "time"


def test_a_child_that_cannot_start_says_why() -> None:
    child = Child("mlp", None, "nobody")
    with pytest.raises(ContenderError, match="contender must be one of saliency_fast, captum"):
        child.ready()
    child.close()


def test_the_reference_is_cached_and_follows_the_weights(tmp_path: Path) -> None:
    setting = Setting("integrated_gradients", 3)
    workload = sized("mlp")
    first = reference.attribution(workload, setting, examples=1, samples=0, cache=tmp_path)
    again = reference.attribution(workload, setting, examples=1, samples=0, cache=tmp_path)
    assert torch.equal(first, again)
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert first.dtype == torch.float64
    assert math.isclose(reference.relative_error(1.5 * first, first), 0.5)


def test_the_reference_closes_completeness() -> None:
    """The steps suffice for a network that is piecewise linear, up to its kinks."""
    workload = sized("mlp")
    model, x = workload.build().double(), workload.inputs(1).double()
    values = reference.integrated_gradients(model, x, workload.target, 512)
    gain = model(x)[0, 3] - model(torch.zeros_like(x))[0, 3]
    torch.testing.assert_close(values.sum(), gain, rtol=1e-3, atol=0)


def test_search_picks_a_divisor() -> None:
    found = search(lambda trial: torch.randn(10, 10), Setting("smoothgrad", 12))
    assert 12 % found == 0


def test_plots_draw_what_was_measured(tmp_path: Path) -> None:
    found = [
        {"tick": tick, "contender": name, "seconds": 0.1 * tick, "peak_bytes": tick << 20}
        for tick in (10, 50)
        for name in plots.NAMES
    ]
    about = end_to_end.machine("cpu")
    document = {"setting": about, "axis": "steps", "title": "a model", "rows": found}
    plots.draw(document, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
