"""A run on a GPU, without one: every failure once, a fake clock, and the whole run on the CPU."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import saliency_fast as sf
from benchmarks import contenders, gpu, gpu_ceilings, gpu_networks, gpu_smoke, ops, tables, timing
from benchmarks.cases import QUICK_CASES
from benchmarks.contenders import plan_failure
from benchmarks.ops import Call
from benchmarks.stages import TIME, Forked, Found, Report, Stage, Unit, run_stage
from saliency_fast.engine import cudagraph
from saliency_fast.errors import ModelError
from saliency_fast.ops import OPS
from tests.benchmarks import cuda_stand_in
from tests.graphs.tape import Tape

ROOT = Path(__file__).parents[2]
FAILING = "tests.benchmarks.failing_stages"
ABOUT = {"device": "cpu", "quick": True, "command": "python -m benchmarks.gpu"}
NO_REPORT = Report(lambda message: None, {}, float("inf"))


def forked(arguments: tuple[Any, ...]) -> Forked:
    """A child of the process that serves other tests as well, whose children need more."""
    return Forked(arguments, ("benchmarks.processes", "captum.attr"))


def done(units: tuple[str, ...], seconds: float = 60.0, **more: Any) -> Found:
    """What a stage of these units has shown, in real processes."""
    stage = Stage("failing", seconds, f"{FAILING}:units", "failing")
    options = ABOUT | {"units": units, "about": f"{FAILING}:about"} | more
    *_, found = run_stage(stage, options, time.perf_counter() + seconds, start=forked)
    return found


def test_each_failure_takes_its_unit_alone() -> None:
    units = ("raises", "dies", "exits", "hangs", "misses a package", "is absent")
    found = done(units)
    assert found.complete
    reasons = {
        unit: (rows[-1].get("reason"), rows[-1].get("failed")) for unit, rows in found.rows.items()
    }
    assert reasons == {
        "raises": ("ValueError: a kernel failed", True),
        "dies": ("signal SIGSEGV", True),
        "exits": ("exit code 7", True),
        "hangs": ("no answer in 0 s", True),
        "misses a package": ("a_package_that_nobody_has is not installed", False),
        "is absent": ("a tool is not here", False),
        **{f"good {number}": (None, None) for number in range(len(units))},
    }
    # What a unit has shown before it failed is kept, once.
    assert [row.get("first") for row in found.rows["dies"]] == [True, None]
    assert found.about == {"device": "a cpu"}


def test_settings_do_not_outlive_a_unit_that_is_alone() -> None:
    found = done(("leaves settings", "good"))
    assert found.rows["leaves settings"][0]["settings"] == ["changed"]
    assert found.rows["good 0"][0]["settings"] == found.rows["good"][0]["settings"] == []


def test_a_race_goes_on_without_the_contender_at_which_it_died() -> None:
    found = done(("race",))
    assert [(row["contender"], row["reason"]) for row in found.rows["race"]] == [
        ("one", None),
        ("two", "signal SIGABRT"),
        ("three", "an illegal access"),
        ("four", None),
    ]
    assert found.complete
    assert "good 0" in found.rows


def test_a_stage_ends_at_its_time_and_says_what_was_not_done() -> None:
    begun = time.perf_counter()
    found = done(("good", "hangs", "raises"), 1.0, patient=True)
    assert time.perf_counter() - begun < 10.0
    late = {unit for unit, rows in found.rows.items() if rows[-1].get("reason") == TIME}
    assert late == {"hangs", "good 1", "raises", "good 2"}
    assert not any(row.get("failed") for row in found.all_rows)
    assert "reason" not in found.rows["good 0"][0]


def test_a_stage_that_does_not_begin_says_why(tmp_path: Path) -> None:
    for work, reason in (
        (f"{FAILING}:broken", "RuntimeError: no units today"),
        (f"{FAILING}:dead", "its process ended at its start: exit code 3"),
        ("benchmarks.nothing:units", "benchmarks.nothing is not installed"),
    ):
        stage = Stage("failing", 60.0, work, "failing")
        options = ABOUT | {"marks": str(tmp_path)}
        *_, found = run_stage(stage, options, time.perf_counter() + 60.0, start=forked)
        assert found.all_rows == [{"unit": None, "reason": reason, "failed": True}]
    assert len(list(tmp_path.iterdir())) == 1


class Clock:
    """Seconds that pass when something waits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Scripted:
    """A child that sends messages, each after some seconds, and then ends."""

    def __init__(self, clock: Clock, messages: list[tuple[float, tuple[Any, ...]]]) -> None:
        self.clock, self.messages = clock, messages

    def receive(self, seconds: float) -> tuple[Any, ...] | None:
        if not self.messages:
            raise EOFError
        wait, message = self.messages[0]
        if wait > seconds:
            self.clock.seconds += seconds
            self.messages[0] = (wait - seconds, message)
            return None
        self.clock.seconds += wait
        del self.messages[0]
        return message

    def end(self, wait: float) -> str:
        return "exit code 0"


