"""Which version of an op runs where: built or not, and forced by SALIENCY_FAST_BACKEND."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import torch

from saliency_fast.errors import BackendError, warn

VARIABLE = "SALIENCY_FAST_BACKEND"
NAMES = ("reference", "native", "triton", "cuda")
_PACKAGE = Path(__file__).resolve().parent.parent
CUDA_LIBRARY = _PACKAGE / "libsaliency_fast_cuda.so"
_NO_CODE = "the library holds no code for it; build it for this GPU (TORCH_CUDA_ARCH_LIST)"
_OLD_DRIVER = "the library was built with a CUDA release that is newer than the driver"
_REFUSALS = {35: _OLD_DRIVER, 222: _OLD_DRIVER, 98: _NO_CODE, 209: _NO_CODE}
"""CUDA errors with which the CUDA ops cannot run on a GPU, though nothing else is wrong with it."""


def forced() -> str | None:
    """The backend that the environment forces, if any."""
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in NAMES:
        raise BackendError(f"{VARIABLE} must be one of {', '.join(NAMES)}: got {name!r}")
    return name


@cache
def native_library() -> Path | None:
    """The compiled CPU ops beside the package, or None where they were not built."""
    found = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    return found[0] if found else None


def load_native() -> None:
    """Loads the CPU ops where they are built and wanted; what is built but broken raises."""
    choice = forced()
    if choice not in (None, "native"):
        return
    path = native_library()
    if path is None:
        if choice == "native":
            raise not_built("the CPU ops", "native")
        return
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BackendError(
            f"{path.name} is built but does not load with torch {torch.__version__}: {error}; "
            f"build it again (pip install --no-build-isolation -e .) or set {VARIABLE}=reference"
        ) from error


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def cuda_library() -> ctypes.CDLL:
    """The library of csrc/cuda; what is missing or broken raises."""
    if not CUDA_LIBRARY.exists():
        raise not_built("the CUDA ops", "cuda")
    try:
        found = ctypes.CDLL(str(CUDA_LIBRARY))
        found.saliency_fast_device_status.argtypes = []
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"{CUDA_LIBRARY.name} is built but does not load: {error}; build it again "
            "(FORCE_CUDA=1 pip install --no-build-isolation -e .) or set "
            f"{VARIABLE}=triton"
        ) from error
    return found


@cache
def cuda_refusal(device: int) -> str:
    """Why the CUDA ops cannot run on GPU number `device`; empty where they can."""
    with torch.cuda.device(device):
        code = cuda_library().saliency_fast_device_status()
    if code != 0 and code not in _REFUSALS:
        raise BackendError(f"cuda:{device} failed with CUDA error {code}")
    return _REFUSALS.get(code, "")


@cache
def on_device(device: int, *, has_cuda: bool) -> str:
    """The backend of an op on GPU number `device`, as `for_gpu`; warns, once, where a CUDA C++
    version is built and cannot run there.
    """
    chosen = for_gpu(has_cuda=has_cuda)
    refusal = cuda_refusal(device) if chosen == "cuda" else ""
    if not refusal:
        return chosen
    text = f"the CUDA ops do not run on cuda:{device}: {refusal}"
    if forced() == "cuda":
        raise BackendError(f"{text}; or unset {VARIABLE}")
    other = for_gpu(has_cuda=False)
    warn(f"{text}. The {other} ops run instead")
    return other


def for_gpu(*, has_cuda: bool) -> str:
    """The backend that an op uses on GPUs; `has_cuda`: it has a CUDA C++ version in csrc/, which
    may not run on all of them (`on_device`).
    """
    choice = forced()
    if choice == "reference":
        return "reference"
    if choice == "cuda" and not CUDA_LIBRARY.exists():
        raise not_built("the CUDA ops", "cuda")
    if choice == "triton" and not _has_triton():
        raise not_built("the Triton ops", "triton")
    if choice != "triton" and has_cuda and CUDA_LIBRARY.exists() and torch.version.cuda:
        return "cuda"
    return "triton" if _has_triton() else "reference"


def _cuda_ops() -> str:
    """Whether the CUDA ops are built, and the GPUs on which they do not run, in words."""
    if not CUDA_LIBRARY.exists():
        return "not built"
    count = torch.cuda.device_count() if torch.version.cuda else 0
    refusals = {device: cuda_refusal(device) for device in range(count)}
    return "; ".join(["built", *(f"not on cuda:{i}: {why}" for i, why in refusals.items() if why)])


def not_built(what: str, backend: str) -> BackendError:
    install = "(pip install --no-build-isolation -e .)"
    cure = {
        "native": f"install with a C++ compiler {install}",
        "cuda": f"install with FORCE_CUDA=1 and nvcc {install}",
        "triton": "pip install triton",
    }[backend]
    return BackendError(f"{what}: the {backend} version is not built here; {cure}")


@cache
def kernels(device: str) -> str:
    """The kernels that run on a device type, in a word."""
    return backends()["cpu" if device == "cpu" else "cuda"].split(" ", 1)[0]


def backends() -> dict[str, str]:
    """Which versions of the fused ops each device runs, in words.

    Returns:
        `cpu` and `cuda` (what runs there, or why the reference does), `triton` and `cuda ops`
        (installed or built, and the GPUs on which these do not run), and `forced` (the value of
        SALIENCY_FAST_BACKEND, or "nothing").

    Raises:
        BackendError: Where SALIENCY_FAST_BACKEND names no backend, or one that is not built.

    Example:
        >>> sorted(backends())
        ['cpu', 'cuda', 'cuda ops', 'forced', 'triton']
    """
    native, choice, cpu = native_library(), forced(), "native C++ ops"
    if native is None:
        cpu = "reference (the C++ ops are not built)"
    elif choice not in (None, "native"):
        cpu = f"reference ({VARIABLE}={choice})"
    gpu = "no GPU seen by PyTorch"
    if torch.cuda.is_available():
        chosen = on_device(torch.cuda.current_device(), has_cuda=True)
        gpu = f"{chosen} and {for_gpu(has_cuda=False)} kernels"
    return {
        "cpu": cpu,
        "cuda": gpu,
        "triton": "installed" if _has_triton() else "not installed",
        "cuda ops": _cuda_ops(),
        "forced": choice or "nothing",
    }
