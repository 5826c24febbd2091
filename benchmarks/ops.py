"""The fused ops: each against its reference and against a plain copy of the same bytes.

    python -m benchmarks.ops --device cpu

The three are timed in turn, round by round, in one run; medians are reported. The copy is
torch's `copy_` between buffers that exist already, of as many bytes as the op must move at least;
an op that returns a tensor also pays for fresh memory.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast.ops import Op

ROUNDS = 7
SECONDS = 2.0
"""A row stops after so many rounds or, once two are done, so many seconds."""

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One op on one realistic size."""

    op: Op
    size: str
    args: Args


def pictures(device: str) -> list[Call]:
    """Batch 8 of 3 x 224 x 224, and the rows of a launch over it."""
    x, baseline = (torch.randn(8, 3, 224, 224, device=device) for _ in range(2))
    example = torch.arange(8, device=device).repeat_interleave(8)
    sample = torch.arange(64, device=device)
    alpha = torch.rand(64, dtype=torch.float64, device=device)
    sigma = torch.full((8,), 0.15, dtype=torch.float64, device=device)
    seed = torch.arange(8, device=device)
    grads = torch.randn(64, *x.shape[1:], device=device)
    count = torch.zeros(8, dtype=torch.float64, device=device)
    size = "8 x 3x224x224, 64 rows"
    noise = (x, sigma, seed, example, sample, False, 0)
    pairs = (x, sigma, seed, example, sample, True, 0)
    lines = (x, baseline, sigma, seed, example, sample, 0)
    quiet = (x, baseline, 0 * sigma, seed, example, sample, 0)
    return [
        Call(ops.random_bits, "8 rows of 150528", (seed, seed, 150528, 0, 0)),
        Call(ops.line_points, size, (x, baseline, example, alpha)),
        Call(ops.noise_points, size, noise),
        Call(ops.noise_points, f"{size}, antithetic", pairs),
        Call(ops.random_line_points, size, lines),
        Call(ops.random_line_points, f"{size}, sigma 0", quiet),
        Call(ops.accumulate, size, (x.clone(), grads, example, alpha, "sum")),
        Call(
            ops.accumulate,
            f"{size}, bfloat16",
            (x.clone(), grads.bfloat16(), example, alpha, "sum"),
        ),
        Call(ops.accumulate_moments, size, (x.clone(), x.abs(), count, grads, example)),
        Call(ops.accumulate_random_lines, size, (x.clone(), grads, example, alpha, *lines)),
        Call(
            ops.accumulate_random_lines,
            f"{size}, sigma 0",
            (x.clone(), grads, example, alpha, *quiet),
        ),
        Call(ops.finish, "64 slots of 8 x 3x224x224, l2", (grads, x, baseline, "l2")),
    ]


def volumes(device: str) -> list[Call]:
    """One volume of 64 MiB and four rows."""
    x, baseline = (torch.randn(1, 1, 256, 256, 256, device=device) for _ in range(2))
    example = torch.zeros(4, dtype=torch.int64, device=device)
    alpha = torch.rand(4, dtype=torch.float64, device=device)
    grads = torch.randn(4, *x.shape[1:], device=device)
    count = torch.zeros(1, dtype=torch.float64, device=device)
    size = "256^3, 4 rows"
    return [
        Call(ops.line_points, size, (x, baseline, example, alpha)),
        Call(ops.accumulate, size, (x.clone(), grads, example, alpha, "sum")),
        Call(ops.accumulate_moments, size, (x.clone(), x.abs(), count, grads, example)),
        Call(ops.finish, "256^3, none", (grads[:1], x, baseline, "none")),
        Call(ops.magnitude_percentile, "256^3", (x, 99.0)),
    ]


def frames(device: str) -> list[Call]:
    """Sixteen frames of 512 x 512."""
    values = torch.randn(16, 512 * 512, device=device)
    image, colors = (
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for shape in ((16, 512 * 512, 3), (256, 3))
    )
    scale = torch.full((16,), 2.5, device=device)
    return [
        Call(ops.magnitude_percentile, "16 x 512x512", (values, 99.0)),
        Call(ops.overlay, "16 x 512x512", (image, values, scale, colors, True, 0.7)),
    ]


