"""Ties: how much of a gradient goes through maxima that several values reach, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast._torch_compat import NN, is_rectifier_step
from saliency_fast._types import Args, Function, Inputs, Kwargs
from saliency_fast.graph.autograd.convolutions import each_axis
from saliency_fast.graph.intercept import Calls
from saliency_fast.model.preserve import rewind

WITHIN = {torch.float64: 2.0**-40, torch.float32: 2.0**-20}
"""Relative difference up to which rounding may have made two values differ: some dozen units in the
last place; float64 has room for more. Half types: one unit."""
Counts = tuple[Tensor, Tensor] | None
"""For each maximum, how many values are within rounding of it, and how many are equal to it."""


class Ties(Calls):
    """An executor that runs the model eagerly and finds the ties that its gradient passes.

    met: whether the model takes maxima. passed: for each maximum sums of absolute gradients: all,
    through ties, and through ties whose values are not equal to the last bit.
    """

    def __init__(self, model: Function) -> None:
        super().__init__()
        self.model, self.met = model, False
        self.passed: list[list[float]] = []

    def __call__(self, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        rewind()
        with self:
            return self.model(*points, *args, **kwargs)

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        result = func(*args, **kwargs)
        look = _MAXIMA.get(func)
        y = result[0] if isinstance(result, tuple) and result else result
        if look is None or not isinstance(y, Tensor) or not y.requires_grad:
            return result
        self.met = True
        with torch.no_grad():
            counts = look(args[0].detach(), y.detach(), *args[1:], **kwargs)
        if counts is not None:
            self.add(args[0], y, *counts)
        return result

    def shares(self) -> tuple[float, float]:
        """The largest shares of the gradient that pass ties, and ties by rounding."""
        shares = [[one / whole for one in ties] for whole, *ties in self.passed if whole > 0]
        tied, rounded = zip(*shares, strict=True) if shares else ((0.0,), (0.0,))
        return max(tied), max(rounded)

    def add(self, x: Tensor, y: Tensor, near: Tensor, equal: Tensor) -> None:
        """Sums the gradient of maxima y of x, from counts of near and of equal values."""
        tied = near > 1
        if is_rectifier_step(x.grad_fn):
            # No gradient passes the rectifier before it.
            tied &= y.detach() != 0
        rounded, sums = tied & (near > equal), [0.0, 0.0, 0.0]
        self.passed.append(sums)

        def passing(grad: Tensor) -> None:
            size = grad.detach().abs()
            for number, part in enumerate((size, size[tied], size[rounded])):
                sums[number] += float(part.double().sum())

        y.register_hook(passing)  # type: ignore[no-untyped-call]


def _windows(axes: int) -> Callable[..., Counts]:
    def look(
        x: Tensor,
        y: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        **_: Any,
    ) -> Counts:
        kernel = each_axis(kernel_size, axes)
        steps = kernel if stride is None or stride == [] else each_axis(stride, axes)
        edges, holes = each_axis(padding, axes), each_axis(dilation, axes)
        parts = list(zip(y.shape[-axes:], kernel, steps, edges, holes, strict=True))
        pads: list[int] = []
        for size, (out, k, s, p, d) in zip(x.shape[-axes:], parts, strict=True):
            pads[:0] = [p, max(0, (out - 1) * s + d * (k - 1) + 1 - p - size)]
        windows = functional.pad(x, pads, value=-math.inf)
        for axis, (out, k, s, _pad, d) in enumerate(parts, x.dim() - axes):
            windows = windows.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, out)[..., ::d]
        return _along(windows, y, tuple(range(x.dim(), windows.dim())))

    return look


def _adaptive(axes: int) -> Callable[..., Counts]:
    def look(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Counts:
        pairs = list(zip(x.shape[-axes:], y.shape[-axes:], strict=True))
        if any(size % out for size, out in pairs):
            # Windows of several sizes, that overlap.
            return None
        lead = x.dim() - axes
        apart = x.reshape(*x.shape[:lead], *(n for size, out in pairs for n in (out, size // out)))
        return _along(apart, y, tuple(range(lead + 1, apart.dim(), 2)))

    return look


def _along(x: Tensor, y: Tensor, dim: Any = (), keepdim: bool = False, **_: Any) -> Counts:
    if isinstance(dim, Tensor):
        return None
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    axes = tuple(sorted(one % x.dim() for one in given)) or tuple(range(x.dim()))
    wide = y
    for axis in () if keepdim else axes:
        wide = wide.unsqueeze(axis)
    reach = wide.abs() * WITHIN.get(y.dtype, torch.finfo(y.dtype).eps)
    near, equal = wide - x <= reach, wide == x
    return near.sum(axes).view(y.shape), equal.sum(axes).view(y.shape)


_MAXIMA: dict[Any, Callable[..., Counts]]
_MAXIMA = dict.fromkeys((torch.amax, Tensor.amax, torch.max, Tensor.max), _along)
for _axes, _space in ((1, torch), (2, NN), (3, NN)):
    _MAXIMA[getattr(torch, f"max_pool{_axes}d")] = _windows(_axes)
    _MAXIMA[getattr(_space, f"max_pool{_axes}d_with_indices")] = _windows(_axes)
    _MAXIMA[getattr(_space, f"adaptive_max_pool{_axes}d")] = _adaptive(_axes)


def may_tie(inputs: Inputs) -> bool:
    """Whether neighbours of any example, or positions of a series or cloud, are equal."""
    for x in inputs:
        if x.dim() == 2:
            ordered = x.sort(1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                return True
        for axis in range(2, x.dim()):
            count = x.shape[axis] - 1
            same = x.narrow(axis, 1, count) == x.narrow(axis, 0, count)
            if bool(same.all(1).any()):
                return True
        several = x if x.dim() == 3 else ()
        if any(torch.unique(one, dim=1).shape[1] < one.shape[1] for one in several):
            return True
    return False
