"""The CUDA C++ sources: they compile for each target without spills, and Python finds them."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.compiled import ARCHES, SOURCES, code_for, nvcc
from saliency_fast.errors import BackendError, InputTypeError
from saliency_fast.ops import OPS, cuda, dispatch

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton, whose cuobjdump reads counters, is not installed"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize(
    "arch", [*ARCHES, *(pytest.param(one, marks=pytest.mark.slow) for one in ("75", "100", "120"))]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_register_spills(source: Path, arch: str, tmp_path: Path):
    said = nvcc(code_for(arch), "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin", source)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert used, said
    assert all(numbers == ("0", "0", "0") for numbers in used), said


@cache
def rows() -> list[dict]:
    return kernels.cuda_rows()


@needs_nvcc
@needs_triton
def test_aligned_data_moves_in_16_byte_accesses():
    moving = ("noise_points<float, true>", "noise_points<double, true>", "rectify", "gradient")
    found = {
        (row["variant"], row["target"]): (row["load"], row["store"])
        for row in rows()
        if row["variant"].startswith(moving)
    }
    assert len(found) == 2 * 34
    assert set(found.values()) == {(16, 16)}, found


@needs_nvcc
@needs_triton
def test_the_results_are_what_is_compiled():
    """After a change of a source: `python -m benchmarks.kernels`."""
    written = json.loads((kernels.RESULTS / "kernels.json").read_text())
    if written["setting"]["nvcc"] not in nvcc("--version"):
        pytest.skip("the results were written by another nvcc")
    assert [row for row in written["rows"] if row["language"] == "CUDA C++"] == rows()


@pytest.fixture
def no_library():
    """Whatever is loaded is loaded again."""
    caches = (cuda.library, dispatch.cuda_library)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@needs_nvcc
def test_the_library_links_and_declares_every_launcher(no_library, monkeypatch, tmp_path: Path):
    target = tmp_path / "library.so"
    nvcc("-shared", "-Xcompiler", "-fPIC", code_for("90a"), *SOURCES, "-o", target)
    monkeypatch.setattr(dispatch, "CUDA_LIBRARY", target)
    state = cuda.library().saliency_fast_percentile_state()
    assert state % 16 == 8, "three counters and a power of two of them"
    if not torch.cuda.is_available():
        # Without a driver the CUDA runtime answers as with an old one.
        assert dispatch.cuda_library().saliency_fast_device_status() == 35


def test_a_missing_or_broken_library_raises(no_library, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(dispatch, "CUDA_LIBRARY", tmp_path / "missing.so")
    with pytest.raises(BackendError, match="FORCE_CUDA=1"):
        cuda.library()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "CUDA_LIBRARY", broken)
    with pytest.raises(BackendError, match="built but does not load"):
        cuda.library()


def test_half_types_are_refused():
    sample = next(OPS["noise_points"].samples())
    with pytest.raises(InputTypeError, match=r"got torch\.float16"):
        cuda.noise_points(sample.args[0].half(), *sample.args[1:])