def activations(device: str) -> list[Call]:
    """Batch 8 of 64 x 112 x 112, a residual network's first."""
    x, residual = (torch.randn(8, 64, 112, 112, device=device) for _ in range(2))
    last = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 64, device=device)
    size = "8 x 64x112x112"
    plain, parts = (None, None, None, 0.0, math.inf), (scale, shift, residual, 0.0, math.inf)
    _, mask = ops.relu_mask(x, *plain)
    standard, guided = (0.0, "standard", False), (0.0, "guided", True)
    return [
        Call(ops.relu_mask, size, (x, *plain)),
        Call(ops.relu_mask, f"{size}, bfloat16", (x.bfloat16(), *plain)),
        Call(ops.relu_mask_, f"{size}, scale and residual", (x.clone(), *parts)),
        Call(ops.relu_mask_, f"{size}, scale, channels last", (last, scale, shift, None, 0.0, 6.0)),
        Call(ops.relu_mask_backward, size, (residual, mask, None, *standard, False)),
        Call(ops.relu_mask_backward, f"{size}, scale", (residual, mask, scale, *standard, False)),
        Call(ops.relu_mask_backward, f"{size}, both", (residual, mask, scale, *guided, False)),
        Call(ops.pack_mask, size, (x > 0,)),
    ]


def pooled(device: str) -> list[Call]:
    """The pools of batch 8 of 64 x 112 x 112, and of volumes, in both layouts."""
    picture = torch.randn(8, 64, 112, 112, device=device)
    volume = torch.randn(2, 16, 32, 64, 64, device=device)
    calls = []
    for x, last, size, window in (
        (picture, torch.channels_last, "8 x 64x112x112", ((3, 3), (2, 2), (1, 1), (1, 1))),
        (volume, torch.channels_last_3d, "2 x 16x32x64x64", ([2] * 3, [2] * 3, [0] * 3, [1] * 3)),
    ):
        for form, note in ((torch.contiguous_format, ""), (last, ", channels last")):
            laid = x.contiguous(memory_format=form)
            grad, index = ops.maxpool_index(laid, *window, False)
            back = (grad, index, list(x.shape[2:]), *window)
            calls.append(Call(ops.maxpool_index, size + note, (laid, *window, False)))
            calls.append(Call(ops.maxpool_index_backward, size + note, back))
    return calls


