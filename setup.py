"""Builds the C++ and CUDA ops where a compiler is at hand; the pure-Python install always works.

Reads flags, never hardware: SALIENCY_FAST_BUILD_EXT=0 builds nothing, =1 fails where it cannot
build; FORCE_CUDA=1 also builds csrc/cuda with nvcc, with or without the C++ ops, for the compute
capabilities of TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
WANTED = os.environ.get("SALIENCY_FAST_BUILD_EXT", "auto")
WANTS_CUDA = os.environ.get("FORCE_CUDA") == "1"
CUDA_LIBRARY = "saliency_fast/libsaliency_fast_cuda.so"
CUDA_ARCHES = ("7.5", "8.0", "9.0", "10.0", "12.0")
"""Compute capabilities of the library by default, of those that nvcc knows: code for one runs on
GPUs of the same major number. Of the last there is PTX, too, which drivers compile for later ones.
"""


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


def cuda_flags() -> list[str]:
    """Options of nvcc for TORCH_CUDA_ARCH_LIST, as PyTorch reads it, or CUDA_ARCHES."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if not wanted:
        listed = subprocess.check_output(["nvcc", "--list-gpu-arch"], text=True).split()
        known = [one for one in CUDA_ARCHES if f"compute_{one.replace('.', '')}" in listed]
        wanted = ";".join(known) + "+PTX"
    flags = []
    for arch in filter(None, wanted.split(";")):
        number, _, ptx = arch.replace(".", "").partition("+")
        if not number[:1].isdigit() or ptx not in ("", "PTX"):
            sys.exit(f"TORCH_CUDA_ARCH_LIST takes numbers such as 8.0 or 9.0+PTX: got {arch!r}")
        codes = (f"sm_{number}", f"compute_{number}") if ptx else (f"sm_{number}",)
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def build_cuda(target: Path) -> None:
    """Compiles csrc/cuda into one plain shared library of extern "C" launchers."""
    if shutil.which("nvcc") is None:
        sys.exit("FORCE_CUDA=1, but nvcc is not on PATH; install the CUDA toolkit")
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.check_call(["nvcc", *options, *cuda_flags(), *sources, "-o", str(target)])


def build_command(base: type) -> type:
    class Build(base):
        def run(self) -> None:
            super().run()
            if WANTS_CUDA:
                root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
                build_cuda(root / CUDA_LIBRARY)

    return Build


class WithCuda(Distribution):
    """A distribution whose library of CUDA ops is built like an extension: `build_ext` runs for it,
    and a wheel that holds it has the platform's tag.
    """

    def has_ext_modules(self) -> bool:
        return WANTS_CUDA or bool(self.ext_modules)


def openmp(*names: str) -> list[str]:
    """The flags `names` where PyTorch's own threads are OpenMP's; else loops run on one thread."""
    import torch

    return list(names) if torch.backends.openmp.is_available() and sys.platform == "linux" else []


# What an earlier build left would go into a wheel that is built without it.
for left in ROOT.glob(f"build/lib*/{CUDA_LIBRARY}"):
    left.unlink()

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
    distclass=WithCuda,
    cmdclass={"build_ext": build_command(command)},
)
