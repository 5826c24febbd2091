"""The command that compiles and times kernels: who wins, who is refused, and its tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saliency_fast.kernels import configurations

from benchmarks import kernels, tables, timing, tuning
from benchmarks.ops import Call
from benchmarks.tuning import Entry, race, winner
from saliency_fast.ops import OPS


def timer_of(seconds: dict[str, float]) -> tuple[timing.Timer, list[str]]:
    """A timer that calls each function once and tells these seconds; and whom it was given."""
    given: list[str] = []

    def timer(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        given.extend(functions)
        for function in functions.values():
            function()
        return {name: seconds[name] for name in functions}

    return timer, given


def call(name: str, number: int = 0) -> Call:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sample = list(OPS[name].samples())[number]
    return Call(OPS[name], sample.note, sample.args)


def test_the_fastest_of_those_that_stand_wins() -> None:
    op = OPS["line_points"]

    def late(*args: Any) -> torch.Tensor:
        out = op.reference(*args)
        out.view(-1)[-1] += 1e-2
        return out

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nand more")

    def unwritten(x: torch.Tensor, baseline: torch.Tensor, item: torch.Tensor, *_: Any) -> Any:
        return torch.empty((len(item), *x.shape[1:]))

    entries = [
        Entry("checked in", op.reference),
        Entry("faster", op.reference),
        Entry("wrong", late),
        Entry("unwritten", unwritten),
        Entry("short", lambda *args: op.reference(*args)[:-1]),
        Entry("fails", broken),
        Entry("spills", op.reference, refused="spills: stack 8"),
        Entry("slower", op.reference),
    ]
    seconds = dict.fromkeys((entry.label for entry in entries), 0.1)
    seconds |= {"checked in": 1.0, "faster": 0.5, "slower": 2.0, "copy": 0.25}
    timer, given = timer_of(seconds)
    rows = race(call("line_points", 4), entries, timer)
    assert given == ["checked in", "faster", "slower", "copy"]
    by = {row["label"]: row for row in rows}
    assert list(by) == [entry.label for entry in entries]
    assert [label for label, row in by.items() if row["fastest"]] == ["faster"]
    assert winner(rows) is by["faster"]
    assert by["faster"]["share_of_copy"] == 0.5
    assert by["wrong"]["refused"] == by["unwritten"]["refused"]
    assert by["wrong"]["refused"] == "result 0 differs from the reference's"
    assert "shapes" in by["short"]["refused"]
    assert by["fails"]["refused"] == "fails: RuntimeError: out of resource: shared memory"
    assert by["spills"]["refused"] == "spills: stack 8"
    assert all((row["seconds"] is None) == bool(row["refused"]) for row in rows)


def test_small_gains_and_races_of_nobody_keep_what_is_checked_in() -> None:
    op = OPS["line_points"]
    entries = [Entry(name, op.reference) for name in ("checked in", "other")]
    timer, _ = timer_of({"checked in": 1.0, "other": 0.99, "copy": 1.0})
    rows = race(call("line_points"), entries, timer)
    assert rows[1]["fastest"]
    assert winner(rows) is rows[0]
    refused = [Entry(name, op.reference, refused="spills") for name in ("checked in", "other")]
    timer, given = timer_of({})
    rows = race(call("line_points"), refused, timer)
    assert given == []
    assert winner(rows) is rows[0]
    # A checked-in one that no longer stands gives way to any that does.
    timer, _ = timer_of({"other": 1.0, "copy": 1.0})
    rows = race(call("line_points"), [refused[0], entries[1]], timer)
    assert winner(rows) is rows[1]


ON_GPUS = {name for name, op in OPS.items() if op.triton is not None}
"""Ops that GPUs have a version of."""


@pytest.mark.parametrize("name", sorted(ON_GPUS - {"overlay"}))
def test_every_op_is_checked(name: str) -> None:
    """Its reference stands, changed arguments included; one with an element off does not."""
    op = OPS[name]
    one = max((call(name, number) for number in range(3)), key=lambda c: op.moved(*c.args))
    wanted = tuning.outcome(op.reference, op, one.args, double=False)
    assert tuning.wrong(one, Entry("right", op.reference), wanted) == ""
    for number, result in enumerate(wanted):
        if result.numel() == 0:
            continue
        others = [tensor.clone() for tensor in wanted]
        flat = others[number].view(-1)
        flat[-1] = flat[-1] + 1 if not flat.is_floating_point() else flat.abs().max() + 1
        said = tuning.wrong(one, Entry("right", op.reference), others)
        assert said == f"result {number} differs from the reference's"


def test_candidates_are_current_only_while_they_run() -> None:
    chosen = tuning.TABLE["points.line"].at(4)
    other = tuning.Configuration(64, warps=2)
    with tuning.using("points.line", other):
        assert tuning.TABLE["points.line"].at(8, "gfx942") == other
    assert tuning.TABLE["points.line"].at(4) == chosen


def test_both_languages_are_timed_where_both_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["noise_points"]
    monkeypatch.setattr(type(op), "launcher", lambda self, backend: self.reference)
    monkeypatch.setattr(tuning, "call_for", lambda *_: call("noise_points"))
    monkeypatch.setattr(tuning, "CUDA_LIBRARY", Path(__file__))
    timer, given = timer_of({"Triton": 1.0, "CUDA C++": 0.5, "copy": 0.5})
    rows = tuning.versus("noise_points", 4, "cpu", timer)
    assert [row["fastest"] for row in rows] == [False, True]
    assert given == ["Triton", "CUDA C++", "copy"]
    # A library that has no code for the device is not raced.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "cuda_refusal", lambda index: "it has no code for this device")
    rows = tuning.versus("noise_points", 4, "cuda", timer)
    assert "no code for this device" in rows[1]["refused"]
    monkeypatch.setattr(tuning, "CUDA_LIBRARY", Path(__file__) / "missing.so")
    rows = tuning.versus("noise_points", 4, "cpu", timer)
    assert [row["fastest"] for row in rows] == [True, False]
    assert "FORCE_CUDA=1" in rows[1]["refused"]


def test_without_a_gpu_tuning_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels", "--tune"])
    with pytest.raises(SystemExit) as ended:
        kernels.main()
    assert ended.value.code == 2
    assert "PyTorch sees none here" in capsys.readouterr().err


def test_the_timer_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: a call ends where it says, whatever came before it."""
    clock, told = [0.0], []
    costs = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 7.0, 1.0, 8.0])}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            told.append("end")

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def called(name: str) -> None:
        told.append(name)
        clock[0] += next(costs[name])

    def sleep(cycles: int) -> None:
        assert cycles > 0
        told.append("sleep")
        clock[0] += 100.0

    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timer = timing.CudaTimer(rounds=3, device="cpu")
    assert timer.others.numel() == 4000
    found = timer({name: partial(called, name) for name in ("a", "b")})
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(7.0)}
    assert told == ["a", "b"] + ["sleep", "a", "end", "sleep", "b", "end"] * 3


