"""The first minute on a GPU: every op, CUDA graphs, threads and settings give the right numbers.

Units of `benchmarks.gpu`; each is a few calls, compared with the reference or with eager launches.
A plan that leaves out memory-efficient strategies or graphs is a failure, since the numbers of
later stages would be those of another library.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saliency_fast as sf
from benchmarks.cases import sized
from benchmarks.contenders import LATER, plan_failure
from benchmarks.ops import largest_call, outcome
from benchmarks.stages import AbsentError, Report, Row, Unit
from saliency_fast.engine import cudagraph
from saliency_fast.ops import OPS, Op
from saliency_fast.ops.dispatch import CUDA_LIBRARY

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("small-mlp", "small-cnn", "tiny-vit", "tiny-unet3d")
EQUAL = 1e-9
"""Relative L2 of float64 maps of recorded and eager launches: rounding alone, of sums in any order
where atomics are allowed."""
CALLS = 4
"""Of one kind: whatever call a kind is recorded at, some are replayed."""
TF32_ERROR = 1e-4
"""Relative L2 beyond which a float32 map was not computed in float32."""
TOOLS, SANITIZER_SECONDS = ("memcheck", "racecheck"), 40.0
FP32_SETTINGS = (
    'torch.backends.fp32_precision = "tf32"',
    'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    'torch.backends.cudnn.conv.fp32_precision = "ieee"',
    'torch.set_float32_matmul_precision("medium")',
)
_SANITIZERS: dict[str, subprocess.Popen[str]] = {}


def units(options: dict[str, Any]) -> Iterator[Unit]:
    """options: device; recorder, "module:class" of a stand-in for graphs where there is none."""
    device = options["device"]
    if recorder := options.get("recorder"):
        module, _, name = recorder.partition(":")
        cudagraph.RECORDERS[device] = getattr(import_module(module), name)
    yield Unit("toolchain", partial(toolchain, device))
    for statement in FP32_SETTINGS:
        run = partial(_verdict, partial(keeps_setting, statement), device)
        yield Unit(statement, run, patience=20.0, alone=True)
    # What this child starts ends with it, so that no other child may follow.
    yield Unit("start of the sanitizers", partial(start_sanitizers, device))
    for name, op in OPS.items():
        if op.triton or device == "cpu":
            yield Unit(f"op {name}", partial(check_op, op, device), patience=20.0)
    for name in NETWORKS:
        yield Unit(f"capture against eager: {name}", partial(capture, name, device))
    for name, check in CHECKS.items():
        yield Unit(name, partial(_verdict, check, device), patience=20.0)
    for tool in TOOLS:
        yield Unit(f"compute-sanitizer {tool}", partial(sanitized, tool), SANITIZER_SECONDS)


def toolchain(device: str, _: Report) -> Iterator[Row]:
    """What kernels are compiled and loaded by; Triton needs a C compiler on the machine."""
    found = {name: shutil.which(name) for name in ("gcc", "cc", "nvcc", "compute-sanitizer")}
    row: Row = {name: path is not None for name, path in found.items()}
    row |= {"backends": sf.backends(), "cuda": torch.version.cuda, "failed": False}
    if device == "cuda":
        row["capability"] = list(torch.cuda.get_device_capability())
        row["driver"] = _driver()
    if device == "cuda" and not (found["gcc"] or found["cc"] or os.environ.get("CC")):
        row |= {"reason": "no C compiler is here, which Triton needs", "failed": True}
    yield row


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0]


def check_op(op: Op, device: str, report: Report) -> Iterator[Row]:
    """One row per version of the op: its sample of most bytes against the reference on the CPU."""
    from benchmarks.timing import WallTimer
    from benchmarks.tuning import Entry, wrong

    call = largest_call(op)
    expected = outcome(op.reference, op, call.args, double=False)
    args = tuple(one.to(device) if isinstance(one, Tensor) else one for one in call.args)
    moved, wanted = replace(call, args=args), [one.to(device) for one in expected]
    versions: dict[str, Callable[..., Any]] = {"dispatched": op.overload}
    if device == "cuda":
        versions["triton"] = op.launcher("triton")
        if op.cuda and CUDA_LIBRARY.exists():
            versions["cuda"] = op.launcher("cuda")
    for name, version in versions.items():
        seen: list[str] = []

        def run(name: str = name, version: Any = version, seen: list[str] = seen) -> None:
            seen.append(wrong(moved, Entry(name, version), wanted))

        seconds = WallTimer(1)({"first": run})["first"]
        yield {
            "op": op.name,
            "version": name,
            "size": call.size[:80],
            "first_call_seconds": seconds,
            "reason": seen[0] or None,
            "failed": bool(seen[0]),
        }


def _engine(model: Any, method: Any, **options: Any) -> sf.Engine:
    return sf.Engine(model, method, hashes=False, **{"config": LATER, **options})


def _network(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Tensor, Any]:
    workload = sized(name)
    model = workload.build().to(device, dtype)
    return model, workload.inputs(CALLS + 1, dtype=dtype).to(device), workload.target


def _gap(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm((found - expected).double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def _calls_apart(engine: sf.Engine, eager: sf.Engine, x: Tensor, target: Any) -> float:
    """The largest gap between the maps of two engines, over several calls of one kind."""
    gaps = []
    for number in range(CALLS):
        one = x[number : number + 2]
        gaps.append(_gap(engine(one, target).values, eager(one, target).values))
    return max(gaps)


def _judged(engine: sf.Engine, x: Tensor, target: Any, gap: float, most: float = EQUAL) -> str:
    """Why a check fails, or nothing: its gap, or the engine's plan."""
    if not gap <= most:
        return f"off by {gap:.1e}, expected at most {most:.0e}"
    return plan_failure(engine.plan(x[:2], target))


