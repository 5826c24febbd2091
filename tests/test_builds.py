"""What setup.py builds from each entry point, with an nvcc that only writes down its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "saliency_fast/libsaliency_fast_cuda.so"
NVCC = """#!/bin/sh
echo "$@" >> "$0.calls"
[ "$1" = --list-gpu-arch ] && { echo compute_75 compute_80 compute_90 compute_120; exit; }
for last; do :; done
echo a library > "$last"
"""
DEFAULT = "75,code=sm_75 80,code=sm_80 90,code=sm_90 120,code=sm_120 120,code=compute_120"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources, with a package of one file; `nvcc` is beside them."""
    copy = tmp_path / "checkout"
    files = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    for name in (*files, "csrc", "kernels"):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (copy / "saliency_fast").mkdir()
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "saliency_fast" / "version.py", copy / "saliency_fast" / name)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return copy


def run(checkout: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` as a front end runs it, where `build` is the back end."""
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = dict(os.environ)
    for name in ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "FORCE_CUDA"):
        own.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta as build\n{code}"],
        cwd=checkout,
        env={**own, "PATH": path, "SALIENCY_FAST_BUILD_EXT": "0", **environment},
        capture_output=True,
        text=True,
    )


def built(checkout: Path, code: str, **environment: str) -> str:
    """The same; the last word that it prints."""
    done = run(checkout, code, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


def architectures(checkout: Path) -> str:
    """What nvcc was last called for."""
    words = (checkout.parent / "bin" / "nvcc.calls").read_text().splitlines()[-1].split()
    prefix = "-gencode=arch=compute_"
    return " ".join(word.removeprefix(prefix) for word in words if word.startswith(prefix))


def holds_library(wheel: Path) -> bool:
    return LIBRARY in zipfile.ZipFile(wheel).namelist()


def test_wheels_that_hold_the_cuda_library_are_of_one_platform(checkout: Path):
    wheel = built(checkout, "print(build.build_wheel('.'))", FORCE_CUDA="1")
    assert not wheel.endswith("-none-any.whl")
    assert holds_library(checkout / wheel)
    assert architectures(checkout) == DEFAULT
    # Neither what the build left behind nor a library beside the sources gets into another wheel.
    (checkout / LIBRARY).write_text("a library")
    wheel = built(checkout, "print(build.build_wheel('.'))")
    assert wheel.endswith("-py3-none-any.whl")
    assert not holds_library(checkout / wheel)


def test_editable_installs_hold_it_in_the_checkout(checkout: Path):
    built(checkout, "print(build.build_editable('.'))", FORCE_CUDA="1")
    assert (checkout / LIBRARY).exists()


def test_setup_py_builds_it_in_place(checkout: Path):
    code = "import runpy, sys; sys.argv[1:] = ['build_ext', '-i']; runpy.run_path('setup.py')"
    assert run(checkout, code, FORCE_CUDA="1").returncode == 0
    assert (checkout / LIBRARY).exists()


def test_source_distributions_hold_its_sources(checkout: Path):
    archive = built(checkout, "print(build.build_sdist('.'))")
    with tarfile.open(checkout / archive) as opened:
        opened.extractall(checkout.parent, filter="data")
    unpacked = checkout.parent / archive.removesuffix(".tar.gz")
    wheel = built(unpacked, "print(build.build_wheel('.'))", FORCE_CUDA="1")
    assert holds_library(unpacked / wheel)
    call = (checkout.parent / "bin" / "nvcc.calls").read_text().splitlines()[-1]
    assert all(f"{path.name} " in call for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0+PTX", "80,code=sm_80 90,code=sm_90 90,code=compute_90"),
        ("9.0a 12.0", "90a,code=sm_90a 120,code=sm_120"),
        (" ;", DEFAULT),
    ],
)
def test_the_list_of_architectures_is_obeyed(checkout: Path, listed: str, expected: str):
    built(checkout, "print(build.build_wheel('.'))", FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=listed)
    assert architectures(checkout) == expected


def test_what_cannot_be_built_is_said(checkout: Path):
    code = "build.build_wheel('.')"
    done = run(checkout, code, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode != 0
    assert "takes numbers such as 8.0 or 9.0+PTX: got 'Hopper'" in done.stderr
    (checkout.parent / "bin" / "nvcc").unlink()
    done = run(checkout, code, FORCE_CUDA="1", PATH="/usr/bin:/bin")
    assert "nvcc is not on PATH" in done.stderr
