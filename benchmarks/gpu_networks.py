"""Whole networks on a GPU: races of contenders, one replay by kernel, networks by others.

Units of `benchmarks.gpu`. The contenders of a race share one model and take turns; a contender at
which the process dies is left out when the race is begun anew.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import saliency_fast as sf
from benchmarks.cases import GPU_CASES, QUICK_CASES, QUICK_SETTINGS, SETTINGS, Case, Setting
from benchmarks.contenders import (
    CAPTUM,
    COMPILED,
    FLOAT16,
    HALF,
    LATER,
    ON_CPU,
    ON_GPU,
    OURS,
    TUNED,
    plan_failure,
    switches,
)
from benchmarks.fresh import ContenderError, first_line
from benchmarks.models import Workload
from benchmarks.processes import Worker
from benchmarks.race import Clock, Entry, race, rows
from benchmarks.reference import gradient, integrated_gradients, relative_error
from benchmarks.stages import TIME, AbsentError, Report, Row, Unit, device_answers
from benchmarks.timing import WallTimer

IG, QUICK_IG = SETTINGS[1], QUICK_SETTINGS[1]
PATIENCE, COMPILING = 30.0, 120.0
"""Seconds of a contender's turn, planning and searching included; compilation takes a minute."""
SECONDS, QUICK_SECONDS = 3.0, 0.1
"""Of a race's timed rounds."""
SHOWN = 15
"""Kernels of a replay, the longest first."""
OTHERS = ("convnext_tiny", "efficientnet_b0", "swin_tiny_patch4_window7_224")
QUICK_OTHERS = ("convnext_atto",)


class Field:
    """The contenders on one model, side by side in this process."""

    def __init__(self, case: Case, names: tuple[str, ...], device: str) -> None:
        self.case, self.names, self.device = case, names, device
        self.model = case.found().build().to(device)
        self.workers: dict[str, Worker] = {}
        self.absent: dict[str, str] = {}
        for name in names:
            self._enter(name)
        self.pace: dict[str, float] = {}

    def _enter(self, name: str) -> None:
        """Adds a contender. One model serves all: whoever changes his copies it first."""
        about = (self.case.workload, self.case.side, name, self.device)
        try:
            self.workers[name] = Worker(*about, model=self.model)
        except ModuleNotFoundError as error:
            self.absent[name] = f"{error.name} is not installed"

    def reference(self, setting: Setting, examples: int) -> Tensor:
        """In float64."""
        workload, model = self.case.found(), copy.deepcopy(self.model).double()
        x = workload.inputs(examples).double().to(self.device)
        if setting.method == "gradient":
            return gradient(model, x, workload.target).cpu()
        return integrated_gradients(model, x, workload.target, setting.points).cpu()

    def run(
        self, unit: str, batch: int, setting: Setting, report: Report, until: float
    ) -> dict[str, Entry]:
        """The entries of a race, which must be over `until` so many seconds from now."""
        clock, work = Clock(until), batch * setting.points
        report.begin(f"{unit}: the reference", PATIENCE)
        reference = None
        if report.refused.get(f"{unit}: the reference") is None:
            reference = self.reference(setting, self.case.examples(batch))

        def watch(name: str, reason: str) -> None:
            if not reason:
                report.begin(f"{unit}: {name}", COMPILING if name in COMPILED else PATIENCE)
            elif not device_answers():
                report.lost(reason)

        seconds = QUICK_SECONDS if self.case in QUICK_CASES else SECONDS
        left_out = {name: report.refused.get(f"{unit}: {name}") for name in self.workers}
        runners = {name: one for name, one in self.workers.items() if not left_out[name]}
        for worker in runners.values():
            worker.load(batch)
        # Seconds per gradient only fall as batches grow, so this guess is on the safe side.
        expected = {name: pace * work for name, pace in self.pace.items()}
        entries = race(runners, setting, reference, clock, seconds=seconds, rounds=20,
                       expected=expected, watch=watch)  # fmt: skip
        for name, entry in entries.items():
            if entry.median:
                self.pace[name] = min(self.pace.get(name, 1e9), entry.median / work)
        reasons = {name: why for name, why in (self.absent | left_out).items() if why}
        return entries | {name: Entry(reason=why) for name, why in reasons.items()}

    def rows(self, batch: int, setting: Setting, entries: dict[str, Entry]) -> Iterator[Row]:
        """The race's rows, with what ours were planned to do."""
        for row in rows(self.case, batch, setting, entries):
            name = row["contender"]
            if name.startswith(OURS) and not row["reason"]:
                row |= self.planned(name, setting)
            expected = (TIME, "out of memory", self.absent.get(name))
            bad = bool(row["reason"]) and row["reason"] not in expected
            yield {"failed": bad} | row

    def planned(self, name: str, setting: Setting) -> Row:
        try:
            plan = self.workers[name].plan(setting)
        except ContenderError as error:
            return {"plan": str(error), "failed": True}
        assert plan is not None
        failure = plan_failure(plan) if self.device == "cuda" else ""
        return {
            "strategy": plan.lean,
            "graphs": plan.graphs,
            "precision": plan.precision,
            "points_per_launch": plan.points_per_launch,
            "launches": plan.launches,
            "plan": str(plan),
            "failure": failure or None,
            "failed": bool(failure),
        }


