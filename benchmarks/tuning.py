"""Which configuration of a kernel, and which of an op's two GPU versions, is the fastest.

Candidates are checked before they are timed: one that fails, spills or gives other results than the
op's reference never wins. Those that stand are timed in turn, round by round, beside a copy of as
many bytes as the op must move. `python -m benchmarks.kernels --tune` runs it; what it finds is
checked in by hand (kernels/configurations.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from saliency_fast.kernels.configurations import TABLE, Choice, Configuration
from torch import Tensor

from benchmarks.ops import SIZES, Call, outcome, relative_error
from benchmarks.timing import Run, Timer
from saliency_fast.ops import OPS
from saliency_fast.ops.dispatch import CUDA_LIBRARY, cuda_refusal

OP_OF = {
    "accumulate.accumulate": "accumulate",
    "accumulate.moments": "accumulate_moments",
    "accumulate.random_lines": "accumulate_random_lines",
    "cam.resize": "cam",
    "cam.weigh": "cam",
    "finish.finish": "finish",
    "masks.forward": "relu_mask",
    "masks.backward": "relu_mask_backward",
    "masks.pack": "pack_mask",
    "norms.forward": "add_layer_norm",
    "norms.backward": "add_layer_norm_backward",
    "overlay.count": "magnitude_percentile",
    "overlay.narrow": "magnitude_percentile",
    "overlay.overlay": "overlay",
    "philox.bits": "random_bits",
    "points.line": "line_points",
    "points.noise": "noise_points",
    "points.random_line": "random_line_points",
    "pools.maxpool": "maxpool_index",
    "pools.maxpool_backward": "maxpool_index_backward",
    "ranks.rank": "rank_points",
    "segments.mask": "mask_points",
    "segments.segment": "segment_points",
    "windows.window": "window_points",
}
"""The op by which a kernel is timed and its bytes are counted."""
WORTH = 0.02
"""A gain below this share is within what the same kernel differs from run to run."""
ALLOWED = {torch.float32: 1024, torch.float64: 1024, torch.bfloat16: 4, torch.float16: 4}
"""Relative error of a candidate's results in units of their last place: sums in another order."""
VERSUS = {
    "noise_points": (4, 8),
    "magnitude_percentile": (4, 8),
    "relu_mask": (2, 4, 8),
    "relu_mask_": (2, 4, 8),
    "relu_mask_backward": (2, 4, 8),
    "pack_mask": (1, 2, 4, 8),
}
"""The ops in both languages, and the bytes of the elements on which they are compared."""


@dataclass(frozen=True)
class Entry:
    """One contender: its version of the op, how to make it current, and why it is refused."""

    label: str
    version: Callable[..., Any]
    current: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    refused: str = ""


