"""The fused ops: each against its reference and against a plain copy of the same bytes.

    python -m benchmarks.ops --device cpu

The three are timed in turn, round by round, in one run; medians are reported. The copy is
torch's `copy_` between buffers that exist already, of as many bytes as the op must move at least;
an op that returns a tensor also pays for fresh memory. On a GPU every call moves at least four
times what its L2 cache holds, and is timed by events around many launches.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.stages import Report, Unit
from benchmarks.timing import Timer, cache_bytes, timer_of
from saliency_fast import ops
from saliency_fast.ops import OPS, Op

ROUNDS, LAUNCHES = 7, 20
"""Rounds of a row, and launches of each on a GPU."""
TIMES_CACHE = 4
"""Times the bytes of a GPU's L2 cache that a call moves at least."""

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One op on one realistic size.

    exact: What its errors are taken against in float64, where its reference takes float32 alone.
    """

    op: Op
    size: str
    args: Args
    exact: Callable[..., Any] | None = None


# Each of these makes its calls with `times` as many examples, or rows.


def pictures(device: str, times: int = 1) -> list[Call]:
    """Batch 8 of 3 x 224 x 224, and the rows of a launch over it."""
    batch, rows = 8 * times, 64 * times
    x, baseline = (torch.randn(batch, 3, 224, 224, device=device) for _ in range(2))
    example = torch.arange(batch, device=device).repeat_interleave(8)
    sample = torch.arange(rows, device=device)
    alpha = torch.rand(rows, dtype=torch.float64, device=device)
    sigma = torch.full((batch,), 0.15, dtype=torch.float64, device=device)
    seed = torch.arange(batch, device=device)
    grads = torch.randn(rows, *x.shape[1:], device=device)
    count = torch.zeros(batch, dtype=torch.float64, device=device)
    size = f"{batch} x 3x224x224, {rows} rows"
    noise = (x, sigma, seed, example, sample, False, 0)
    pairs = (x, sigma, seed, example, sample, True, 0)
    lines = (x, baseline, sigma, seed, example, sample, 0)
    quiet = (x, baseline, 0 * sigma, seed, example, sample, 0)
    return [
        Call(ops.random_bits, f"{batch} rows of 150528", (seed, seed, 150528, 0, 0)),
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
        Call(ops.finish, f"{rows} slots of {batch} x 3x224x224, l2", (grads, x, baseline, "l2")),
    ]


def volumes(device: str, times: int = 1) -> list[Call]:
    """One volume of 64 MiB and four rows."""
    x, baseline = (torch.randn(times, 1, 256, 256, 256, device=device) for _ in range(2))
    example = torch.arange(times, device=device).repeat_interleave(4)
    alpha = torch.rand(4 * times, dtype=torch.float64, device=device)
    grads = torch.randn(4 * times, *x.shape[1:], device=device)
    count = torch.zeros(times, dtype=torch.float64, device=device)
    one = "256^3" if times == 1 else f"{times} x 256^3"
    size = f"{one}, {4 * times} rows"
    return [
        Call(ops.line_points, size, (x, baseline, example, alpha)),
        Call(ops.accumulate, size, (x.clone(), grads, example, alpha, "sum")),
        Call(ops.accumulate_moments, size, (x.clone(), x.abs(), count, grads, example)),
        Call(ops.finish, f"{one}, none", (grads[:times], x, baseline, "none")),
        Call(ops.magnitude_percentile, one, (x, 99.0)),
    ]


def frames(device: str, times: int = 1) -> list[Call]:
    """Sixteen frames of 512 x 512."""
    count = 16 * times
    values = torch.randn(count, 512 * 512, device=device)
    image, colors = (
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for shape in ((count, 512 * 512, 3), (256, 3))
    )
    scale = torch.full((count,), 2.5, device=device)
    size = f"{count} x 512x512"
    return [
        Call(ops.magnitude_percentile, size, (values, 99.0)),
        Call(ops.overlay, size, (image, values, scale, colors, True, 0.7)),
    ]


def activations(device: str, times: int = 1) -> list[Call]:
    """Batch 8 of 64 x 112 x 112, a residual network's first."""
    x, residual = (torch.randn(8 * times, 64, 112, 112, device=device) for _ in range(2))
    last = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 64, device=device)
    size = f"{8 * times} x 64x112x112"
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
        Call(ops.pack_mask, f"{size}, numbers", (x,)),
    ]


