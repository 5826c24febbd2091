"""The memory of first calls: as planned, listed where it stays, and given back."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.engine.memory import LIBRARIES, bytes_text

MiB = 1024**2
CASES = (
    "gradient", "few points", "small images", "text", "volume", "recorded", "layer", "wide",
    "service",
)  # fmt: skip


@cache
def measured(name: str) -> dict[str, Any]:
    """What a first call takes in a fresh process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the system does not count a process's peak anew: {error}")
    child = subprocess.run(
        [sys.executable, "-m", "tests.first_calls", name],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout)
    return found


@pytest.mark.parametrize("name", [one for one in CASES if one != "service"])
def test_the_plan_tells_the_peak_of_a_first_call(name: str) -> None:
    found = measured(name)
    # Libraries are 16 to 31 MiB of it, whatever the call.
    off = abs(found["peak"] - found["planned"])
    text = f"measured {bytes_text(found['peak'])}, planned {bytes_text(found['planned'])}"
    assert off < max(0.25 * found["planned"], 8 * MiB), text


@pytest.mark.parametrize("name", [one for one in CASES if one != "service"])
def test_what_stays_is_listed_and_little(name: str) -> None:
    """Requests that share launches are measured while others of them run."""
    found = measured(name)
    listed = sum(found["resident"].values())
    assert "libraries" in found["resident"]
    assert found["after"] < listed + 8 * MiB
    # The code that a recording loads is listed among the libraries.
    code = found["resident"]["libraries"] - LIBRARIES
    assert listed <= found["weights"] + 64 * MiB + code


@pytest.mark.parametrize("name", CASES)
def test_a_closed_engine_gives_it_back(name: str) -> None:
    found = measured(name)
    # Recordings load more code, and launches of several sizes leave a library more buffers; which
    # pages of code stay in memory depends on what else the machine does.
    more = 24 if name in ("recorded", "service", "wide") else 12
    assert found["closed"] < LIBRARIES + more * MiB
    assert found["again"] < 4 * MiB
    assert found["collected"] < found["closed"] - found["weights"] + 4 * MiB


def test_a_closed_engine_prepares_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(1, 4)
    with sf.Engine(model, "gradient") as engine:
        expected = engine(x, 1).values
        assert engine._location.caches[()]
    assert not engine._location.caches
    torch.testing.assert_close(engine(x, 1).values, expected)


@pytest.mark.parametrize("steps", [4, 400])
def test_a_model_goes_with_its_last_reference(steps: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    sf.explain(model, torch.rand(1, 3, 8, 8), target=1, method=sf.IntegratedGradients(steps=steps))
    model, gone = None, weakref.ref(model)
    gc.collect()
    assert gone() is None


def test_a_plan_lists_what_stays() -> None:
    plan = sf.Engine(nn.Linear(4, 3)).plan(torch.ones(1, 4), 1)
    assert plan.resident["libraries"] == LIBRARIES
    assert f"libraries {bytes_text(LIBRARIES)}" in str(plan)
    assert plan.peak_bytes == plan.library_bytes + plan.fixed_bytes + max(
        plan.launch_bytes, plan.finish_bytes
    )
