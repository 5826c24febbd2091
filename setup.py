"""Builds the C++ and CUDA ops where a compiler is at hand; the pure-Python install always works.

Reads flags, never hardware: SALIENCY_FAST_BUILD_EXT=0 builds nothing, =1 fails where it cannot
build; FORCE_CUDA=1 also builds csrc/cuda with nvcc for TORCH_CUDA_ARCH_LIST.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WANTED = os.environ.get("SALIENCY_FAST_BUILD_EXT", "auto")
CUDA_LIBRARY = "saliency_fast/libsaliency_fast_cuda.so"


def cpp_extension():
    """The module torch.utils.cpp_extension, or None with the reason printed."""
    if WANTED == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    try:
        from torch.utils import cpp_extension as module
    except ImportError as error:
        reason = f"torch cannot be imported while building ({error}); use --no-build-isolation"
    else:
        if compiler:
            return module
        reason = "no C++ compiler was found"
    if WANTED == "1":
        sys.exit(f"SALIENCY_FAST_BUILD_EXT=1, but {reason}")
    print(f"saliency_fast: the C++ ops are not built: {reason}", file=sys.stderr)
    return None


def build_cuda(target: Path) -> None:
    """Compiles csrc/cuda into one plain shared library of extern "C" launchers."""
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(" ", ";").split(";"):
        number = arch.replace(".", "").removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.check_call(["nvcc", *options, *flags, *sources, "-o", str(target)])


def build_command(base: type) -> type:
    class Build(base):
        def run(self) -> None:
            super().run()
            if os.environ.get("FORCE_CUDA") == "1":
                root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
                build_cuda(root / CUDA_LIBRARY)

    return Build


def openmp(*names: str) -> list[str]:
    """The flags `names` where PyTorch's own threads are OpenMP's; else loops run on one thread."""
    import torch

    return list(names) if torch.backends.openmp.is_available() and sys.platform == "linux" else []


extensions, command = [], build_ext
torch_build = cpp_extension()
if torch_build is not None:
    extensions = [
        torch_build.CppExtension(
            "saliency_fast._C",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            # No contraction into fused multiply-adds: every instruction set gives the same bits.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++20",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                *openmp("-fopenmp"),
            ],
            extra_link_args=openmp("-fopenmp"),
        )
    ]
    command = torch_build.BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)

setup(
    packages=[
        *find_packages(include=["saliency_fast", "saliency_fast.*"]),
        "saliency_fast.kernels",
    ],
    package_dir={"saliency_fast": "saliency_fast", "saliency_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": build_command(command)},
)
