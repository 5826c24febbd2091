"""Apart: the proof that copies of a batch which share a call of a function do not meet in it.

A copy is the batch at one step of a path, with one sample of noise or with one perturbation. The
proof is the engine's: a copy alone has the numbers that it has among others, those of the same call
and extreme ones. Examples of one batch may depend on each other, as they do in Captum.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.captum.contract import as_args
from saliency_fast.captum.forward import read_output
from saliency_fast.captum.run import _repeated
from saliency_fast.engine.independence import Independence, Row
from saliency_fast.errors import ContractError
from saliency_fast.graph.passes.half import FLOAT32, Precision
from saliency_fast.model.preserve import draw_again, preserved, random_states, same_draws

FEW = 4
"""Copies of which each is proved."""


@dataclass
class _Sizes(Independence):
    """What is known of copies. A function may branch on the number of rows: every number of copies
    is proved by itself. No recording shows what the function does: one copy of every call is, too.

    telling: the copy whose numbers are the farthest from the others', as those of a saturated
    function tell nothing.
    """

    sizes: set[int] = field(default_factory=set)
    telling: int = 0

    def due(self, rows: int, *, apart: bool) -> tuple[int, ...]:
        if rows < 2:
            return ()
        if rows in self.sizes:
            return (self.telling,)
        self.sizes.add(rows)
        found = range(rows) if rows <= FEW else ((rows - 1) // 2, self.telling, rows - 1, 0)
        return tuple(dict.fromkeys(found))


@dataclass
class _Judged:
    """A function of copies [count, B, *] in the place of the engine's, whose rows are copies."""

    of: Callable[[Inputs], Tensor]
    dtypes: tuple[torch.dtype, ...] | None = None
    precision: Precision = FLOAT32
    lone: None = None

    @torch.no_grad()
    def judged(self, points: Inputs, item: Tensor) -> tuple[Tensor, float]:
        found = self.of(points)
        size = found.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
        return found, float(size.max()) if size.numel() else 0.0


class SharedCalls:
    """Calls of a function for several copies of a batch. of: the numbers [count, N] of copies
    [count, B, *]; proved: whether these are known not to meet.
    """

    def __init__(self, of: Callable[[Inputs], Tensor], *, proved: bool = False) -> None:
        self.function, self.rows, self.proved = _Judged(of), _Sizes(draws=True), proved

    def numbers(self, points: Inputs) -> Tensor:
        """The numbers [count, N] of copies; raises RowsMeetError where these meet."""
        count = len(points[0])
        if self.proved:
            return self.function.of(points)
        item = torch.zeros(count, dtype=torch.int64, device=points[0].device)
        # The function may work in place.
        kept = tuple(x.clone() for x in points)
        found = self.function.of(points)
        kind = found.dtype
        self.function.dtypes = (kind,) if kind.is_floating_point else None
        self.rows.telling = _farthest(found)
        due = self.rows.due(count, apart=False)
        for number in due:
            # Among extreme ones two are asked: the first and the last are often an input and its
            # baseline, at which functions are saturated.
            asked = number in ((count - 1) // 2, self.rows.telling)
            self.rows.provoke = asked and len(due) > 1
            row = Row.of(kept, item, number)
            self.rows.prove(self.function, row)(found)  # type: ignore[arg-type]
        return found

    def meet(self, points: Inputs) -> bool:
        """Whether copies that are to share a call meet."""
        if len(points[0]) < 2:
            return False
        try:
            with same_draws(lambda: True, points[0].device):
                self.numbers(points)
        except Exception:
            # Of what cannot be called so nothing is proved; alone, copies show what is wrong.
            return True
        return False


def calls_each(forward: Callable[..., Any]) -> bool:
    """Whether a function calls a model for each copy: that of Captum's DataLoaderAttribution, where
    a call is a pass through the data.
    """
    while isinstance(forward, partial):
        forward = forward.func
    kind = type(getattr(forward, "__self__", None))
    return any(
        one.__name__ == "DataLoaderAttribution" and one.__module__.startswith("captum.")
        for one in kind.__mro__
    )


def _farthest(found: Tensor) -> int:
    """The copy whose numbers [count, N] are the farthest from most others'."""
    numbers = found.detach().double().nan_to_num()
    return int((numbers - numbers.median(0).values).abs().sum(1).argmax())


def drawn_again(device: torch.device) -> Callable[[], None]:
    """What puts the global generators back to where they are now: of PyTorch, of NumPy and of
    Python, of which a user's functions may draw.
    """
    states, numpy_state, python_state = (
        random_states(device),
        np.random.get_state(),
        random.getstate(),
    )

    def again() -> None:
        draw_again(states, device)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return again


def calls_of(forward: Callable[..., Any], further: Any, *layers: Any) -> SharedCalls:
    """Shared calls of a function with its further arguments: all that it returns, and what modules
    give that it calls.
    """
    args = as_args(further)

    def of(points: Inputs) -> Tensor:
        count, seen = len(points[0]), list[Tensor]()
        rows = tuple(x.flatten(0, 1) for x in points)
        own = (_repeated(one, count) if isinstance(one, Tensor) else one for one in args)
        handles = [
            layer.register_forward_hook(lambda _, __, out: seen.extend(_floats(out)))
            for layer in layers
        ]
        try:
            with torch.no_grad(), preserved(forward):
                output = read_output(forward(*rows, *own))
        finally:
            for handle in handles:
                handle.remove()
        if not output.dim() or len(output) % count:
            raise ContractError("outputs do not grow with the batch; pass one batch a call")
        # What a layer gives without a row for each of the inputs is in no order that is known.
        several = [output, *(one for one in seen if one.dim() and len(one) == len(rows[0]))]
        return torch.cat([one.detach().reshape(count, -1) for one in several], 1)

    return SharedCalls(of)


def _floats(value: Any) -> list[Tensor]:
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [one.clone() for one in several if isinstance(one, Tensor) and one.is_floating_point()]