def script(units: dict[str, tuple[float, dict[str, Any]]]) -> list[tuple[float, tuple[Any, ...]]]:
    """Messages of units that take so many seconds and show one row each."""
    found: list[tuple[float, tuple[Any, ...]]] = [(3.0, ("units", [*units], {"device": "H200"}))]
    for name, (seconds, row) in units.items():
        found += [(0.0, ("begin", name, 30.0)), (seconds, ("row", row)), (0.0, ("end", name))]
    return [*found, (0.0, ("done",))]


def test_eight_minutes_by_a_fake_clock(tmp_path: Path) -> None:
    clock, begun, given = Clock(), dict[str, float](), dict[str, Any]()
    row = gpu_row("saliency_fast, float16")
    plans = {
        "smoke": script(
            {
                "op pack_mask": (5.0, {"op": "pack_mask", "reason": None}),
                "op finish": (5.0, {"op": "finish", "reason": "wrong", "failed": True}),
                # Longer than its stage, with signs of life.
                "op cam": (29.0, {"op": "cam", "reason": None}),
                "two threads": (29.0, {"reason": None}),
            }
        ),
        "ceilings": script({"copy": (10.0, {"part": "copy", "gigabytes_per_second": 4300.0})}),
        "tables": script({f"race {n}": (25.0, row) for n in range(12)}),
        "switches": script({"resnet50 switches": (20.0, {"switch": "off", "failed": False})}),
        "profile": script({"resnet50": (5.0, {"kernel": "gemm", "calls": 50})}),
        "ops": script({"pack_mask": (1.0, {"op": "pack_mask", "fast_ms": 0.1})}),
        "networks of timm": script({"convnext": (1.0, {"reason": "timm is not installed"})}),
        "compiled": script({f"race {n}": (29.0, row) for n in range(12)}),
    }

    def start(arguments: tuple[Any, ...]) -> Scripted:
        stage = next(one.name for one in gpu.STAGES if one.work == arguments[0])
        begun[stage], given[stage] = clock.seconds, arguments[1]
        if stage != "smoke":
            # What earlier stages have shown is on disk.
            assert "finish" in (tmp_path / "smoke-gpu.json").read_text()
        return Scripted(clock, plans.pop(stage))

    said: list[str] = []
    run = gpu.Run(tmp_path, ABOUT | {"device": "cuda"}, start=start, now=clock, say=said.append)
    run.run(gpu.STAGES)
    assert not plans
    assert list(begun) == [stage.name for stage in gpu.STAGES]
    # The first ends at its time; the second leaves what it did not need to the third.
    assert [begun[name] for name in ("ceilings", "tables", "switches")] == [60.0, 73.0, 310.0]
    assert clock.seconds == gpu.SECONDS
    assert len(list(tmp_path.iterdir())) <= 8
    assert all(path.is_file() for path in tmp_path.iterdir())
    assert given["ops"]["verdicts"] == {
        "pack_mask": "passed", "finish": "wrong", "cam": "passed",
    }  # fmt: skip
    assert "verdicts" not in given["smoke"]
    assert run.failures == ["smoke: op finish: wrong"]
    document = json.loads((tmp_path / "end-to-end-gpu.json").read_text())
    assert document["setting"]["device"] == "H200"
    counts = [
        sum(one.get("reason") == reason for one in document["rows"]) for reason in (None, TIME)
    ]
    # Nine races of 25 seconds end by 310 s, and one compiled by 480 s at least.
    assert counts[0] >= 10
    assert sum(counts) == 24
    assert "smoke: op finish: wrong" in said[-1]
    assert gpu.table(document).count("saliency_fast, float16") == counts[0]
    assert "990 ms" in gpu.summary(document)