_FIELD: list[Field] = []
"""The last one: races of a model follow one another."""


def _field(case: Case, names: tuple[str, ...], device: str) -> Field:
    known = [(one.case, one.names, one.device) for one in _FIELD]
    if known != [(case, names, device)]:
        _FIELD.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        _FIELD.append(Field(case, names, device))
    return _FIELD[0]


def _race(
    case: Case,
    batch: int,
    setting: Setting,
    names: tuple[str, ...],
    device: str,
    following: int,
    report: Report,
) -> Iterator[Row]:
    """One race, with its share of the time left for it and those that follow."""
    field, unit = _field(case, names, device), _name(case, batch, setting)
    entries = field.run(unit, batch, setting, report, report.left / (following + 1))
    yield from field.rows(batch, setting, entries)


def _name(case: Case, batch: int, setting: Setting) -> str:
    return f"{case.label} batch {batch} {setting.label}"


def races(options: dict[str, Any]) -> Iterator[Unit]:
    """Integrated Gradients of three networks."""
    device, quick = options["device"], options["quick"]
    names = ON_GPU if device == "cuda" else ON_CPU
    setting = QUICK_IG if quick else IG
    batches = {case: case.batches[-1:] if quick else case.batches for case in _cases(quick)}
    todo = [(case, batch) for case in batches for batch in batches[case]]
    for number, (case, batch) in enumerate(todo):
        about = (case, batch, setting, names, device, len(todo) - number - 1)
        yield Unit(_name(case, batch, setting), partial(_race, *about), PATIENCE)


def _cases(quick: bool) -> tuple[Case, ...]:
    return QUICK_CASES[:2] if quick else GPU_CASES


def compiled(options: dict[str, Any]) -> Iterator[Unit]:
    """Ours and Captum in compiled models: the first batch of each."""
    device, quick = options["device"], options["quick"]
    names = (OURS, CAPTUM, TUNED) if quick else (OURS, CAPTUM, TUNED, *COMPILED)
    setting, cases = QUICK_IG if quick else IG, _cases(quick)[: 1 if quick else 2]
    for number, case in enumerate(cases):
        about = (case, case.batches[0], setting, names, device, len(cases) - number - 1)
        name = f"{_name(case, case.batches[0], setting)}, compiled"
        yield Unit(name, partial(_race, *about), COMPILING)


def profiles(options: dict[str, Any]) -> Iterator[Unit]:
    """One call of ours by kernel, replayed and eager."""
    device, quick = options["device"], options["quick"]
    for case in _cases(quick)[: 1 if quick else None]:
        for graphs in (True, False):
            kind = "replayed" if graphs else "eager"
            run = partial(_profile, case, device, QUICK_IG if quick else IG, graphs)
            yield Unit(f"{case.label} {kind}", run)