def tokens(device: str, times: int = 1) -> list[Call]:
    """Rows of a vision transformer's first size, 197 x 768, with a branch in a half type."""
    x, branch = (torch.randn(32 * times, 197, 768, device=device) for _ in range(2))
    weight, bias = torch.randn(2, 768, device=device)
    size, dtype = f"{32 * times} x 197x768", torch.float16
    given = (weight, bias, 1e-6)
    total, _, mean, scale = ops.add_layer_norm(x, branch, *given, torch.float32)
    kept = (total, mean, scale, weight)
    return [
        Call(ops.add_layer_norm, size, (x, branch, *given, torch.float32)),
        Call(ops.add_layer_norm, f"{size}, float16", (x, branch.to(dtype), *given, dtype)),
        Call(ops.add_layer_norm_backward, size, (branch, x, *kept, torch.float32)),
        Call(ops.add_layer_norm_backward, f"{size}, float16", (branch.to(dtype), x, *kept, dtype)),
    ]


def pooled(device: str, times: int = 1) -> list[Call]:
    """The pools of batch 8 of 64 x 112 x 112, and of volumes, in both layouts."""
    picture = torch.randn(8 * times, 64, 112, 112, device=device)
    volume = torch.randn(2 * times, 16, 32, 64, 64, device=device)
    calls = []
    for x, last, size, window in (
        (picture, torch.channels_last, "64x112x112", ((3, 3), (2, 2), (1, 1), (1, 1))),
        (volume, torch.channels_last_3d, "16x32x64x64", ([2] * 3, [2] * 3, [0] * 3, [1] * 3)),
    ):
        size = f"{len(x)} x {size}"
        for form, note in ((torch.contiguous_format, ""), (last, ", channels last")):
            laid = x.contiguous(memory_format=form)
            grad, index = ops.maxpool_index(laid, *window, False)
            back = (grad, index, list(x.shape[2:]), *window)
            calls.append(Call(ops.maxpool_index, size + note, (laid, *window, False)))
            calls.append(Call(ops.maxpool_index_backward, size + note, back))
    return calls


def convolved(device: str, times: int = 1) -> list[Call]:
    """Convolutions whose GPU version is cuDNN's: 3x3 of a residual network."""
    calls = []
    for channels, side in ((64, 56), (128, 28), (256, 14)) if device == "cpu" else ():
        x = torch.randn(8, channels, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
        args = (x, weight, torch.randn(channels), (1, 1))
        size = f"8 x {channels}x{side}x{side}"
        calls.append(Call(ops.winograd, size, args, _convolution))
        ready = (*args, True, ops.winograd_weights(weight))
        calls.append(Call(ops.winograd, f"{size}, weights ready", ready, _convolution))
    return calls


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: Any, *_: Any) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, padding=padding)


