"""The ops written in CUDA C++ (csrc/cuda): plain launchers, loaded from one shared library."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import BackendError, InputError, InputTypeError
from saliency_fast.ops import dispatch, masks
from saliency_fast.ops.overlay import rank

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_DOUBLE = ctypes.c_double
_FLOATS = {torch.float32: "f32", torch.float64: "f64"}
_ALL_FLOATS = {**_FLOATS, torch.bfloat16: "bf16", torch.float16: "f16"}
_CAPTURE = range(900, 910)
"""CUDA errors of captures, whichever kernel meets them first."""
_LAUNCHERS: dict[str, tuple[dict[torch.dtype, str], list[Any]]] = {
    "noise_points": (_FLOATS, [_POINTER] * 6 + [_INT64, _INT64, _INT, _INT64, _POINTER]),
    "magnitude_percentile": (_FLOATS, [_POINTER] * 3 + [_INT64] * 3 + [_POINTER]),
    "relu_mask": (_ALL_FLOATS, [_POINTER] * 6 + [_INT64] * 3 + [_DOUBLE, _DOUBLE, _POINTER]),
    "relu_mask_backward": (_ALL_FLOATS, [_POINTER] * 5 + [_INT64] * 3 + [_DOUBLE, _INT, _POINTER]),
    "pack_mask": ({torch.bool: "u8", **_ALL_FLOATS}, [_POINTER, _POINTER, _INT64, _POINTER]),
}
"""The suffixes of each launcher's names by dtype, and the types of its arguments."""


@cache
def library() -> ctypes.CDLL:
    """The shared library with its launchers declared."""
    found = dispatch.cuda_library()
    for name, (suffixes, arguments) in _LAUNCHERS.items():
        for suffix in suffixes.values():
            launcher = getattr(found, f"saliency_fast_{name}_{suffix}")
            launcher.argtypes, launcher.restype = arguments, _INT
    found.saliency_fast_percentile_state.argtypes = []
    found.saliency_fast_percentile_state.restype = _INT64
    return found


def _launch(name: str, tensor: Tensor, *arguments: object) -> None:
    """Calls `name` for the tensor's dtype, on its device and that device's current stream."""
    suffixes, _ = _LAUNCHERS[name]
    suffix = suffixes.get(tensor.dtype)
    if suffix is None:
        valid = " or ".join(str(dtype).removeprefix("torch.") for dtype in suffixes)
        raise InputTypeError(f"{name} takes {valid} on a GPU: got {tensor.dtype}; pass x.float()")
    device = tensor.device
    for one in arguments:
        # A pointer to another device's memory is an illegal access, after which nothing runs.
        if isinstance(one, Tensor) and one.device != device:
            raise InputError(
                f"{name} takes tensors on one device: got {device} and {one.device}; move them"
            )
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        code = getattr(library(), f"saliency_fast_{name}_{suffix}")(*values, stream)
    if code in _CAPTURE:
        raise RuntimeError(f"{name} on {device}: CUDA error {code}, a capture of a graph fails")
    if code != 0:
        raise BackendError(f"{name} failed on {device} with CUDA error {code}")


def noise_points(x: Tensor, *arguments: Any) -> Tensor:
    *columns, antithetic, first_element = arguments
    x, columns = x.contiguous(), [t.contiguous() for t in columns]
    out = torch.empty((len(columns[2]), *x.shape[1:]), dtype=x.dtype, device=x.device)
    numel = x[0].numel()
    _launch("noise_points", x, x, *columns, out, len(out), numel, antithetic, first_element)
    return out


def magnitude_percentile(values: Tensor, percentile: float) -> Tensor:
    values = values.contiguous()
    rows, numel = len(values), values[0].numel()
    out = torch.empty(rows, dtype=values.dtype, device=values.device)
    state = torch.zeros(
        rows * library().saliency_fast_percentile_state(), dtype=torch.uint8, device=values.device
    )
    order = rank(numel, percentile)
    _launch("magnitude_percentile", values, values, state, out, rows, numel, order)
    return out


def _planes(x: Tensor, layout: torch.memory_format | None) -> tuple[int, int, int]:
    """(elements, elements of a plane, channels) of x in the memory order of `layout`."""
    if x.dim() < 2:
        return x.numel(), 1, 1
    inner = x.shape[2:].numel() if layout is torch.contiguous_format else 1
    return x.numel(), inner, x.shape[1]


def relu_mask(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    x = masks.dense(x)
    y = torch.empty_like(x)
    return y, _rectify(x, y, *options)


def relu_mask_(x: Tensor, *options: Any) -> Tensor:
    masks.check_in_place(x)
    return _rectify(x, x, *options)


def _rectify(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """Writes y; returns the mask. options: scale, shift, residual, slope, upper."""
    scale, shift, residual, slope, upper = options
    masks.check_forward(x, scale, shift, residual, slope, upper)
    layout = masks.layout_of(x) or torch.contiguous_format
    channels = [None if t is None else t.contiguous() for t in (scale, shift)]
    added = None if residual is None else residual.contiguous(memory_format=layout)
    mask = masks.empty_mask(x)
    planes = _planes(x, layout)
    _launch("relu_mask", x, x, *channels, added, y, mask, *planes, slope, upper)
    return mask


def relu_mask_backward(
    grad: Tensor, mask: Tensor, scale: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    slope, rule, both, channels_last = options
    masks.check_backward(grad, mask, scale, slope, rule)
    layout = masks.layout_named(grad, channels_last)
    grad, both = grad.contiguous(memory_format=layout), both and scale is not None
    scaled = torch.empty_like(grad, memory_format=layout)
    plain = torch.empty_like(scaled) if both else grad.new_empty(0)
    bits = None if rule == "deconv" else mask.contiguous()
    factor = None if scale is None else scale.contiguous()
    leak, positive = (slope, False) if rule == "standard" else (0.0, True)
    second = plain if both else None
    planes = _planes(grad, layout)
    _launch("relu_mask_backward", grad, grad, bits, factor, scaled, second, *planes, leak, positive)
    return scaled, plain


def pack_mask(flags: Tensor) -> Tensor:
    flags = masks.dense(flags)
    mask = masks.empty_mask(flags)
    _launch("pack_mask", flags, flags, mask, flags.numel())
    return mask
