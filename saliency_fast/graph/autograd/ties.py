"""PyTorch's own gradients where a slope changes or values are equal, measured on first use.

Releases differ: clamp passes gradients at its bounds up to 2.13, and not from 2.14 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

Args = tuple[Any, ...]


@cache
def passes(
    call: Callable[..., Any], args: Args, points: tuple[float, ...], slope: float = 0.0
) -> tuple[bool | None, ...]:
    """Whether `call(x, *args)` passes gradients (False: `slope` times them, None: neither)."""
    answers: dict[float, bool] = {slope: False, 1.0: True}
    return tuple(answers.get(one) for one in _slopes(call, args, points))


@cache
def takes_first(call: Callable[..., Any], axes: int, layout: torch.memory_format) -> bool:
    """Whether a max pool hands the gradient of a window of equal values to the first of them."""
    size = 3**axes

    def pooled(x: torch.Tensor) -> torch.Tensor:
        window = x.view(1, 2, *[3] * axes)
        window = window.contiguous(memory_format=layout) if axes > 1 else window
        found: torch.Tensor = call(window, [3] * axes)
        return found

    first = [1.0] + [0.0] * (size - 1)
    return _slopes(pooled, (), [1.0] * 2 * size) == first * 2


def _slopes(call: Callable[..., Any], args: Args, points: Sequence[float]) -> list[float]:
    """The gradient of the sum of `call(x, *args)`, outside of the caller's modes and devices."""

    def ask() -> list[float]:
        x = torch.tensor(points, dtype=torch.float64, device="cpu", requires_grad=True)
        (slopes,) = torch.autograd.grad(call(x, *args).sum(), x)
        found: list[float] = slopes.tolist()
        return found

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()
