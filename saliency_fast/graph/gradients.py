"""Gradients by autograd, and calls whose backward pass is our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from saliency_fast._torch_compat import BATCH_NORM_STEPS, run_backward, saved_input
from saliency_fast._types import Args, Function

Forward = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]
Backward = Callable[..., Tensor | tuple[Tensor | None, ...] | None]
Source = Tensor | GradientEdge


def gradients(
    outputs: Source | Sequence[Source],
    inputs: Tensor | GradientEdge | Sequence[Source],
    cotangents: Tensor | Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """`torch.autograd.grad`, with the gradients of batch and instance normalisation right.

    On CPUs PyTorch's kernel walks input and gradient in one order if each is dense in some memory
    format. Of one row, strides may fit both formats while the two tensors lie differently, and the
    result is wrong: InstanceNorm between channels-last layers. A gradient that is dense in no
    format goes through a kernel that reads all strides.
    """
    many = (outputs,) if isinstance(outputs, (Tensor, GradientEdge)) else tuple(outputs)
    handles = _hooked_norms(many)
    try:
        found: tuple[Any, ...] = torch.autograd.grad(outputs, inputs, cotangents, **options)  # type: ignore[arg-type]
        return found
    finally:
        for handle in handles:
            handle.remove()


def gradients_of_sums(
    columns: Sequence[Tensor], sources: Sequence[Source]
) -> list[tuple[Tensor | None, ...]]:
    """For each column of scores the gradients of its sum, None where it does not depend on a
    source; all columns are of one graph.
    """
    found, last, handles = [], len(columns) - 1, _hooked_norms(columns)
    try:
        for number, one in enumerate(columns):
            # Not by `torch.autograd.grad`, which takes as long as the pass of a small network.
            about = ((one,), (torch.ones_like(one),), number < last, False, tuple(sources))
            found.append(run_backward(*about, allow_unreachable=True, accumulate_grad=False))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _hooked_norms(results: Iterable[Source]) -> list[Any]:
    """Makes the gradients into batch and instance normalisations right; returns the hooks' handles.
    No tensor is held, whose memory the pass could not take again.
    """
    handles = []
    for node in steps_behind(results):
        if node.name().startswith(BATCH_NORM_STEPS):
            x = saved_input(node)
            if x is None or (x.device.type == "cpu" and x.dim() >= 4 and len(x) == 1):
                strides = None if x is None else x.stride()[1:]
                handles.append(node.register_prehook(partial(_apart, strides)))
            del x
    return handles


def _apart(
    strides: tuple[int, ...] | None, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    """The same gradients, of one image or volume with a gap between its elements in memory, unless
    it lies as the input does, with these strides behind the first.
    """
    first = grads[0]
    if first is None or first.device.type != "cpu" or first.dim() < 4 or len(first) != 1:
        return None
    if first.stride()[1:] == strides:
        return None
    return first.new_empty((*first.shape, 2))[..., 0].copy_(first), *grads[1:]


def steps_behind(results: Iterable[Source]) -> list[Any]:
    """Autograd's steps from the results back to what they were made of."""
    found: list[Any] = [one.grad_fn if isinstance(one, Tensor) else one.node for one in results]
    found = list(dict.fromkeys(node for node in found if node is not None))
    seen = set(found)
    for node in found:
        # The list grows while it is walked.
        for one, _ in node.next_functions:
            if one is not None and one not in seen:
                seen.add(one)
                found.append(one)
    return found


def nodes_made_of(starts: Iterable[Any], result: Tensor) -> set[Any]:
    """Autograd's steps behind a result that lead on to some of `starts`."""
    after: dict[Any, list[Any]] = {}
    for node in steps_behind((result,)):
        for one, _ in node.next_functions:
            after.setdefault(one, []).append(node)
    pending, made = list(starts), set[Any]()
    while pending:
        node = pending.pop()
        if node not in made:
            made.add(node)
            pending += after.get(node, ())
    return made


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Forward, back: Backward, *inputs: Tensor) -> Tensor:
        y, kept = run(*inputs)
        ctx.save_for_backward(*kept)
        ctx.back = back
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = ctx.back(grad, *ctx.saved_tensors)
        return None, None, *(found if isinstance(found, tuple) else (found,))


def differentiable(x: Tensor, run: Forward, back: Backward, *others: Tensor) -> Any:
    """The result of `run(x, *others)` -> (y, kept), whose gradients are `back(gradient, *kept)`."""
    return _Lean.apply(run, back, x, *others)  # type: ignore[no-untyped-call]


# PyTorch's own gradients where a slope changes or values are equal, measured on first use: releases
# differ (clamp passes gradients at its bounds up to 2.13, and not from 2.14 on).


@cache
def passes(
    call: Function, args: Args, points: tuple[float, ...], slope: float = 0.0
) -> tuple[bool | None, ...]:
    """Whether `call(x, *args)` passes gradients (False: `slope` times them, None: neither)."""
    answers: dict[float, bool] = {slope: False, 1.0: True}
    return tuple(answers.get(one) for one in _slopes(call, args, points))


@cache
def takes_first(call: Function, axes: int, layout: torch.memory_format) -> bool:
    """Whether a max pool hands the gradient of a window of equal values to the first of them."""
    size = 3**axes

    def pooled(x: Tensor) -> Tensor:
        window = x.view(1, 2, *[3] * axes)
        window = window.contiguous(memory_format=layout) if axes > 1 else window
        found: Tensor = call(window, [3] * axes)
        return found

    first = [1.0] + [0.0] * (size - 1)
    return _slopes(pooled, (), [1.0] * 2 * size) == first * 2


def _slopes(call: Function, args: Args, points: Sequence[float]) -> list[float]:
    """The gradient of the sum of `call(x, *args)`, outside of the caller's modes and devices."""

    def ask() -> list[float]:
        x = torch.tensor(points, dtype=torch.float64, device="cpu", requires_grad=True)
        (slopes,) = torch.autograd.grad(call(x, *args).sum(), x)
        found: list[float] = slopes.tolist()
        return found

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()
