"""Runs in a child process: the peak memory of calls, as the system counts it, and as planned.

`python -m tests.measured CASE...` prints one JSON object per case.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf


class Attention(nn.Module):
    """Tokens [B, T, 64] through attention whose weights [B, 4, T, T] exist."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(64, 192), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / 4.0).softmax(-1) @ v
        return self.head((x + mixed.transpose(1, 2).flatten(2)).mean(1))


class Volume(nn.Module):
    """A volume [B, 1, D, H, W] to one number, through a few cheap strided convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 4, stride=4), nn.Conv3d(4, 1, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x))).relu().mean((1, 2, 3, 4))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 32 * 32, 5),
    )


def encoder() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 256, 5))


def table() -> nn.Module:
    return nn.Sequential(nn.Linear(2**18, 4), nn.Tanh(), nn.Linear(4, 5))


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    method: Any
    options: dict[str, Any] = field(default_factory=dict)
    target: Any = 1
    baseline: Any = None


def line(steps: int) -> sf.IntegratedGradients:
    return sf.IntegratedGradients(steps=steps)


def launch(points: int) -> dict[str, Any]:
    return {"points_per_launch": points}


VOLUME = (1, 1, 64, 64, 64)
CASES = {
    "conv2d": Case(images, (4, 3, 128, 128), line(16), launch(32)),
    "conv2d, several maps": Case(
        images, (2, 3, 128, 128), line(16), launch(16), [[0, 1, 2], [3, 4, 0]]
    ),
    "conv2d, noise": Case(images, (4, 3, 128, 128), sf.SmoothGrad(samples=16), launch(32)),
    "attention": Case(Attention, (2, 256, 64), line(32), launch(32)),
    "encoder": Case(encoder, (2, 256, 64), line(32), launch(32)),
    "conv3d": Case(Volume, (1, 1, 128, 128, 128), line(8), launch(8), None),
    "result": Case(table, (32, 2**18), line(2), launch(8)),
    "result, variance": Case(table, (32, 2**18), sf.VarGrad(samples=4), launch(8)),
    "result, refined": Case(
        table, (32, 2**18), sf.IntegratedGradients(steps=2, tolerance=0.1, max_steps=9), launch(8)
    ),
    "result, ten baselines": Case(table, (8, 2**18), line(2), launch(8), 1, ["uniform"] * 10),
    "result, baseline set": Case(
        table, (16, 2**18), sf.ExpectedGradients(samples=2), launch(8), 1, ["blank", "noise"]
    ),
    "64 MB": Case(
        Volume, (1, 1, 256, 256, 256), line(4), {"memory_budget": "1GiB", "lean": False}, None
    ),
    **{
        # As it is: behind the prefix a thousand points would fit into a few launches.
        f"{steps} steps": Case(
            Volume, VOLUME, line(steps), {"memory_budget": "20MiB", "lean": False}, None
        )
        for steps in (8, 64, 1000)
    },
}


def status(name: str) -> int:
    """A size in bytes from what the system tells of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(case: Case) -> dict[str, Any]:
    """Bytes over what was in use before the call: measured and planned."""
    torch.manual_seed(0)
    model, x = case.model().eval(), torch.randn(case.shape)
    baseline = case.baseline
    if baseline == ["blank", "noise"]:
        baseline = torch.stack([torch.zeros_like(x[0]), torch.randn_like(x[0])])
    engine = sf.Engine(model, case.method, hashes=False, **case.options)
    # Also the warm-up: code, thread pools and the convolutions' own buffers are in place then.
    plan = engine.plan(x, case.target, baseline)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    idle = status("VmRSS")
    found = engine(x, case.target, baseline)
    return {
        "measured": status("VmHWM") - idle,
        "planned": plan.peak_bytes,
        "reported": found.provenance.peak_bytes if found.provenance.peak_measured else None,
        "launches": plan.launches,
        "budget": plan.budget,
        "delta": None if found.delta is None else found.delta.abs().max().item(),
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps({"case": name, **measure(CASES[name])}), flush=True)