def test_the_command_times_every_kernel_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    raced = []

    def tune(kernel: str, width: int, target: str, device: str, timer: Any) -> list[Any]:
        raced.append((kernel, width))
        assert (target, device) == ("sm_90", "cuda")
        entries = [Entry(name, OPS["line_points"].reference) for name in ("old", "new")]
        rows = race(call("line_points"), entries, timer)
        return [{"part": "tune", "kernel": kernel, "width": width} | row for row in rows]

    def versus(op: str, width: int, device: str, timer: Any) -> list[Any]:
        raced.append((op, width))
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(configurations, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(
        timing, "CudaTimer", lambda: timer_of({"old": 2.0, "new": 1.0, "copy": 1.0})[0]
    )
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning, "versus", versus)
    monkeypatch.setattr(sys, "argv", ["kernels", "--tune", "--out", str(tmp_path)])
    kernels.main()
    assert {name for name, _ in raced} == set(tuning.TABLE) | set(tuning.VERSUS)
    assert ("accumulate.accumulate", 2) in raced
    written = json.loads((tmp_path / "kernels-gpu.json").read_text())
    assert written["setting"]["device"] == "a GPU"
    assert [row["fastest"] for row in written["rows"][:2]] == [False, True]
    assert "| new | 1000000.0 us | 100% | to be kept |" in (tmp_path / "kernels-gpu.md").read_text()
    raced.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kernel", "noise"])
    kernels.main()
    assert raced == [("points.noise", 4), ("points.noise", 8)] + [
        ("noise_points", width) for width in tuning.VERSUS["noise_points"]
    ]


def test_tables_of_what_was_timed(tmp_path: Path) -> None:
    op = OPS["line_points"]
    labels = {"512 elements": 2e-4, "1024 elements": 1e-4, "2048 elements": 3e-4, "copy": 9e-5}
    timer, _ = timer_of(labels)
    entries = [Entry(name, op.reference) for name in labels if name != "copy"]
    about = {"part": "tune", "kernel": "points.line", "width": 4}
    rows = [about | row for row in race(call("line_points"), entries, timer)]
    timer, _ = timer_of({"Triton": 2e-4, "CUDA C++": 1e-4, "copy": 1e-4})
    twins = [Entry(name, op.reference) for name in ("Triton", "CUDA C++")]
    both = {"part": "versus", "width": 4}
    rows += [both | row for row in race(call("line_points"), twins, timer)]
    setting = {"device": "a GPU", "torch": "2", "triton": "3", "command": "tune"}
    document = {"setting": setting, "rows": rows}
    kernels.save(document, kernels.tuned(document), tmp_path / "kernels-gpu")
    assert json.loads((tmp_path / "kernels-gpu.json").read_text()) == document
    text = tables.table("kernels-gpu", tmp_path)
    assert text == (tmp_path / "kernels-gpu.md").read_text()
    assert "| 1024 elements | 100.0 us | 90% | to be kept |" in text
    assert "| CUDA C++ | 100.0 us | 100% | to be kept |" in text
    brief = tables.table("kernels-gpu-summary", tmp_path)
    assert "512 elements" in brief
    assert "2048 elements" in text
    assert "2048 elements" not in brief
    assert tables.table("kernels-gpu", tmp_path / "no") == tables.NOT_MEASURED + "\n"


def test_the_summary_has_bandwidths_once_they_are_measured(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text((kernels.RESULTS / "kernels.json").read_text())
    before = tables.table("kernels-summary", tmp_path)
    rows = [line for line in before.splitlines() if line.startswith("| `")]
    assert {line.split("`")[1] for line in rows} | {"relu_mask_"} == ON_GPUS
    assert all("| not measured yet |" in line for line in rows)
    measured = {
        "setting": {"backends": {"cuda": "cuda and triton kernels"}},
        "rows": [
            {"op": name, "gigabytes_per_second": 3210.4, "share_of_copy": 0.97}
            for name in ("noise_points", "line_points")
        ]
        + [{"unit": "finish: 256^3", "reason": "signal SIGSEGV"}],
    }
    (tmp_path / "ops-gpu.json").write_text(json.dumps(measured))
    after = tables.table("kernels-summary", tmp_path).splitlines()
    found = [line.split(" | ")[1] for line in after if "3210 GB/s, 97% of a copy" in line]
    assert found == ["`points.line`, Triton", "`noise_points<float, true>`, CUDA C++"]
