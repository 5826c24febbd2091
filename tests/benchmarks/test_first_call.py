"""First calls in fresh processes: right maps, peaks and intervals, goals, and who fails alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks import first_call, tables
from benchmarks.end_to_end import save
from benchmarks.first_call import TUNED, Goal, interval, label, summary, table
from benchmarks.fresh import CAPTUM, OURS, Shown, Work, compare

ALLOWED = 0.45
"""Seconds of processor time, three times what an import should add: the machine is shared."""


def test_importing_adds_little(monkeypatch) -> None:
    by_processor = partial(first_call.seconds_of, clock="process_time")
    monkeypatch.setattr(first_call, "seconds_of", by_processor)
    # The best of a few tries, since caches are shared.
    assert min(first_call.importing(1)["added"] for _ in range(3)) < ALLOWED


def test_what_an_import_adds_is_the_difference_of_neighbours(monkeypatch) -> None:
    taken = iter([0.0, 0.0, 1.0, 1.2, 3.0, 3.1, 2.0, 2.3])
    monkeypatch.setattr(first_call, "seconds_of", lambda imports: next(taken))
    found = first_call.importing(3)
    assert found["added"] == pytest.approx(0.2)
    assert (found["torch"], found["both"]) == (2.0, 2.3)


def test_intervals_are_of_the_logarithms_of_paired_ratios() -> None:
    center, low, high = interval([1.0, 4.0])
    # Two rounds have one degree of freedom: 12.7 standard errors, of log 4 / 2 each.
    assert center == pytest.approx(2.0)
    assert math.log(high / center) == pytest.approx(12.706 * math.log(4) / 2, rel=1e-3)
    assert low * high == pytest.approx(center**2)
    assert interval([1.5]) == [pytest.approx(1.5), None, None]
    assert interval([1.1] * 5) == pytest.approx([1.1] * 3)


def test_a_quick_run_measures_everything_and_is_spliced(tmp_path) -> None:
    document = first_call.measure(quick=True, rounds=1, threads=1, only="small-mlp")
    (row,) = document["rows"]
    assert label(row) == "small-mlp 30 IG-4 batch 1"
    for about in row["contenders"].values():
        assert about["reason"] is None
        assert about["error"] < 1e-5
        assert about["steady"] > 0
        assert 0 < about["peak_bytes"] < 2**28
    ours, captum = row["contenders"][OURS], row["contenders"][CAPTUM]
    assert captum["times_first"][0] == pytest.approx(captum["first"] / ours["first"])
    assert ours["own"][0] == pytest.approx(ours["steady"] / ours["first"])
    save(document, table(document), tmp_path, "first-call-cpu")
    text = tables.table("first-call-cpu", tmp_path)
    assert text == (tmp_path / "first-call-cpu.md").read_text()
    assert f"| small-mlp 30 IG-4 batch 1 | {CAPTUM} |" in text
    assert tables.table("first-call-cpu-summary", tmp_path) in text


def test_who_fails_does_so_alone_and_says_why() -> None:
    work = Work("small-mlp", method="grad_cam", layer="nowhere")
    shown = compare(work, (CAPTUM, OURS), threads=1, steady=False)
    assert "nowhere" in shown[CAPTUM].reason
    assert shown[OURS].reason  # Features have no spatial layer.
    shown = compare(Work("small-mlp"), (CAPTUM, "neither"), threads=1, steady=False)
    assert isinstance(shown[CAPTUM].values, np.ndarray)


def test_goals_hold_at_the_lower_end(monkeypatch) -> None:
    works = (Work("small-mlp"), Work("small-cnn"))
    goal = Goal("steady", "steady", works, (CAPTUM, TUNED), {"small-mlp": 1.0, "small-cnn": 2.0})
    monkeypatch.setattr(first_call, "GOALS", (goal,))
    rows = [
        {
            "network": work.network, "side": None, "shape": [3], "batch": 1, "call": "gradient",
            "contenders": {CAPTUM: {"times_steady": ratio}, TUNED: {"times_steady": None}},
        }
        for work, ratio in zip(works, ([1.0, 0.98, 1.02], [2.5, 1.9, 3.0]), strict=True)
    ]  # fmt: skip
    about = dict.fromkeys(("device", "threads", "torch", "captum", "date", "command"), "-")
    document: dict[str, Any] = {"rows": rows, "quick": False, "setting": about}
    text = summary(document)
    assert "| steady | 2 / 1 | 1 of 4 |" in text
    assert f"small-cnn 3 gradient batch 1 against {CAPTUM}: 2.5 [1.9, 3]" in text
    assert f"small-mlp 3 gradient batch 1 against {CAPTUM}: " not in text
    # Without an answer a goal is missed.
    assert f"small-mlp 3 gradient batch 1 against {TUNED}: -" in text


def test_the_worst_map_of_several_processes_counts() -> None:
    shown = [Shown(first=1.0, values=np.ones(3)), Shown(first=3.0, values=2 * np.ones(3))]
    about = first_call.summarised(shown, first_call.torch.ones(3))
    assert about["error"] == pytest.approx(1.0)
    assert about["first"] == 2.0
