"""The CUDA C++ sources: they compile for each target without spills, and Python finds them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from saliency_fast.errors import BackendError, InputTypeError
from saliency_fast.ops import OPS, cuda

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHES = ("80", "90a")
FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings"]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def code_for(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def nvcc(*arguments: object) -> str:
    """Runs nvcc and returns what it says; a failure shows it."""
    command = ["nvcc", *FLAGS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_register_spills(source: Path, arch: str, tmp_path: Path):
    said = nvcc(code_for(arch), "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin", source)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert used, said
    assert all(numbers == ("0", "0", "0") for numbers in used), said


@needs_nvcc
def test_the_library_links_and_declares_every_launcher(monkeypatch, tmp_path: Path):
    target = tmp_path / "library.so"
    nvcc("-shared", "-Xcompiler", "-fPIC", code_for("90a"), *SOURCES, "-o", target)
    monkeypatch.setattr(cuda, "CUDA_LIBRARY", target)
    cuda.library.cache_clear()
    try:
        state = cuda.library().saliency_fast_percentile_state()
        assert state % 16 == 8, "three counters and a power of two of them"
    finally:
        cuda.library.cache_clear()


def test_a_missing_or_broken_library_raises(monkeypatch, tmp_path: Path):
    cuda.library.cache_clear()
    monkeypatch.setattr(cuda, "CUDA_LIBRARY", tmp_path / "missing.so")
    with pytest.raises(BackendError, match="FORCE_CUDA=1"):
        cuda.library()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "CUDA_LIBRARY", broken)
    with pytest.raises(BackendError, match="built but does not load"):
        cuda.library()


def test_half_types_are_refused():
    sample = next(OPS["noise_points"].samples())
    with pytest.raises(InputTypeError, match=r"got torch\.float16"):
        cuda.noise_points(sample.args[0].half(), *sample.args[1:])
