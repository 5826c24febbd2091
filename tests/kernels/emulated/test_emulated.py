"""The CUDA C++ kernels, compiled by g++ for an emulator (scheduler.cpp), against the references.

By default every sample of every op runs once with blocks, threads and warps in random order, with
a part of the further cases (further_cases.py). All of them, the builds with sanitizers and all
planted faults (faults.py) are slow: `make kernels-checked` runs them.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saliency_fast.ops import OPS
from tests.kernels.emulated import build
from tests.kernels.emulated.faults import FAULTS, OPS_OF, VALUES

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "it is")
CUDA_OPS = [name for name, op in OPS.items() if op.cuda]
BY_DEFAULT = [VALUES[2], VALUES[7], VALUES[8]]
"""A planted fault of each source."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def checked(libraries: list[Path], sanitizer: str, *options: str) -> list[dict]:
    """What checks.py finds wrong with each library, in one process for all."""
    command = [sys.executable, "-m", "tests.kernels.emulated.checks", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **build.preloaded(sanitizer)}
    done = subprocess.run(
        [*command, *map(str, libraries)],
        env=environment,
        cwd=build.CSRC.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(libraries)
    return [{**one, "said": done.stderr} for one in found]


def assert_right(found: dict) -> None:
    assert found["ended"] == 0, found["said"]
    assert not found["failures"], "\n\n".join(found["failures"])


def missed(found: list[dict], faults: list[build.Fault]) -> list[build.Fault]:
    """The planted faults that were not found."""
    pairs = zip(faults, found, strict=True)
    return [fault for fault, one in pairs if not one["failures"] and one["ended"] == 0]


@pytest.fixture(scope="module")
def by_default(directory: Path) -> list[dict]:
    libraries = [build.build(directory, fault=fault) for fault in (None, *BY_DEFAULT)]
    return checked(libraries, "plain", "--seed=1", "--further-every=61")


@pytest.mark.parametrize("name", CUDA_OPS)
def test_every_sample_and_some_further_cases_of(name: str, by_default: list[dict]):
    assert_right(by_default[0])
    assert by_default[0]["checked"][name] > len(list(OPS[name].samples()))


def test_some_planted_faults_are_found(by_default: list[dict]):
    assert not missed(by_default[1:], BY_DEFAULT)


def test_launches_of_no_elements_and_of_too_many(directory: Path):
    """Neither touches memory; a grid has at most 2**31 - 1 blocks."""
    library = ctypes.CDLL(str(build.build(directory)))
    pointer, most = ctypes.c_void_p(), ctypes.c_int64(2**44)
    flags = library.saliency_fast_pack_mask_u8
    assert flags(pointer, pointer, ctypes.c_int64(0), pointer) == 0
    assert flags(pointer, pointer, most, pointer) == 9
    noise = library.saliency_fast_noise_points_f32
    zero, columns = ctypes.c_int64(0), [pointer] * 6
    assert noise(*columns, zero, most, 0, zero, pointer) == 0
    assert noise(*columns, ctypes.c_int64(2), most, 0, zero, pointer) == 9
    percentile = library.saliency_fast_magnitude_percentile_f32
    assert percentile(*[pointer] * 3, zero, most, zero, pointer) == 0
    assert percentile(*[pointer] * 3, most, most, zero, pointer) == 9


def test_a_fault_that_the_source_has_outgrown_is_refused():
    with pytest.raises(ValueError, match="change the fault with it"):
        build.translated(build.SOURCES[0], build.Fault(build.SOURCES[0].name, "no such text", ""))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_every_case(seed: int, directory: Path):
    assert_right(*checked([build.build(directory)], "plain", f"--seed={seed}", "--further-every=1"))


@pytest.mark.slow
def test_every_case_under_address_and_undefined_behavior_sanitizer(directory: Path):
    library = build.build(directory, "address")
    assert_right(*checked([library], "address", "--seed=1", "--further-every=1"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_every_sample_under_thread_sanitizer(seed: int, directory: Path):
    assert_right(*checked([build.build(directory, "races")], "races", f"--seed={seed}"))


@pytest.mark.slow
@pytest.mark.parametrize("source", OPS_OF)
@pytest.mark.parametrize("sanitizer", FAULTS)
def test_every_planted_fault_is_found(sanitizer: str, source: str, directory: Path):
    """By cases that the kernels as they are pass; some races only show in some orders."""
    faults = [fault for fault in FAULTS[sanitizer] if fault.source == source]
    cases = ("--samples-every=6", "--racing") if sanitizer == "races" else ("--further-every=41",)
    for seed in range(1, 9):
        libraries = [build.build(directory, sanitizer, fault) for fault in (None, *faults)]
        options = (f"--seed={seed}", f"--ops={OPS_OF[source]}", *cases)
        right, *wrong = checked(libraries, sanitizer, *options)
        assert_right(right)
        faults = missed(wrong, faults)
        if not faults or sanitizer != "races":
            break
    assert not faults, f"{len(faults)} faults are not found"
