"""The ops written in CUDA C++ (csrc/cuda): plain launchers, loaded from one shared library."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from saliency_fast.errors import BackendError, InputTypeError
from saliency_fast.ops.dispatch import CUDA_LIBRARY, VARIABLE, not_built
from saliency_fast.ops.overlay import rank

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
_ARGUMENTS = {
    "noise_points": [_POINTER] * 6 + [_INT64, _INT64, _INT, _INT64, _POINTER],
    "magnitude_percentile": [_POINTER] * 3 + [_INT64, _INT64, _INT64, _POINTER],
}


@cache
def library() -> ctypes.CDLL:
    """The shared library with its launchers declared; what is missing or broken raises."""
    if not CUDA_LIBRARY.exists():
        raise not_built("the CUDA ops", "cuda")
    try:
        found = ctypes.CDLL(str(CUDA_LIBRARY))
        for name, arguments in _ARGUMENTS.items():
            for suffix in _SUFFIXES.values():
                launcher = getattr(found, f"saliency_fast_{name}_{suffix}")
                launcher.argtypes, launcher.restype = arguments, _INT
        found.saliency_fast_percentile_state.argtypes = []
        found.saliency_fast_percentile_state.restype = _INT64
    except (OSError, AttributeError) as error:
        raise BackendError(
            f"{CUDA_LIBRARY.name} is built but does not load: {error}; build it again "
            "(FORCE_CUDA=1 pip install --no-build-isolation -e .) or set "
            f"{VARIABLE}=triton"
        ) from error
    return found


def _launch(name: str, tensor: Tensor, *arguments: object) -> None:
    """Calls `name` for the tensor's dtype, on its device and that device's current stream."""
    suffix = _SUFFIXES.get(tensor.dtype)
    if suffix is None:
        raise InputTypeError(
            f"{name} takes float32 or float64 on a GPU: got {tensor.dtype}; pass x.float()"
        )
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream().cuda_stream
        values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        code = getattr(library(), f"saliency_fast_{name}_{suffix}")(*values, stream)
    if code != 0:
        raise BackendError(f"{name} failed on {tensor.device} with CUDA error {code}")


def noise_points(
    x: Tensor,
    sigma: Tensor,
    seed: Tensor,
    item: Tensor,
    sample: Tensor,
    antithetic: bool,
    first_element: int,
) -> Tensor:
    """The op `noise_points`: [R, *]."""
    x, columns = x.contiguous(), [t.contiguous() for t in (sigma, seed, item, sample)]
    out = torch.empty((len(item), *x.shape[1:]), dtype=x.dtype, device=x.device)
    numel = x[0].numel()
    _launch("noise_points", x, x, *columns, out, len(out), numel, antithetic, first_element)
    return out


def magnitude_percentile(values: Tensor, percentile: float) -> Tensor:
    """The op `magnitude_percentile`: [B]."""
    values = values.contiguous()
    rows, numel = len(values), values[0].numel()
    out = torch.empty(rows, dtype=values.dtype, device=values.device)
    state = torch.zeros(
        rows * library().saliency_fast_percentile_state(), dtype=torch.uint8, device=values.device
    )
    place = rank(numel, percentile)
    _launch("magnitude_percentile", values, values, state, out, rows, numel, place)
    return out
