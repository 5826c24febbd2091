"""Programs in float64, where rounding explains nothing: what tells whether two of them agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.program import Program, Step

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


@dataclass(frozen=True)
class _Native:
    """A call by autograd's own derivative: it is no key of any table of lean versions."""

    func: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


def native(program: Program) -> Program:
    """A recorded program, not fused yet, with autograd's own derivative of every call."""
    steps = tuple(replace(step, func=_Native(step.func)) for step in program.steps)
    return replace(program, steps=steps)


def wide(value: Any) -> Any:
    """A value with its floating tensors in float64."""
    return Wider().value(value)


class Wider:
    """Programs with float64 in the place of every smaller floating type, their weights copied once.

    They may fail when they run, where calls make tensors of another type in a way of their own.
    """

    def __init__(self) -> None:
        # With the originals: the ids of what is gone are used again.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def program(self, program: Program) -> Program:
        return replace(program, steps=tuple(map(self._step, program.steps)))

    def prefix(self, prefix: Prefix | None) -> Prefix | None:
        return prefix and Prefix(self.program(prefix.stem), self.program(prefix.rest))

    def _step(self, step: Step) -> Step:
        native = isinstance(step.func, _Native)
        func = step.func.func if isinstance(step.func, _Native) else step.func
        func = Tensor.double if func in _CASTS else func
        kwargs = {name: self.value(one) for name, one in step.kwargs.items()}
        func = _Native(func) if native else func
        return replace(step, func=func, args=self.value(step.args), kwargs=kwargs)

    def value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value) if value.dtype in _NARROW else value
        if isinstance(value, torch.dtype):
            return torch.float64 if value in _NARROW else value
        if type(value) in (tuple, list):
            return type(value)([self.value(one) for one in value])
        if type(value) is dict:
            return {name: self.value(one) for name, one in value.items()}
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if id(value) not in self._known:
            self._known[id(value)] = value, value.detach().double()
        return self._known[id(value)][1]