def capture(name: str, device: str, _: Report) -> Iterator[Row]:
    """Recorded launches of float64 against eager ones."""
    if device not in cudagraph.RECORDERS:
        raise AbsentError(f"there are no graphs on {device}")
    model, x, target = _network(name, device, torch.float64)
    for method in (sf.IntegratedGradients(12, "midpoint"), sf.SmoothGrad(8)):
        engine, eager = _engine(model, method), _engine(model, method, graphs=False)
        gap = _calls_apart(engine, eager, x, target)
        reason = _judged(engine, x, target, gap)
        plan = engine.plan(x[:2], target)
        yield {
            "network": name,
            "method": method.name,
            "gap": gap,
            "strategy": plan.lean,
            "graphs": plan.graphs,
            "reason": reason or None,
            "failed": bool(reason),
        }


def _verdict(check: Callable[[str], str], device: str, _: Report) -> Iterable[Row]:
    reason = check(device)
    return [{"reason": reason or None, "failed": bool(reason)}]


def _needs_graphs(device: str) -> None:
    if device not in cudagraph.RECORDERS:
        raise AbsentError(f"there are no graphs on {device}")


def two_threads(device: str) -> str:
    """Two kinds of call at once, which record and replay in two threads."""
    _needs_graphs(device)
    model, x, target = _network("small-cnn", device, torch.float64)
    methods = (sf.IntegratedGradients(12, "midpoint"), sf.SmoothGrad(8))
    engines = [_engine(model, method) for method in methods]
    eager = [_engine(model, method, graphs=False) for method in methods]
    expected = [[one(x[n : n + 2], target).values for n in range(CALLS)] for one in eager]

    def work(number: int) -> float:
        gaps = []
        for turn in range(5 * CALLS):
            n = turn % CALLS
            found = engines[number](x[n : n + 2], target).values
            gaps.append(_gap(found, expected[number][n]))
        return max(gaps)

    with ThreadPoolExecutor(2) as pool:
        gaps = list(pool.map(work, range(2)))
    return next(filter(None, (_judged(one, x, target, max(gaps)) for one in engines)), "")


def evict_and_replay(device: str) -> str:
    """A kind is replayed after another one was given up and its memory was used anew."""
    _needs_graphs(device)
    model, x, target = _network("small-cnn", device, torch.float64)
    given_up = _engine(model, sf.SmoothGrad(8))
    engine = _engine(model, sf.IntegratedGradients(12, "midpoint"))
    eager = _engine(model, sf.IntegratedGradients(12, "midpoint"), graphs=False)
    for number in range(CALLS):
        given_up(x[number : number + 2], target)
        engine(x[number : number + 2], target)
    given_up.close()
    del given_up
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    others = [torch.full((2**20,), float("nan"), device=device) for _ in range(64)]
    gap = _calls_apart(engine, eager, x, target)
    del others
    return _judged(engine, x, target, gap)


def tuple_seeds(device: str) -> str:
    """A seed for each example, which launches must not copy from the host."""
    _needs_graphs(device)
    model, x, target = _network("small-cnn", device, torch.float64)
    method = sf.SmoothGrad(8, seed=(3, 4))
    engine, eager = _engine(model, method), _engine(model, method, graphs=False)
    return _judged(engine, x, target, _calls_apart(engine, eager, x, target))


def two_halves(device: str) -> str:
    """Launches of which two halves run beside one another."""
    _needs_graphs(device)
    model, x, target = _network("small-cnn", device, torch.float64)
    method, config = sf.SmoothGrad(9), replace(LATER, graph_halves=True)
    engine, eager = _engine(model, method, config=config), _engine(model, method, graphs=False)
    return _judged(engine, x, target, _calls_apart(engine, eager, x, target))