def _profile(case: Case, device: str, setting: Setting, graphs: bool, _: Report) -> Iterator[Row]:
    from torch.profiler import ProfilerActivity, profile

    workload = case.found()
    model, x = workload.build().to(device), workload.inputs(1).to(device)
    name = (FLOAT16 if device == "cuda" else HALF).removeprefix(f"{OURS}, ")
    method = sf.IntegratedGradients(setting.points, "gauss_legendre")
    options: dict[str, Any] = {"precision": name, "graphs": graphs, "config": LATER}
    engine = sf.Engine(model, method, hashes=False, **options)
    for _number in range(3):
        engine(x, workload.target)
    plan = engine.plan(x, workload.target)
    begun = time.perf_counter()
    engine(x, workload.target)
    _synchronize(device)
    seconds = time.perf_counter() - begun
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        engine(x, workload.target)
        _synchronize(device)
    events = [(one.key, one.count, _own_time(one, device)) for one in found.key_averages()]
    events = sorted((one for one in events if one[2] > 0), key=lambda one: -one[2])
    busy = sum(one[2] for one in events)
    about = {"workload": case.workload, "shape": list(workload.shape), "precision": name,
             "points": setting.points, "graphs": plan.graphs, "replayed": graphs}  # fmt: skip
    # What is not busy waits for the host.
    yield about | {"kernel": None, "seconds": seconds, "busy_seconds": busy * 1e-6,
                   "calls": sum(one[1] for one in events)}  # fmt: skip
    for key, count, spent in events[:SHOWN]:
        yield about | {"kernel": key, "calls": count, "busy_seconds": spent * 1e-6,
                       "share": spent / busy}  # fmt: skip


def _own_time(event: Any, device: str) -> float:
    """Microseconds of a kernel, or of an operator on a CPU."""
    return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def others(options: dict[str, Any]) -> Iterator[Unit]:
    """Networks of timm: what is planned for them, how right it is, and its time against autograd's
    in the same arithmetic.
    """
    device, quick = options["device"], options["quick"]
    for name in QUICK_OTHERS if quick else OTHERS:
        yield Unit(f"timm {name}", partial(_other, name, device, quick), PATIENCE)


def _other(name: str, device: str, quick: bool, _: Report) -> Iterator[Row]:
    if importlib.util.find_spec("timm") is None:
        raise AbsentError("timm is not installed")
    import timm

    side, batch = (64, 2) if quick else (224, 32)
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    # Layer scales are nearly 0 before training, and all blocks would be silent.
    for one in (one for one in model.parameters() if 0 < float(one.abs().max()) < 1e-4):
        one.fill_(0.1)
    workload = Workload(name, lambda: model, (3, side, side), 3)
    model, x = model.to(device), workload.inputs(batch).to(device)
    exact = gradient(copy.deepcopy(model).double(), x[:1].double(), 3).cpu()
    for dtype in (torch.float32, torch.bfloat16 if device == "cpu" else torch.float16):
        about = {"workload": name, "shape": list(workload.shape), "batch": batch,
                 "precision": str(dtype).removeprefix("torch.")}  # fmt: skip
        try:
            yield about | _against_autograd(model, x, exact, dtype, device, 1 if quick else 9)
        except Exception as error:
            yield about | {"reason": first_line(error), "failed": True}


def _against_autograd(
    model: nn.Module, x: Tensor, exact: Tensor, dtype: torch.dtype, device: str, rounds: int
) -> Row:
    """Gradients of ours in a precision, and of the model in that type by autograd."""
    precision, plain_model = str(dtype).removeprefix("torch."), copy.deepcopy(model).to(dtype)
    engine = sf.Engine(model, sf.Gradient(), precision=precision, hashes=False, config=LATER)

    def ours() -> Tensor:
        values: Any = engine(x, 3).values
        _synchronize(device)
        return values

    def plain() -> None:
        with switches(tf32=False):
            gradient(plain_model, x.to(dtype), 3)
            _synchronize(device)

    for _ in range(3 if device == "cuda" else 1):
        # Kernels are loaded, and ours are recorded at a later call than the first.
        values = ours()
        plain()
    plan, times = engine.plan(x, 3), WallTimer(rounds)({"ours": ours, "plain": plain})
    failure = plan_failure(plan) if device == "cuda" else ""
    return {
        "error": relative_error(values.cpu(), exact),
        "seconds": times["ours"],
        "plain_seconds": times["plain"],
        "times_plain": times["plain"] / times["ours"],
        "gradients_per_second": len(x) / times["ours"],
        "strategy": plan.lean,
        "graphs": plan.graphs,
        "plan": str(plan),
        "reason": None,
        "failure": failure or None,
        "failed": bool(failure),
    }