def perturbed(device: str, times: int = 1) -> list[Call]:
    """One picture of 3 x 224 x 224 with parts of it replaced, in 64 rows."""
    rows = 64 * times
    x, fill = torch.randn(1, 3, 224, 224, device=device), torch.zeros(1, 3, 224, 224, device=device)
    number = torch.arange(rows, device=device) % 64
    example, step = 0 * number, torch.arange(rows, device=device)
    corner = torch.stack([0 * number, number // 8 * 25, number % 8 * 25], 1)
    window = torch.tensor([3, 32, 32], device=device)
    segment = torch.arange(224 * 224, device=device).view(1, -1)
    segment = segment // 224 // 16 * 14 + segment % 224 // 16
    present = torch.rand(rows, 196, device=device) < 0.5
    mask = torch.rand(rows, 224 * 224, device=device)
    rank = torch.randperm(224 * 224, device=device).int().view(1, -1)
    size = f"3x224x224, {rows} rows"
    return [
        Call(ops.window_points, size, (x, fill, example, corner, corner + window)),
        Call(ops.segment_points, size, (x, fill, segment, present, example, step)),
        Call(ops.mask_points, size, (x, fill, mask, example, step)),
        Call(ops.rank_points, size, (x, fill, rank, example, 224 * 224 * number // 63)),
    ]


def maps(device: str, times: int = 1) -> list[Call]:
    """The last layers of residual networks, of a picture and of a volume, at the input's size."""
    calls = []
    for shape, size in (
        ((8, 2048, 7, 7), (224, 224)),
        ((8, 256, 14, 14), (224, 224)),
        ((1, 256, 16, 16, 16), (128, 128, 128)),
    ):
        shape = (shape[0] * times, *shape[1:])
        values, weights = (torch.randn(shape, device=device) for _ in range(2))
        named = f"{shape[0]} x {'x'.join(map(str, shape[1:]))} to {'x'.join(map(str, size))}"
        means = weights.flatten(2).mean(2)
        calls.append(Call(ops.cam, named, (values, means, size, True)))
        calls.append(Call(ops.cam, f"{named}, weights everywhere", (values, weights, size, True)))
    return calls


SIZES = (pictures, volumes, frames, activations, tokens, pooled, convolved, perturbed, maps)


def largest_call(op: Op) -> Call:
    """The op's sample that moves most bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = list(op.samples())
    largest = max(samples, key=lambda sample: op.moved(*sample.args))
    return Call(op, largest.note, largest.args)


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


def measure_call(call: Call, device: str, large: Call | None = None) -> dict[str, Any]:
    """Medians of the fast version, the reference and the copy; errors against float64.

    large: what is timed, where that is not what errors are taken of.
    """
    expected = outcome(call.exact or call.op.reference, call.op, call.args, double=True)
    # These two calls warm up as well.
    errors = {
        "error": relative_error(outcome(call.op, call.op, call.args, double=False), expected),
        "reference_error": relative_error(
            outcome(call.op.reference, call.op, call.args, double=False), expected
        ),
    }
    del expected
    call = large or call
    moved = call.op.moved(*call.args)
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    fast: dict[str, Callable[[], object]] = {
        "fast": lambda: call.op(*call.args),
        "copy": lambda: target.copy_(source),
    }
    slow: dict[str, Callable[[], object]] = {"reference": lambda: call.op.reference(*call.args)}
    if device == "cuda":
        times = _timer(device, ROUNDS, LAUNCHES)(fast) | _timer(device, 3, 1)(slow)
    else:
        times = _timer(device, ROUNDS, 1)(fast | slow)
    return {
        "op": call.op.name,
        "size": call.size,
        "megabytes": moved / 1e6,
        "fast_ms": times["fast"] * 1e3,
        "reference_ms": times["reference"] * 1e3,
        "copy_ms": times["copy"] * 1e3,
        "gigabytes_per_second": moved / times["fast"] / 1e9,
        "share_of_copy": times["copy"] / times["fast"],
        "speed_up": times["reference"] / times["fast"],
        **errors,
    }


@cache
def _timer(device: str, rounds: int, launches: int) -> Timer:
    return timer_of(device, rounds, launches)


def calls(device: str) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(op, size, measurement) of every call; nothing is allocated before its measurement."""
    least = TIMES_CACHE * cache_bytes() if device == "cuda" else 0
    for make in SIZES:
        # A device of shapes alone tells what a call moves.
        shapes = make("meta") if device == "cuda" else make(device)
        for number, shape in enumerate(shapes):
            # One more, since an input that all rows share does not grow with them.
            times = 1 + -(-least // shape.op.moved(*shape.args)) if least else 1
            yield shape.op.name, shape.size, partial(_measured, make, number, device, times)


def _measured(
    make: Callable[..., list[Call]], number: int, device: str, times: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    small = make(device)[number]
    large = make(device, times)[number] if times > 1 else None
    return measure_call(small, device, large)


def measure(device: str) -> list[dict[str, Any]]:
    """One row per op and size on `device`, "cpu" or "cuda"."""
    return [run() for _, _, run in calls(device)]


def units(options: dict[str, Any]) -> Iterator[Unit]:
    """A unit per call, for `benchmarks.gpu`; ops that were not found right are not measured.

    options: device; quick, for the ops' own samples; verdicts: "passed" or why not, by op.
    """
    device, verdicts = options["device"], options.get("verdicts")
    found = calls(device)
    if options["quick"]:
        largest = [largest_call(op) for op in OPS.values() if op.triton]
        found = ((one.op.name, one.size, partial(measure_call, one, device)) for one in largest)

    def run(op: str, measurement: Callable[[], dict[str, Any]], _: Report) -> Iterator[Any]:
        verdict = "passed" if verdicts is None else verdicts.get(op, "not checked")
        yield measurement() if verdict == "passed" else {"op": op, "reason": verdict}

    for op, size, measurement in found:
        yield Unit(f"{op}: {size}", partial(run, op, measurement), patience=20.0)


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
