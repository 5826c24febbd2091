"""Calls of the user's function that several copies of the batch share, and the proof that copies do
not change each other's results.

A copy is the batch at one step of a path, with one sample of noise or with one perturbation. The
proof is the engine's (`engine/independence.py`): a copy alone must have the numbers that it has in
the shared call, and among extreme copies. Examples of one batch may depend on each other, as they
do in Captum.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import arguments_of, tiled
from saliency_fast.captum.forward import read_output
from saliency_fast.engine.independence import Row, RowsMeetError, provoked, scores_agree
from saliency_fast.errors import ContractError
from saliency_fast.graph.passes.half import FLOAT32
from saliency_fast.model.layers import hooked, tensors_at
from saliency_fast.model.preserve import draw_again, preserved, random_states, restored_random_state

MOST_PROVED = 4
"""Copies in the first call of a size that are proved one by one; of more, the first, the last, the
middle one and the one farthest from the others."""


Result = TypeVar("Result")


class SharedCalls:
    """Calls of a function for several copies of the batch.

    Args:
        of: returns the numbers [count, N] of copies [count, B, *], a tensor for each input.
        independent: whether the copies are known not to change each other's numbers.
    """

    # The engine's proof reads these of the function that it calls.
    precision = FLOAT32
    dtypes: tuple[torch.dtype, ...] | None = None

    def __init__(self, of: Callable[[Inputs], Tensor], *, independent: bool = False) -> None:
        self.of, self.independent = of, independent
        self._sizes = set[int]()

    def numbers(self, points: Inputs) -> Tensor:
        """The numbers [count, N] of copies; raises RowsMeetError where copies change them."""
        count = len(points[0])
        if self.independent or count < 2:
            return self.of(points)
        # The function may work in place.
        kept = tuple(x.clone() for x in points)
        found = self.of(points)
        self.dtypes = (found.dtype,) if found.dtype.is_floating_point else None
        self._prove(kept, found)
        return found

    def _prove(self, points: Inputs, found: Tensor) -> None:
        """Compares some of the copies with the same copies alone. A function may branch on the
        number of rows, so that each size has a proof of its own; in later calls of that size one
        copy is asked, since no recording shows what the function does.
        """
        count, numbers = len(found), found.detach().double().nan_to_num()
        # Numbers far from the others: those of a saturated function prove nothing.
        farthest = int((numbers - numbers.median(0).values).abs().sum(1).argmax())
        middle, due = (count - 1) // 2, [farthest]
        if count not in self._sizes:
            self._sizes.add(count)
            due = [*range(count)] if count <= MOST_PROVED else [middle, farthest, count - 1, 0]
        example = torch.zeros(count, dtype=torch.int64, device=points[0].device)
        for number in dict.fromkeys(due):
            row = Row.of(points, example, number)
            with restored_random_state(lambda: True, example.device):
                alone, scale = self.scores_and_magnitude(*row.alone())
                # The first and the last are often an input and its baseline, at which functions
                # are saturated.
                if len(due) > 1 and number in (middle, farthest):
                    provoked(self, row, alone, scale)  # type: ignore[arg-type]
            if not scores_agree(found[number], alone[0], scale, self):  # type: ignore[arg-type]
                raise RowsMeetError(f"copy {number} of {count} has other numbers alone")

    @torch.no_grad()
    def scores_and_magnitude(self, points: Inputs, example: Tensor) -> tuple[Tensor, float]:
        """The numbers of copies and the largest of them, as the engine's proof asks for them."""
        found = self.of(points)
        size = found.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
        return found, float(size.max()) if size.numel() else 0.0

    def depend(self, points: Inputs) -> bool:
        """Whether copies that are to share a call change each other's numbers."""
        if len(points[0]) < 2:
            return False
        try:
            with restored_random_state(lambda: True, points[0].device):
                self.numbers(points)
        except Exception:
            # A function that fails on several copies is called with one, which tells its error.
            return True
        return False


def together_or_apart(
    run: Callable[[bool], Result], rewind: Callable[[], object], *, apart: bool
) -> Result:
    """The result of `run(False)`, whose copies share calls; of `run(True)`, whose copies have calls
    of their own, where `apart` says so or copies are seen to depend on each other. `rewind` puts
    draws back before the second run: all that shared a call before may be wrong.
    """
    if not apart:
        with suppress(RowsMeetError):
            return run(False)
        rewind()
    return run(True)


def calls_of(forward: Callable[..., Any], further: Any, *layers: Any) -> SharedCalls:
    """Shared calls whose numbers are all that a function returns and what `layers` return."""

    def of(points: Inputs) -> Tensor:
        count, seen = len(points[0]), list[Tensor]()
        rows = tuple(x.flatten(0, 1) for x in points)

        def keep(_: int, value: Any) -> None:
            seen.extend(one.clone() for one in tensors_at(value) if one.is_floating_point())

        with torch.no_grad(), preserved(forward), hooked(layers, keep):
            output = read_output(forward(*rows, *arguments_of(further, tiled, count)))
        if not output.dim() or len(output) % count:
            raise ContractError("outputs do not grow with the batch; pass one batch a call")
        # Tensors without a row for each row of the inputs are in no known order.
        several = [output, *(one for one in seen if one.dim() and len(one) == len(rows[0]))]
        return torch.cat([one.detach().reshape(count, -1) for one in several], 1)

    return SharedCalls(of)


def copies_are_apart(forward: Callable[..., Any]) -> bool:
    """Whether a function calls the model for each copy: Captum's DataLoaderAttribution does, and
    each of its calls is a pass through the data.
    """
    while isinstance(forward, partial):
        forward = forward.func
    kind = type(getattr(forward, "__self__", None))
    return any(
        one.__name__ == "DataLoaderAttribution" and one.__module__.startswith("captum.")
        for one in kind.__mro__
    )


def rewind_draws(device: torch.device) -> Callable[[], None]:
    """A function that puts the global generators of PyTorch, NumPy and Python back to where they
    are now.
    """
    states = random_states(device)
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def rewind() -> None:
        draw_again(states, device)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return rewind