def gpu_row(contender: str, **more: Any) -> dict[str, Any]:
    return {
        "workload": "resnet50", "shape": [3, 224, 224], "batch": 8, "setting": "IG-50",
        "contender": contender, "reason": None, "seconds": 0.99, "gradients_per_second": 404.0,
        "times_captum": 2.0, "times_equal": 1.5, "peak_bytes": 2**30, "error": 1e-3,
    } | more  # fmt: skip


def test_the_whole_run_on_the_cpu(tmp_path: Path) -> None:
    # In a process of its own, whose children are forked from one that has imported PyTorch.
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted([f"{name}-trial.json" for name in gpu.TABLES] + ["gpu-trial.md"])
    assert len(files) <= 8
    documents = {
        name: json.loads((tmp_path / f"{name}-trial.json").read_text()) for name in gpu.TABLES
    }
    assert all(one["setting"]["torch"] == torch.__version__ for one in documents.values())
    found = {name: one["rows"] for name, one in documents.items()}
    assert {row.get("op") for row in found["smoke"]} >= set(OPS)
    raced = [row for row in found["end-to-end"] if row["reason"] is None]
    assert len(raced) == 2 * len(contenders.ON_CPU) + 3
    ours = [row for row in raced if row["contender"].startswith("saliency_fast")]
    assert all({"strategy", "graphs", "points_per_launch", "plan"} <= row.keys() for row in ours)
    assert all(row["error"] < 0.2 for row in raced)
    assert {row["pass"] for row in found["ceilings"] if "pass" in row} == {
        "forward",
        "transpose",
        "gradient",
    }
    assert {row["op"] for row in found["ops"]} == {n for n, op in OPS.items() if op.triton}
    assert any(row["kernel"] == "aten::addmm" for row in found["profile"])
    text = (tmp_path / "gpu-trial.md").read_text()
    assert "No failures." in text
    assert all(f"## {name}" in text for name in gpu.TABLES)
    assert text in done.stdout


# The first minute.


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    """Graphs on the CPU, by a stand-in with the laws of CUDA graphs."""
    monkeypatch.setitem(cudagraph.RECORDERS, "cpu", Tape)
    # However slow the machine is.
    monkeypatch.setattr(gpu_smoke, "LATER", replace(gpu_smoke.LATER, graph_seconds=9e9))
    return Tape


def captures() -> list[Any]:
    """What the check of graphs says of a small network; why its calls fail, where they do."""
    try:
        rows = list(gpu_smoke.capture("small-mlp", "cpu", NO_REPORT))
    except ModelError as error:
        return [str(error)]
    return [row["reason"] for row in rows]


def test_recorded_launches_are_held_against_eager_ones(taped: type[Tape]) -> None:
    before = taped.replayed
    assert captures() == [None, None]
    assert taped.replayed > before
    assert gpu_smoke.tuple_seeds("cpu") == ""
    assert gpu_smoke.two_halves("cpu") == ""