def call_for(op: str, width: int, device: str) -> Call:
    """The op's first call of the benchmark, its numbers in the type of `width` bytes."""
    calls = (call for make in SIZES for call in make(device) if call.op.name == op)
    call = next(calls)
    if width > 1 and getattr(call.args[0], "dtype", None) == torch.bool:
        call = next(calls)  # The same op of numbers.
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}.get(width)
    # Totals keep their precision when gradients are short.
    short = {"grads"} if width == 2 and op.startswith("accumulate") else None
    names = [argument.name for argument in call.op.overload._schema.arguments]

    def cast(name: str, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(dtype) if is_float and (short is None or name in short) else value

    args = tuple(cast(name, value) for name, value in zip(names, call.args, strict=True))
    return replace(call, args=args)


@contextlib.contextmanager
def using(kernel: str, configuration: Configuration) -> Iterator[None]:
    """The kernel in this configuration, for elements of any width on any target."""
    choice = Choice("a candidate", dict.fromkeys((1, 2, 4, 8), configuration))
    with mock.patch.dict(TABLE, {kernel: choice}):
        yield


def candidates(kernel: str, width: int, target: str) -> list[Configuration]:
    """The checked-in configuration and its neighbours in what the kernel's launcher reads."""
    choice = TABLE[kernel]
    chosen = choice.at(width, target)
    found = {chosen: None}
    sizes = (
        [chosen.elements * n // 4 for n in (1, 2, 4, 8, 16)] if "elements" in choice.free else []
    )
    for elements in sizes or [chosen.elements]:
        for warps in (1, 2, 4, 8):
            found[replace(chosen, elements=elements, warps=warps)] = None
    for name in {"ahead", "tiles"}.intersection(choice.free):
        for number in (1, 2, 4, 8):
            found[replace(chosen, **{name: number})] = None
    return list(found)


def label(configuration: Configuration) -> str:
    """Its elements and warps, and what else is not one."""
    others = {"rows ahead": configuration.ahead, "tiles": configuration.tiles}
    parts = [f"{configuration.elements} elements", f"{configuration.warps} warps"]
    return ", ".join(parts + [f"{number} {name}" for name, number in others.items() if number > 1])


def spilling(kernel: str, width: int, target: str) -> str:
    """Why the kernel's configuration is refused by what the compiler makes of it, or nothing."""
    from benchmarks.compiled import spills
    from benchmarks.specialisations import specialisations

    for special in specialisations():
        if special.key == kernel and special.width == width:
            used = spills(special.compiled(target))
            if any(used.values()):
                return f"spills: {', '.join(f'{name} {n}' for name, n in used.items() if n)}"
    return ""


def wrong(call: Call, entry: Entry, expected: list[Tensor]) -> str:
    """Why the entry's results are refused, or nothing; its memory is filled with NaN before."""
    with entry.current(), _poisoned():
        got = outcome(entry.version, call.op, call.args, double=False)
    if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in expected]:
        return "its results have other shapes or types than the reference's"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.numel() > 0 and not _same(call.op.name, a, b):
            return f"result {number} differs from the reference's"
    return ""


def _same(op: str, got: Tensor, expected: Tensor) -> bool:
    """Whether a result is the reference's, to rounding where it is no integer."""
    if op == "overlay":
        # A colour may be rounded to the next, rarely: its blend is computed in another order.
        error = (got.int() - expected.int()).abs()
        return int(error.max()) <= 1 and int((error > 0).sum()) <= got.numel() // 1000
    if not got.is_floating_point():
        return torch.equal(got, expected)
    allowed = ALLOWED[got.dtype] * torch.finfo(got.dtype).eps
    largest = float((got.double() - expected.double()).abs().max())
    if not largest <= allowed * float(expected.double().abs().max()):
        return False
    return relative_error([got], [expected]) <= allowed


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def race(call: Call, entries: list[Entry], timer: Timer) -> list[dict[str, Any]]:
    """One row per entry, in order: its seconds or why it was refused; one row is the fastest."""
    expected = outcome(call.op.reference, call.op, call.args, double=False)
    refused = {
        entry.label: entry.refused or _failure(partial(wrong, call, entry, expected))
        for entry in entries
    }
    moved = call.op.moved(*call.args)
    times: dict[str, float] = {}
    standing = [entry for entry in entries if not refused[entry.label]]
    if standing:
        times = timer({entry.label: _run(call, entry) for entry in standing} | _copy(call, moved))
    fastest = min((entry.label for entry in standing), key=times.__getitem__, default="")
    return [
        {
            "op": call.op.name,
            "size": call.size,
            "bytes": moved,
            "label": entry.label,
            "refused": refused[entry.label],
            "seconds": times.get(entry.label),
            "share_of_copy": times["copy"] / times[entry.label] if entry in standing else None,
            "fastest": entry.label == fastest,
        }
        for entry in entries
    ]


def _failure(check: Callable[[], str]) -> str:
    """What `check` says, or what it raised."""
    try:
        return check()
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}".splitlines()[0]


def _run(call: Call, entry: Entry) -> Run:
    def run() -> object:
        with entry.current():
            return entry.version(*call.args)

    return run


def _copy(call: Call, moved: int) -> dict[str, Run]:
    device = next(value.device for value in call.args if isinstance(value, Tensor))
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source)}


def tune(kernel: str, width: int, target: str, device: str, timer: Timer) -> list[dict[str, Any]]:
    """The kernel's candidates for elements of `width` bytes: the checked-in one comes first."""
    call = call_for(OP_OF[kernel], width, device)
    entries = []
    for configuration in candidates(kernel, width, target):
        current = partial(using, kernel, configuration)
        with current():
            reason = _failure(partial(spilling, kernel, width, target))
        version = call.op.launcher("triton")
        entries.append(Entry(label(configuration), version, current, reason))
    about = {"part": "tune", "kernel": kernel, "width": width, "target": target}
    return [about | row for row in race(call, entries, timer)]


def versus(op: str, width: int, device: str, timer: Timer) -> list[dict[str, Any]]:
    """Triton against CUDA C++, each forced, on one call."""
    call = call_for(op, width, device)
    missing = "" if CUDA_LIBRARY.exists() else "not built here (FORCE_CUDA=1)"
    if not missing and device == "cuda":
        missing = cuda_refusal(torch.cuda.current_device())
    entries = [Entry("Triton", OPS[op].launcher("triton")),
               Entry("CUDA C++", OPS[op].launcher("cuda"), refused=missing)]  # fmt: skip
    return [{"part": "versus", "width": width} | row for row in race(call, entries, timer)]


def winner(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row to check in: the fastest, or the first, which is checked in, where it gains little
    or nothing was timed.
    """
    chosen = rows[0]
    best = next((row for row in rows if row["fastest"]), chosen)
    if chosen["seconds"] is not None and best["seconds"] > (1 - WORTH) * chosen["seconds"]:
        return chosen
    return best
