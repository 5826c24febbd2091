"""Runs in a child process: the peak memory of a first call, what stays after it, and the plan.

`python -m tests.first_calls CASE` prints one JSON object.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.config import EngineConfig
from tests.configured import RECORDED
from tests.measured import encoder, images, status


def convolutions() -> nn.Module:
    """Wide enough for memory-efficient calls to show."""
    layers: list[nn.Module] = []
    for inner, outer in ((3, 32), (32, 32), (32, 32), (32, 32)):
        norm = nn.BatchNorm2d(outer)
        layers += [nn.Conv2d(inner, outer, 3, padding=1), norm, nn.ReLU(inplace=True)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(14), nn.Flatten(), nn.Linear(32 * 14 * 14, 5)
    )


def volumes() -> nn.Module:
    inner = (nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*inner, nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(128, 5))


def wide() -> nn.Module:
    """64 MiB of weights."""
    return nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.ReLU(),
                         nn.Linear(2048, 5))  # fmt: skip


IMAGE, VOLUME = (1, 3, 224, 224), (1, 1, 48, 48, 48)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any, dict[str, Any]]] = {
    "gradient": (convolutions, IMAGE, "gradient", {}),
    "few points": (convolutions, IMAGE, sf.IntegratedGradients(steps=4), {}),
    "small images": (images, (1, 3, 128, 128), sf.IntegratedGradients(steps=12), {}),
    "text": (encoder, (1, 256, 64), sf.IntegratedGradients(steps=12), {}),
    "volume": (volumes, VOLUME, sf.IntegratedGradients(steps=4), {}),
    "recorded": (
        convolutions,
        IMAGE,
        sf.IntegratedGradients(steps=24),
        {"config": EngineConfig(**RECORDED)},
    ),
    "layer": (convolutions, (1, 3, 112, 112), sf.IntegratedGradients(steps=4), {"at": "3"}),
    "wide": (wide, (4, 2048), sf.IntegratedGradients(steps=64), {}),
    "service": (convolutions, IMAGE, sf.IntegratedGradients(steps=4), {}),
}


def trimmed() -> int:
    """Resident bytes without what is only free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def call(engine: sf.Engine, x: Tensor, name: str) -> None:
    engine.submit(x, 1).result() if name == "service" else engine(x, 1)


def measure(name: str) -> dict[str, Any]:
    """Bytes over the idle process: planned, the call's peak, after it, and once it was closed."""
    torch.manual_seed(0)
    build, shape, method, options = CASES[name]
    model, x = build().eval(), torch.randn(shape)
    loaded = trimmed()
    engine = sf.Engine(model, method, **options)
    plan = engine.plan(x, 1)
    Path("/proc/self/clear_refs").write_text("5")
    call(engine, x, name)
    found = {"planned": plan.peak_bytes, "peak": status("VmHWM") - loaded}
    call(engine, x, name)
    # How much freed memory malloc keeps differs from run to run, by up to twice 32 MiB.
    found |= {"after": trimmed() - loaded, "resident": dict(engine.plan(x, 1).resident)}
    engine.close()
    closed = status("VmRSS")
    # It prepares again.
    engine(x, 1)
    engine.close()
    found |= {"closed": closed - loaded, "again": status("VmRSS") - closed}
    weights = sum(one.nbytes for one in model.parameters())
    del model, engine
    found |= {"weights": weights, "collected": trimmed() - loaded}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