def test_a_replay_that_does_nothing_is_found(
    taped: type[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taped, "_replay", lambda self, calls: None)
    assert captures() != [None, None]


def test_a_map_that_is_off_is_found(taped: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "_gap", lambda found, expected: 2 * gpu_smoke.EQUAL)
    assert captures() == ["off by 2.0e-09, expected at most 1e-09"] * 2
    assert gpu_smoke.tuple_seeds("cpu").startswith("off by")


def test_a_capture_that_fails_is_found(taped: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Tape, body: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(taped, "record", record)
    assert all(reason.startswith("graphs are off") for reason in captures())


def test_a_plan_without_strategies_is_a_failure() -> None:
    engine = gpu_smoke._engine(torch.nn.Linear(4, 3), sf.Gradient(), lean=False)
    plan = engine.plan(torch.ones(1, 4), 1)
    assert plan_failure(plan).startswith("memory-efficient strategies are off")


def test_an_op_that_is_wrong_or_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["line_points"]
    (row,) = gpu_smoke.check_op(op, "cpu", NO_REPORT)
    assert (row["op"], row["reason"]) == ("line_points", None)
    monkeypatch.setattr(gpu_smoke, "largest_call", lambda one: shifted(ops.largest_call(one)))
    (row,) = gpu_smoke.check_op(op, "cpu", NO_REPORT)
    assert row["failed"]
    assert "differs" in row["reason"]


def shifted(call: Call) -> Call:
    """A call whose reference is a little off."""
    reference = call.op.reference
    wrong = lambda *args: reference(*args) + 1e-3  # noqa: E731
    object.__setattr__(call.op, "reference", wrong)
    return call


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    before = {name: op.reference for name, op in OPS.items()}
    yield
    for name, op in OPS.items():
        object.__setattr__(op, "reference", before[name])


def test_settings_that_a_call_changes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole run sets each of them; here nothing is set that could not be taken back.
    assert gpu_smoke.keeps_setting("pass", "cpu") == ""
    made, error, benchmark = gpu_smoke._engine, 0.0, torch.backends.cudnn.benchmark

    def engine(model: Any, method: Any, **options: Any) -> Any:
        found = made(model, method, **options)

        def call(x: torch.Tensor, target: Any) -> Any:
            torch.backends.cudnn.benchmark = bool(options) and not error
            values = found(x, target).values * (1 + error * bool(options))
            return type("Attribution", (), {"values": values})

        return call

    monkeypatch.setattr(gpu_smoke, "_engine", engine)
    try:
        assert "behind a call" in gpu_smoke.keeps_setting("pass", "cpu")
        error = 1e-3
        assert "off by 1.0e-03" in gpu_smoke.keeps_setting("pass", "cpu")
    finally:
        torch.backends.cudnn.benchmark = benchmark


# Races and ops.


def test_a_contender_without_its_package_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    names = (contenders.OURS, contenders.CAPTUM)
    report = Report(lambda message: None, {}, time.perf_counter() + 60)
    about = (QUICK_CASES[0], 1, gpu_networks.QUICK_IG, names, "cpu", 0, report)
    rows = {row["contender"]: row for row in gpu_networks._race(*about)}
    assert rows[contenders.CAPTUM]["reason"] == "captum is not installed"
    assert not rows[contenders.CAPTUM]["failed"]
    assert rows[contenders.OURS]["seconds"] > 0
    gpu_networks._FIELD.clear()


def test_the_hand_tuned_loop_computes_the_same_map() -> None:
    setting = gpu_networks.QUICK_IG
    for case in QUICK_CASES:
        workload = case.found()
        field = gpu_networks.Field(case, (f"{contenders.HAND_TUNED} on a CPU",), "cpu")
        worker = next(iter(field.workers.values()))
        worker.load(2)
        worker.warm(setting)
        values = worker.run(setting, keep=2).values
        assert values is not None
        expected = field.reference(setting, 2)
        assert values.shape == (2, *workload.shape)
        gap = (values - expected).norm() / expected.norm()
        assert gap < 0.1


def test_contenders_at_equal_arithmetic_are_there() -> None:
    assert set(contenders.EQUALS) | set(contenders.EQUALS.values()) <= set(contenders.MAKERS)
    assert set(contenders.ON_GPU) | set(contenders.COMPILED) <= set(contenders.MAKERS)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with contenders.switches(tf32=True, benchmark=True):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.benchmark
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    assert not torch.backends.cudnn.benchmark


def test_ops_move_four_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = 60 * 2**20
    monkeypatch.setattr(ops, "cache_bytes", lambda: cached)
    found = list(ops.calls("cuda"))
    assert len(found) > 40
    for name, size, run in found:
        make, number, device, times = run.args  # type: ignore[attr-defined]
        large = make("meta", times)[number]
        assert large.op.name == name
        assert device == "cuda"
        assert 4 * cached <= large.op.moved(*large.args) < 40 * cached, size


def test_ops_that_are_not_proven_are_not_measured() -> None:
    options = ABOUT | {"verdicts": {"cam": "result 0 differs from the reference's"}}
    units = {unit.name.partition(":")[0]: unit for unit in ops.units(options)}
    assert list(units["cam"].run(NO_REPORT)) == [
        {"op": "cam", "reason": "result 0 differs from the reference's"}
    ]
    assert list(units["finish"].run(NO_REPORT)) == [{"op": "finish", "reason": "not checked"}]
    rows = [*units["cam"].run(NO_REPORT), {"unit": "finish", "reason": "signal SIGSEGV"}]
    about = {"device": "H200", "threads": 1, "torch": "2", "command": "make bench-gpu"}
    text = tables.ops({"setting": about, "rows": rows})
    assert "`finish` (signal SIGSEGV)" in text


# What only a GPU runs, by stand-ins.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_stand_in.install(monkeypatch)
    with cuda_stand_in.OnCpu():
        yield
    gpu_networks._FIELD.clear()


def shown(units: Iterator[Unit], *wanted: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of units whose names begin so."""
    report = Report(lambda message: None, {}, time.perf_counter() + 600.0)
    return {one.name: list(one.run(report)) for one in units if one.name.startswith(wanted or "")}


ON_CUDA = {"device": "cuda", "quick": True, "command": ""}


def test_the_first_minute_with_a_stand_in(cuda: None) -> None:
    names = (
        "toolchain",
        "op finish",
        "op magnitude",
        "capture against eager: small-mlp",
        "results",
    )
    found = shown(gpu_smoke.units(ON_CUDA), *names)
    rows = [row for rows in found.values() for row in rows]
    assert not any(row["failed"] for row in rows), rows
    assert {row["version"] for row in found["op finish"]} == {"dispatched", "triton"}
    assert found["toolchain"][0]["capability"] == [9, 0]
    assert [row["graphs"][:8] for row in found["capture against eager: small-mlp"]] == [
        "one for ", "one for ",
    ]  # fmt: skip


def test_ceilings_and_ops_with_a_stand_in(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(gpu_ceilings.units(ON_CUDA))
    rows = [row for rows in found.values() for row in rows]
    kinds = {(row.get("precision"), row.get("layout"), row.get("benchmark")) for row in rows}
    assert len(kinds - {(None, None, None)}) == 4 + 4 * 2 * 2
    assert all(row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(ops, "SIZES", (ops.maps,))
    monkeypatch.setattr(ops, "cache_bytes", lambda: 2 * 10**6)
    ops._timer.cache_clear()
    made = [one for one in ops.units(ON_CUDA | {"quick": False}) if "7x7" in one.name]
    assert len(made) == 2
    (row,) = made[0].run(NO_REPORT)
    assert row["size"].startswith("24 x 2048x7x7")
    assert row["fast_ms"] > 0
    ops._timer.cache_clear()


def test_events_are_around_many_launches(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slept, called = list[int](), list[str]()
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timer = timing.CudaTimer(rounds=2, launches=8)
    # A millisecond between two events of the stand-in.
    assert timer({"a": lambda: called.append("a")}) == {"a": 1e-3 / 8}
    assert len(called) == 1 + 2 * 8
    # The host queues eight launches meanwhile.
    assert len(slept) == 2
    assert min(slept) >= 8 * timing.QUEUED_EACH


def test_races_with_a_stand_in(cuda: None) -> None:
    found = shown(gpu_networks.races(ON_CUDA), "mlp")
    assert len(found) == 1
    for rows in found.values():
        assert [row["contender"] for row in rows] == list(contenders.ON_GPU)
        assert [row["reason"] or row.get("failure") for row in rows] == [None] * len(rows)
        by = {row["contender"]: row for row in rows}
        assert all(by[name]["times_equal"] for name in contenders.EQUALS if name in by)
        assert by[contenders.FLOAT16]["precision"] == "float16"
        assert by[contenders.AUTO]["precision"] in gpu_ceilings.PRECISIONS
        for row in rows[:4]:
            assert row["graphs"].startswith("one for launches")
            assert (row["peak_bytes"], row["reserved_bytes"]) == (2000, 5000)
        assert all(row["error"] < 0.1 for row in rows)


def test_times_on_a_gpu_are_not_those_of_first_calls(cuda: None) -> None:
    case, calls = QUICK_CASES[0], list[int]()
    for name, expected in ((contenders.FLOAT32, 4), (contenders.LOOP, 2)):
        worker = gpu_networks.Field(case, (name,), "cuda").workers[name]
        worker.load(1)
        made = type(worker.contender).__call__
        calls.clear()

        def call(*given: Any, made: Any = made) -> Any:
            calls.append(1)
            return made(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(worker.contender), "__call__", call)
            worker.run(gpu_networks.QUICK_IG, memory=True)
            assert len(calls) == expected
            worker.run(gpu_networks.QUICK_IG)
            assert len(calls) == expected + 1


def test_the_hand_tuned_loop_replays_a_graph(cuda: None) -> None:
    workload, setting = QUICK_CASES[0].found(), gpu_networks.QUICK_IG
    tuned = contenders.HandTuned(workload, workload.build())
    first, second = workload.inputs(4).split(2)
    launch = tuned._launch(first, 3).captured()
    assert isinstance(launch.run.__self__, cuda_stand_in.Graph)  # type: ignore[attr-defined]
    tuned.launches[setting, 2] = launch
    replayed = tuned(second, setting)
    tuned.launches.clear()
    tuned.warm(second, setting)
    torch.testing.assert_close(replayed, tuned(second, setting), rtol=1e-2, atol=1e-3)


def test_a_lost_device_ends_the_process_at_its_contender(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_networks, "ON_GPU", (contenders.CAPTUM, contenders.FLOAT32))
    monkeypatch.setattr(contenders.Captum, "attribute", broken)
    monkeypatch.setattr(gpu_networks, "device_answers", lambda: False)

    def ended(self: Report, reason: str) -> None:
        raise SystemExit(reason)

    monkeypatch.setattr(Report, "lost", ended)
    report = Report(sent.append, {}, time.perf_counter() + 60.0)
    unit = next(gpu_networks.races(ON_CUDA))
    with pytest.raises(SystemExit, match="an illegal memory access"):
        list(unit.run(report))
    assert sent[-1][:2] == ("begin", f"{unit.name}: captum")


def test_profiles_with_a_stand_in(cuda: None) -> None:
    for rows in shown(gpu_networks.profiles(ON_CUDA)).values():
        assert rows[0]["kernel"] is None
        assert rows[0]["seconds"] > 0


@pytest.mark.parametrize("code", [0, 9])
def test_what_a_sanitizer_says(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!/bin/sh\necho $@\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(gpu_smoke, "CUDA_LIBRARY", tool)
    monkeypatch.setattr(gpu_smoke, "_SANITIZERS", {})
    report = Report(lambda message: None, {}, time.perf_counter() + 20.0)
    (row,) = gpu_smoke.sanitized("memcheck", report)
    assert row["errors"] == [str(code)]
    assert row["failed"] == bool(code)
    assert not code or "--tool memcheck" in row["reason"]


def test_what_a_sanitizer_looks_at(cuda: None) -> None:
    gpu_smoke.run_cuda_ops()


# What is asked of a machine before anything runs.


def test_a_checkout_that_is_not_installed_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "saliency_fast").mkdir()
    (tmp_path / "saliency_fast/__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    # Without site-packages: neither PyTorch nor an installed copy is there.
    command = [sys.executable, "-S", "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "saliency_fast.kernels is not installed" in done.stderr
    assert gpu.INSTALL in done.stderr
    (tmp_path / "saliency_fast/kernels").mkdir()
    (tmp_path / "saliency_fast/kernels/__init__.py").touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert "there is no GPU here" in done.stderr or "torch" in done.stderr


def test_stages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu.Run, "run", lambda self, stages: ran.extend(one.name for one in stages))
    common = ["gpu", "--device", "cpu", "--out", str(tmp_path), "--only"]
    for only, expected in (("", len(gpu.STAGES)), ("ops,smoke", 2)):
        ran.clear()
        monkeypatch.setattr(sys, "argv", [*common, only])
        gpu.main()
        assert len(ran) == expected
    monkeypatch.setattr(sys, "argv", [*common, "smoke,tabels"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only takes smoke, ceilings, tables" in capsys.readouterr().err


def test_what_children_are_forked_from_has_touched_no_gpu() -> None:
    code = f"""
import importlib, torch
def asked(*_): raise RuntimeError("a GPU was asked for")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = asked
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = asked
for name in {gpu.PRELOAD!r}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stages_are_there() -> None:
    ends = [stage.until for stage in gpu.STAGES]
    assert ends == sorted(ends)
    assert ends[-1] == gpu.SECONDS == 480
    for stage in gpu.STAGES:
        module, _, function = stage.work.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert stage.file in gpu.TABLES
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^bench-gpu:.*\n\t\$\(PYTHON\) -m benchmarks.gpu", makefile, re.MULTILINE)
