"""Programs in float64, where rounding explains no difference: they tell whether two agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast.graph.opinfo import Wrapped
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.program import Program, Step, mapped

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


@dataclass(frozen=True)
class _Native(Wrapped):
    """A call by autograd's own derivative: no lean version is registered for it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


def native(program: Program) -> Program:
    """A recorded program, not fused yet, with autograd's own derivative of every call."""
    steps = tuple(replace(step, func=_Native(step.func)) for step in program.steps)
    return replace(program, steps=steps)


def wide(value: Any) -> Any:
    return InFloat64().value(value)


class InFloat64:
    """Programs with float64 in the place of smaller floating types, their weights copied once."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def program(self, program: Program) -> Program:
        return replace(program, steps=tuple(map(self._step, program.steps)))

    def prefix(self, prefix: Prefix | None) -> Prefix | None:
        return prefix and Prefix(self.program(prefix.stem), self.program(prefix.rest))

    def value(self, value: Any) -> Any:
        return mapped(self._leaf, value)

    def _step(self, step: Step) -> Step:
        func = step.func.func if isinstance(step.func, _Native) else step.func
        func = Tensor.double if func in _CASTS else func
        func = _Native(func) if isinstance(step.func, _Native) else func
        return replace(step.with_arguments(self._leaf), func=func)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf in _NARROW else leaf
        if not isinstance(leaf, Tensor) or leaf.dtype not in _NARROW:
            return leaf
        if leaf not in self._known:
            self._known[leaf] = leaf.detach().double()
        return self._known[leaf]
