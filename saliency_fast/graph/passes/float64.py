"""Programs in float64, where rounding explains no difference: they tell whether two agree."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from saliency_fast._torch_compat import storage_id
from saliency_fast.graph.opinfo import Wrapped
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.program import Env, Program, Step, mapped, tensors_among

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
LARGE = 4 * 1024**2
"""Bytes of a call's weights that are not copied for the whole program."""
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


def _is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in _NARROW


class _WideStep(Step):
    """A call whose large weights are float64 while it runs: what autograd keeps of them for the
    backward pass is a view of the weights as they are.
    """

    def run(self, env: Env, rows: int) -> None:
        origins = dict[int, Tensor]()

        def widened(leaf: Any) -> Any:
            if not _is_narrow(leaf):
                kind = isinstance(leaf, torch.dtype) and leaf in _NARROW
                return torch.float64 if kind else leaf
            wider = leaf.detach().double()
            origins[storage_id(wider)] = leaf
            return wider

        def pack(kept: Tensor) -> Any:
            origin = origins.get(storage_id(kept))
            view = kept.shape, kept.stride(), kept.storage_offset()
            return kept if origin is None else (origin, view)

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            origin, view = kept
            return torch.as_strided(origin.detach().double(), *view)

        step = Step(**{one.name: getattr(self, one.name) for one in fields(self)})
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            step.with_arguments(widened).run(env, rows)
        # Their memory may be another tensor's from here on.
        origins.clear()


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
        step = replace(step, func=func)
        weights = tensors_among(step.args, dict(step.kwargs))
        if sum(leaf.nbytes for leaf in weights if _is_narrow(leaf)) >= LARGE:
            return _WideStep(**{one.name: getattr(step, one.name) for one in fields(step)})
        return step.with_arguments(self._leaf)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf in _NARROW else leaf
        if not _is_narrow(leaf):
            return leaf
        if leaf not in self._known:
            self._known[leaf] = leaf.detach().double()
        return self._known[leaf]
