"""What a GPU does at best: a copy, products, and convolutions by layout, precision and choice.

Units of `benchmarks.gpu`. They say what later rows can be held against, and settle what the library
decides without timing: channels last before the model's own layout, cuDNN's choice by time, and the
transpose of a depthwise convolution as a convolution and not as a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import switches
from benchmarks.stages import Report, Row, Unit
from benchmarks.timing import Timer, timer_of


@dataclass(frozen=True)
class Layer:
    """A convolution of a residual network, or a depthwise one (groups)."""

    channels: int
    out: int
    kernel: int
    stride: int
    side: int
    groups: int = 1

    @property
    def label(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}/{self.stride}"
        return f"{self.channels} to {self.out}, {kernel}, {self.side}x{self.side}{groups}"


LAYERS = (
    Layer(3, 64, 7, 2, 224),
    Layer(64, 64, 1, 1, 56),
    Layer(64, 64, 3, 1, 56),
    Layer(64, 256, 1, 1, 56),
    Layer(128, 128, 3, 2, 56),
    Layer(128, 128, 3, 1, 28),
    Layer(512, 128, 1, 1, 28),
    Layer(256, 256, 3, 1, 14),
    Layer(1024, 2048, 1, 2, 14),
    Layer(512, 512, 3, 1, 7),
    Layer(96, 96, 7, 1, 56, groups=96),
)
QUICK_LAYERS = (Layer(4, 8, 3, 2, 8), Layer(8, 8, 3, 1, 8, groups=8))
ROWS, PRODUCT, COPIED = 64, 8192, 2**30
"""Rows of a launch, the side of products, and bytes of a copy."""
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}
"""The type of operands, and whether products of float32 may be TF32's."""
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ON_CPU = ("bfloat16", "float32")


def units(options: dict[str, Any]) -> Iterator[Unit]:
    device, quick = options["device"], options["quick"]
    timer = partial(timer_of, device, 1 if quick else 5, 1 if quick else 8)
    names = PRECISIONS if device == "cuda" else ON_CPU
    yield Unit("copy", partial(copied, device, 2**20 if quick else COPIED, timer))
    for name in names:
        run = partial(product, name, device, 64 if quick else PRODUCT, timer)
        yield Unit(f"product {name}", run)
    layers = QUICK_LAYERS if quick else LAYERS
    rows = 2 if quick else ROWS
    for layer in layers:
        run = partial(convolutions, layer, rows, device, tuple(names), timer)
        yield Unit(f"convolution {layer.label}", run, patience=40.0)


def copied(device: str, size: int, timer: Callable[[], Timer], _: Report) -> Iterator[Row]:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timer()({"copy": lambda: target.copy_(source)})["copy"]
    yield {"part": "copy", "seconds": seconds, "gigabytes_per_second": 2 * size / seconds / 1e9}


def product(
    name: str, device: str, side: int, timer: Callable[[], Timer], _: Report
) -> Iterator[Row]:
    dtype, tf32 = PRECISIONS[name]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    with switches(tf32=tf32):
        seconds = timer()({"product": lambda: torch.mm(a, b, out=out)})["product"]
    operations = 2 * side**3
    yield {"part": "product", "precision": name, "seconds": seconds,
           "teraflops": operations / seconds / 1e12}  # fmt: skip


@contextmanager
def _choice(name: str, *, by_time: bool) -> Iterator[None]:
    with switches(tf32=PRECISIONS[name][1], benchmark=by_time):
        yield


def convolutions(
    layer: Layer,
    rows: int,
    device: str,
    names: tuple[str, ...],
    timer: Callable[[], Timer],
    report: Report,
) -> Iterator[Row]:
    """Forward, and back to the input as the library does it; of depthwise ones also as autograd's
    gradient.
    """
    measure = timer()
    for name in names:
        for layout, form in LAYOUTS.items():
            passes = _passes(layer, rows, device, PRECISIONS[name][0], form)
            for by_time in (False, True) if device == "cuda" else (False,):
                with _choice(name, by_time=by_time):
                    times = measure(passes)
                for direction, seconds in times.items():
                    side = -(-layer.side // layer.stride)
                    weights = layer.channels // layer.groups * layer.kernel**2
                    operations = 2 * rows * layer.out * side**2 * weights
                    yield {"part": "convolution", "layer": layer.label, "pass": direction,
                           "layout": layout, "precision": name, "benchmark": by_time,
                           "seconds": seconds,
                           "teraflops": operations / seconds / 1e12}  # fmt: skip


def _passes(
    layer: Layer, rows: int, device: str, dtype: torch.dtype, form: torch.memory_format
) -> dict[str, Callable[[], object]]:
    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device, dtype=dtype)
        return drawn.contiguous(memory_format=form)

    x = random(rows, layer.channels, layer.side, layer.side)
    weight = random(layer.out, layer.channels // layer.groups, layer.kernel, layer.kernel)
    step, edge, hole = [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]
    convolution = torch.ops.aten.convolution.default
    forward = partial(convolution, x, weight, None, step, edge, hole, False, [0, 0], layer.groups)
    grad = torch.randn_like(forward())
    missed = (layer.side + 2 * edge[0] - layer.kernel) % layer.stride
    back = (step, edge, hole, True, [missed] * 2, layer.groups)
    found: dict[str, Callable[[], object]] = {
        "forward": forward,
        "transpose": partial(convolution, grad, weight, None, *back),
    }
    if layer.groups > 1:
        options = (step, edge, hole, False, [0, 0], layer.groups, [True, False, False])
        backward = torch.ops.aten.convolution_backward.default
        found["gradient"] = partial(backward, grad, x, weight, None, *options)
    return found
