"""Switches of the engine that a GPU has to decide: each network with one off and on.

Units of `benchmarks.gpu`. A switch is one or more fields of `EngineConfig` that are off until a
measurement has shown that they pay. Off and on take turns in one process, their maps are held
against each other, and a row says whether to take it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import saliency_fast as sf
from benchmarks.cases import GPU_CASES, QUICK_CASES, QUICK_SETTINGS, SETTINGS, Case
from benchmarks.contenders import LATER, plan_failure
from benchmarks.fresh import first_line
from benchmarks.reference import relative_error
from benchmarks.stages import Report, Row, Unit, device_answers
from benchmarks.timing import WallTimer, timer_of
from saliency_fast import ops
from saliency_fast.graph.autograd import convolutions

SWITCHES: dict[str, Row] = {
    "convolution + ReLU": {"fused_relu": True},
    "convolution + residual + ReLU": {"fused_residual_relu": True},
    "residual + LayerNorm": {"fused_layer_norm": True},
    "two halves of a launch": {"graph_halves": True},
}
"""For each switch the fields of `EngineConfig` that turn it on."""
ALL = "all of them"
OFF = "off"
GAIN = 1.02
"""Times as fast that a switch must be to be worth its code, and as slow to be refused."""
BATCH, QUICK_BATCH = 8, 1
ROUNDS, QUICK_ROUNDS = 9, 2
SECONDS = 6.0
"""Of a network's timed rounds."""
PATIENCE = 30.0


CONVOLUTIONS = ((64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (512, 512, 14, 3, 2), (512, 2048, 7, 1, 1))
"""Channels, results, side, kernel and stride of some of ResNet-50's."""
EXAMPLES = 64


def units(options: dict[str, Any]) -> Iterator[Unit]:
    """Single calls, then Integrated Gradients of each network, in float16 on a GPU."""
    device, quick = options["device"], options["quick"]
    for shape in CONVOLUTIONS[-1:] if quick else CONVOLUTIONS:
        yield Unit(f"calls {'x'.join(map(str, shape))}", partial(_calls, shape, device), PATIENCE)
    for case in QUICK_CASES if quick else GPU_CASES:
        yield Unit(f"{case.label} switches", partial(_switched, case, device, quick), PATIENCE)


def _calls(shape: tuple[int, ...], device: str, _: Report) -> Iterator[Row]:
    """A convolution, what is added, the ReLU and its mask: by one call and the packing of its
    result, and apart. Memory that is handed out holds NaN: ATen gives cuDNN its unwritten result
    times 0 where nothing is added.
    """
    channels, out, side, kernel, stride = shape
    examples = EXAMPLES if device == "cuda" else 1
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    x = torch.randn(examples, channels, side, side, **like)
    weight = torch.randn(out, channels, kernel, kernel, **like) / (channels * kernel**2) ** 0.5
    x, weight = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight))
    geometry = ([stride] * 2, [kernel // 2] * 2, [1] * 2)
    whole = (x, weight, torch.randn(out, **like), *geometry, False, [0, 0], 1)
    like_result = convolutions.convolved(*whole)
    for name, added in zip(SWITCHES, (None, torch.randn_like(like_result)), strict=False):

        def one_call(added: Any = added) -> Any:
            y = convolutions._with_relu(*whole[:3], added, *geometry, 1)
            return y, ops.pack_mask(y)

        def apart(added: Any = added) -> Any:
            y = convolutions.convolved(*whole)
            return y, ops.relu_mask_(y, None, None, added, 0.0, math.inf)

        expected = apart()[0]
        for _number in range(3):
            torch.full_like(expected, math.nan)
        found = one_call()[0]
        times = timer_of(device, ROUNDS)({"off": apart, "on": one_call})
        row = judged(times["off"], times["on"], expected.float(), found.float())
        yield row | {"call": name, "failed": row["reason"] is not None}


def _switched(case: Case, device: str, quick: bool, report: Report) -> Iterator[Row]:
    workload, setting = case.found(), (QUICK_SETTINGS if quick else SETTINGS)[1]
    model = workload.build().to(device)
    x = workload.inputs(QUICK_BATCH if quick else BATCH).to(device)
    precision = "float16" if device == "cuda" else "bfloat16"
    about = {"workload": workload.name, "shape": list(workload.shape), "batch": len(x),
             "setting": setting.label, "precision": precision}  # fmt: skip
    method = sf.IntegratedGradients(setting.points, "gauss_legendre")
    fields: dict[str, Row] = {OFF: {}, **SWITCHES}
    fields[ALL] = {name: value for own in SWITCHES.values() for name, value in own.items()}
    engines, maps, reasons = dict[str, sf.Engine](), dict[str, torch.Tensor](), dict[str, str]()

    def call(name: str) -> torch.Tensor:
        return engines[name](x, workload.target).values

    for name, own in fields.items():
        report.begin(f"{case.label}: {name}", PATIENCE)
        if why := report.refused.get(f"{case.label}: {name}"):
            reasons[name] = why
            continue
        config = replace(LATER, **own, **({"lean_from": 0} if quick else {}))
        engines[name] = sf.Engine(model, method, hashes=False, precision=precision, config=config)
        try:
            # Kernels are loaded, and launches are captured at a later call than the first.
            for _ in range(1 if quick else 3):
                maps[name] = call(name)
        except Exception as error:
            reasons[name] = first_line(error)
            if not device_answers():
                report.lost(reasons[name])
    timed = {name: partial(call, name) for name in maps if name not in reasons}
    times = WallTimer(QUICK_ROUNDS if quick else ROUNDS, SECONDS)(_finished(timed, device))
    for name in fields:
        about |= {"switch": name, "failed": name in reasons, "reason": reasons.get(name)}
        if name not in times or OFF not in times:
            yield dict(about)
            continue
        plan = engines[name].plan(x, workload.target)
        failure = plan_failure(plan) if device == "cuda" else ""
        row = judged(times[OFF], times[name], maps[OFF], maps[name])
        row |= {"strategy": plan.lean, "graphs": plan.graphs, "plan": str(plan),
                "points_per_launch": plan.points_per_launch}  # fmt: skip
        reason = row["reason"] or failure or None
        yield about | row | {"reason": reason, "failed": reason is not None}
    engines.clear()
    gc.collect()


def judged(off: float, on: float, expected: torch.Tensor, found: torch.Tensor) -> Row:
    """A switch's times and maps, and whether to take it."""
    gap, allowed = relative_error(found, expected), LATER.precision_tolerance
    # Written so that NaN is refused.
    reason = None if gap <= allowed else f"maps differ by {gap:.1e}, expected at most {allowed}"
    return {"off_seconds": off, "seconds": on, "times_off": off / on, "gap": gap, "reason": reason,
            "take": reason is None and off > GAIN * on, "slower": on > GAIN * off}  # fmt: skip


def _finished(functions: dict[str, Any], device: str) -> dict[str, Any]:
    """The same functions, each of which waits for the GPU."""

    def run(function: Any) -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: partial(run, function) for name, function in functions.items()}