def convolved(device: str) -> list[Call]:
    """Convolutions whose GPU version is cuDNN's: 3x3 of a residual network."""
    calls = []
    for channels, side in ((64, 56), (128, 28), (256, 14)) if device == "cpu" else ():
        x = torch.randn(8, channels, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
        args = (x, weight, torch.randn(channels), (1, 1))
        calls.append(Call(ops.winograd, f"8 x {channels}x{side}x{side}", args))
        ready = (*args, True, ops.winograd_weights(weight))
        calls.append(Call(ops.winograd, f"8 x {channels}x{side}x{side}, weights ready", ready))
    return calls


def perturbed(device: str) -> list[Call]:
    """One picture of 3 x 224 x 224 with parts of it replaced, in 64 rows."""
    x, fill = torch.randn(1, 3, 224, 224, device=device), torch.zeros(1, 3, 224, 224, device=device)
    number = torch.arange(64, device=device)
    example = 0 * number
    corner = torch.stack([0 * number, number // 8 * 25, number % 8 * 25], 1)
    window = torch.tensor([3, 32, 32], device=device)
    segment = torch.arange(224 * 224, device=device).view(1, -1)
    segment = segment // 224 // 16 * 14 + segment % 224 // 16
    present = torch.rand(64, 196, device=device) < 0.5
    mask = torch.rand(64, 224 * 224, device=device)
    rank = torch.randperm(224 * 224, device=device).int().view(1, -1)
    size = "3x224x224, 64 rows"
    return [
        Call(ops.window_points, size, (x, fill, example, corner, corner + window)),
        Call(ops.segment_points, size, (x, fill, segment, present, example, number)),
        Call(ops.mask_points, size, (x, fill, mask, example, number)),
        Call(ops.rank_points, size, (x, fill, rank, example, 224 * 224 * number // 63)),
    ]


def maps(device: str) -> list[Call]:
    """The last layers of residual networks, of a picture and of a volume, at the input's size."""
    calls = []
    for shape, size in (
        ((8, 2048, 7, 7), (224, 224)),
        ((8, 256, 14, 14), (224, 224)),
        ((1, 256, 16, 16, 16), (128, 128, 128)),
    ):
        values, weights = (torch.randn(shape, device=device) for _ in range(2))
        named = f"{shape[0]} x {'x'.join(map(str, shape[1:]))} to {'x'.join(map(str, size))}"
        means = weights.flatten(2).mean(2)
        calls.append(Call(ops.cam, named, (values, means, size, True)))
        calls.append(Call(ops.cam, f"{named}, weights everywhere", (values, weights, size, True)))
    return calls


SIZES = (pictures, volumes, frames, activations, pooled, convolved, perturbed, maps)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    function()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def outcome(function: Callable[..., Any], op: Op, args: Args, *, double: bool) -> list[Tensor]:
    """Outputs and changed arguments of one call on copies, in float64 where `double`."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone().double() if double and value.is_floating_point() else value.clone()

    copies = tuple(fresh(value) for value in args)
    out = function(*copies)
    returned = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    arguments = op.overload._schema.arguments
    return returned + [c for c, a in zip(copies, arguments, strict=True) if a.is_write]


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 error of any result."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        scale = torch.linalg.vector_norm(b.double()).item() or 1.0
        error = torch.linalg.vector_norm(a.double() - b.double()).item() / scale
        worst = max(worst, error)
    return worst


def measure_call(call: Call, device: str) -> dict[str, Any]:
    """Medians of the fast version, the reference and the copy; errors against float64."""
    moved = call.op.moved(*call.args)
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    sides: dict[str, Callable[[], object]] = {
        "fast": lambda: call.op(*call.args),
        "copy": lambda: target.copy_(source),
        "reference": lambda: call.op.reference(*call.args),
    }
    expected = outcome(call.op.reference, call.op, call.args, double=True)
    # These two calls warm up as well.
    errors = {
        "error": relative_error(outcome(call.op, call.op, call.args, double=False), expected),
        "reference_error": relative_error(
            outcome(call.op.reference, call.op, call.args, double=False), expected
        ),
    }
    timed(sides["copy"], device)
    times: dict[str, list[float]] = {side: [] for side in sides}
    begun = time.perf_counter()
    for number in range(ROUNDS):
        for side, function in sides.items():
            times[side].append(timed(function, device))
        if number >= 1 and time.perf_counter() - begun > SECONDS:
            break
    fast, copy, reference = (statistics.median(times[side]) for side in sides)
    return {
        "op": call.op.name,
        "size": call.size,
        "megabytes": moved / 1e6,
        "rounds": len(times["fast"]),
        "fast_ms": fast * 1e3,
        "reference_ms": reference * 1e3,
        "copy_ms": copy * 1e3,
        "gigabytes_per_second": moved / fast / 1e9,
        "share_of_copy": copy / fast,
        "speed_up": reference / fast,
        **errors,
    }


def measure(device: str) -> list[dict[str, Any]]:
    """One row per op and size on `device`, "cpu" or "cuda"."""
    rows = []
    for make in SIZES:
        torch.manual_seed(0)
        rows += [measure_call(call, device) for call in make(device)]
    return rows


def setting(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if device == "cpu" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": ops.backends(),
        "command": f"python -m benchmarks.ops --device {device}",
    }


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']};"
        f" `{about['command']}`. Medians; a copy moves the same bytes; errors are relative L2"
        " against the float64 reference.",
        "",
        "| op | size | MB | ms | reference ms | speed-up | GB/s | share of copy | error |"
        " reference error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{row['op']}` | {row['size']} | {row['megabytes']:.0f} | {row['fast_ms']:.2f} |"
        f" {row['reference_ms']:.1f} | {row['speed_up']:.1f}x |"
        f" {row['gigabytes_per_second']:.1f} | {row['share_of_copy']:.0%} |"
        f" {row['error']:.1e} | {row['reference_error']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="path without its extension (.json, .md)")
    options = parser.parse_args()
    default = Path(__file__).parent / "results" / f"ops-{options.device}"
    out: Path = options.out or default
    rows, about = measure(options.device), setting(options.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"setting": about, "rows": rows}, indent=1)
    out.with_suffix(".json").write_text(document + "\n")
    out.with_suffix(".md").write_text(table(rows, about))
    print(table(rows, about))


if __name__ == "__main__":
    main()
