"""Casts that keep every number, or refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError


def cast(value: Tensor, dtype: torch.dtype, what: str, cure: str = "") -> Tensor:
    """`value` in `dtype` with the same numbers, floating point ones rounded. Raises InputError
    where another number would change, and InputTypeError for complex numbers.
    """
    if value.dtype == dtype:
        return value
    if value.is_complex() and not dtype.is_complex:
        raise InputTypeError(
            f"{what} must be real: got {value.dtype}, expected {dtype}; use torch.view_as_real"
        )
    lost = _lost(value, dtype)
    if bool(lost.any()):
        # By number: PyTorch before 2.10 has no masks of unsigned integers.
        number = value.flatten()[int(lost.flatten().nonzero()[0])].item()
        raise InputError(
            f"{what} would change in a cast to {dtype}: got {number!r} ({value.dtype})"
            + (f"; {cure}" if cure else "")
        )
    return value.to(dtype)


def _lost(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Which numbers `dtype` cannot hold, bool like `value`."""
    if dtype.is_complex:
        return torch.zeros_like(value, dtype=torch.bool)
    if dtype.is_floating_point:
        cast_back = value.to(dtype).double()
        if value.is_floating_point():
            return value.isfinite() & ~cast_back.isfinite()
        whole = value.to(torch.int64)
        # Beyond 2 ** 63 the way back is undefined.
        held = (cast_back >= -(2.0**63)) & (cast_back < 2.0**63)
        return _wrapped(value, whole) | ~held | (torch.where(held, cast_back, 0.0).long() != whole)
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not value.is_floating_point():
        whole = value.to(torch.int64)
        outside = (whole < low) | (whole > min(high, torch.iinfo(torch.int64).max))
        return outside | _wrapped(value, whole)
    # The largest number of a type has no float of its own: the one above it has.
    wide = value.double()
    return ~((wide >= low) & (wide < float(high) + 1.0) & (wide == wide.trunc()))


def _wrapped(value: Tensor, whole: Tensor) -> Tensor:
    """Which unsigned numbers have no int64."""
    return (whole < 0) & (value.dtype == torch.uint64)
