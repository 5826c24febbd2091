"""Every launch of every sample compiled by Triton's own just-in-time path, for GPUs not here.

By default some samples for one target; all of them for all targets, and with pointers that are not
aligned, are slow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).parents[2]
SPILLING = {
    "sm_75": {"_moments", "_resize"},
    "sm_80": {"_moments"},
    "sm_90": {"_accumulate"},
    "sm_100": {"_accumulate"},
}
"""Kernels that keep bytes outside of registers in rare specialisations (Triton 3.7): `_moments` 8
for one element, `_resize` 8 for float64 volumes, `_accumulate` 24 or 40 for float16 of odd sizes.
"""
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def compiled(target: str, tmp_path: Path, *options: str) -> dict:
    """What specialised_checks.py finds, in a process of its own with a cache of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.specialised_checks", target, *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict = json.loads(done.stdout)
    return found


def test_some_samples_compile(tmp_path: Path):
    found = compiled("sm_90", tmp_path, "--every=40")
    assert not found["errors"], "\n\n".join(found["errors"])
    assert 30 < found["compilations"] <= found["launches"]
    assert not found["spilling"]


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_sample_compiles(target: str, shift: int, tmp_path: Path):
    found = compiled(target, tmp_path, f"--shift={shift}")
    assert not found["errors"], "\n\n".join(found["errors"])
    assert 400 < found["compilations"] <= found["launches"]
    # With pointers that are not aligned, which launchers rarely get, some more may.
    assert shift or {one.split()[0] for one in found["spilling"]} <= SPILLING.get(target, set())


@pytest.mark.slow
def test_a_kernel_that_only_compiles_for_some_sizes_is_found(tmp_path: Path):
    """Where `numel` is 1, Triton makes a constant of it, which has no `to`."""
    fault = ("accumulate", "tl.cast(numel, tl.int64)", "numel.to(tl.int64)")
    errors = compiled("sm_90", tmp_path, "--every=4", "--mutant", *fault)["errors"]
    assert errors
    assert all(one.startswith("accumulate(") for one in errors)