def used_elsewhere(device: str) -> str:
    """Results of the service are read on another stream, and dropped while it is busy."""
    if device != "cuda":
        raise AbsentError(f"there are no streams on {device}")
    model, x, target = _network("small-cnn", device, torch.float64)
    method = sf.IntegratedGradients(12, "midpoint")
    expected = _engine(model, method)(x[:2], target).values
    side, gaps = torch.cuda.Stream(), []
    with _engine(model, method) as engine:
        for _ in range(4 * CALLS):
            values = engine.submit(x[:2], target).result(timeout=20).values
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(10_000_000)
                kept = values * 1.0
            # From here on the memory may be handed out anew before `side` has read it.
            del values
            torch.full_like(kept, float("nan"))
            side.synchronize()
            gaps.append(_gap(kept, expected))
    return "" if max(gaps) <= EQUAL else f"off by {max(gaps):.1e}"


CHECKS: dict[str, Callable[[str], str]] = {
    "two kinds in two threads": two_threads,
    "evict one, replay the other": evict_and_replay,
    "a seed for each example": tuple_seeds,
    "two halves of a launch": two_halves,
    "results on another stream": used_elsewhere,
}


_SETTINGS: tuple[Callable[[], object], ...] = (
    lambda: torch.backends.cudnn.benchmark,
    lambda: torch.backends.fp32_precision,
    lambda: torch.backends.cuda.matmul.fp32_precision,
    lambda: torch.backends.cudnn.conv.fp32_precision,
    lambda: torch.backends.cuda.matmul.allow_tf32,
    lambda: torch.backends.cudnn.allow_tf32,
    torch.get_float32_matmul_precision,
)


def _read(setting: Callable[[], object]) -> object:
    """A setting; the getters of old ones raise where new ones differ from them."""
    try:
        return setting()
    except (AttributeError, RuntimeError) as error:
        return type(error).__name__


def settings() -> list[object]:
    """PyTorch's settings of float32 arithmetic, as far as they can be read."""
    return list(map(_read, _SETTINGS))


def keeps_setting(statement: str, device: str) -> str:
    """Under a setting of the user's, float32 maps are float32, and the setting is kept."""
    # TF32 is cuDNN's, too; a CPU has neither.
    name = "small-cnn" if device == "cuda" else "small-mlp"
    model, x, target = _network(name, device, torch.float32)
    wide = _network(name, device, torch.float64)
    method = sf.IntegratedGradients(12, "midpoint")
    expected = _engine(wide[0], method)(wide[1][:2], target).values
    exec(statement)
    before = settings()
    found = _engine(model, method, precision="float32")(x[:2], target).values
    if (gap := _gap(found, expected)) > TF32_ERROR:
        return f"precision='float32' is off by {gap:.1e} from float64"
    after = settings()
    return "" if after == before else f"settings were {before}, and are {after} behind a call"


def start_sanitizers(device: str, _: Report) -> Iterator[Row]:
    """They take longest, and no check that runs beside them is timed."""
    yield {"started": [one for one in TOOLS if device == "cuda" and _start_sanitizer(one)]}


def _start_sanitizer(tool: str) -> bool:
    """Starts the CUDA ops under a tool in a process of its own; False where there is none."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(path).exists() or not CUDA_LIBRARY.exists():
        return False
    command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    command.append("benchmarks.gpu_smoke")
    # Otherwise memory that PyTorch keeps around a tensor counts as the tensor's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _SANITIZERS[tool] = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return True


def sanitized(tool: str, report: Report) -> Iterator[Row]:
    """What memcheck or racecheck says of the CUDA library."""
    if tool not in _SANITIZERS and not _start_sanitizer(tool):
        what = "compute-sanitizer" if CUDA_LIBRARY.exists() else "the CUDA library"
        raise AbsentError(f"{what} is not here")
    process = _SANITIZERS[tool]
    try:
        output, _ = process.communicate(timeout=max(1.0, min(SANITIZER_SECONDS - 5, report.left)))
    except subprocess.TimeoutExpired:
        process.kill()
        yield {"tool": tool, "reason": "time", "failed": False}
        return
    errors = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    bad = process.returncode != 0
    reason = f"exit code {process.returncode}: {output.strip()[-600:]}" if bad else None
    yield {"tool": tool, "errors": errors, "reason": reason, "failed": bad}


def run_cuda_ops() -> None:
    """Every op of the CUDA library on its first and its largest samples, for a sanitizer."""
    for op in OPS.values():
        if op.cuda:
            launcher, first = op.launcher("cuda"), next(iter(op.samples())).args
            for given in (first, largest_call(op).args):
                # Made on the host, so that no kernel but the op's own is looked at.
                launcher(*(one.cuda() if isinstance(one, Tensor) else one for one in given))
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_cuda_ops()
