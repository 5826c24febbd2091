"""Paddings by the points' own numbers, which keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.autograd.pools import _served, _Shaped

_aten, _nn = torch.ops.aten, torch._C._nn
_KINDS = {"reflect": "reflection_pad", "replicate": "replication_pad"}


def _padding(kind: str, axes: int) -> Callable[..., Any]:
    pad = getattr(_nn, f"{kind}{axes}d")
    transpose = getattr(_aten, f"{kind}{axes}d_backward")

    def padded(input: Tensor, padding: Any) -> Any:
        if not _served(input, axes) or len(padding) != 2 * axes:
            return NotImplemented
        return _Shaped.apply(input, pad, transpose, (list(padding),))  # type: ignore[no-untyped-call]

    return padded


_LEAN = {(kind, axes): _padding(kind, axes) for kind in _KINDS.values() for axes in (1, 2, 3)}


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    lean = _LEAN.get((_KINDS.get(mode, ""), len(pad) // 2))
    return NotImplemented if lean is None else lean(input, pad)


LEAN: dict[Callable[..., Any], Callable[..., Any]] = {
    _nn.pad: _pad,
    **{getattr(_nn, f"{kind}{axes}d"): lean for (kind, axes), lean in _LEAN.items()},
}
