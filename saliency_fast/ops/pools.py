"""Pools: max pooling that remembers each maximum in one byte, by its position in the window.

PyTorch keeps an int64 position in the input per output. A window has few, so that a byte
holds its number, row-major: k = (kd * KH + kh) * KW + kw. Results lie in memory as their input
does: channels last where it does, else contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saliency_fast.ops.registry import Sample, define

LARGEST_WINDOW = 256
"""The most elements of a window that a byte can number."""

Ints = Sequence[int]


def layout(x: Tensor) -> torch.memory_format:
    """How a pool of x lies in memory; the last stride decides where an axis of one leaves both."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.stride(-1) == x.shape[1] > 1 and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def pooled_size(
    size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> list[int]:
    """The spatial sizes of a pool's output; its arguments are checked here."""
    _check(len(size), kernel, stride, padding, dilation)
    found = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        spare = n + 2 * p - d * (k - 1) - 1
        count = (spare + (s - 1 if ceil_mode else 0)) // s + 1
        # A window must begin in the input or in the padding before it.
        if ceil_mode and (count - 1) * s >= n + p:
            count -= 1
        if n < 1 or count < 1:
            raise ValueError(f"no window of {list(kernel)} fits into an input of {list(size)}")
        found.append(count)
    return found


def _check(axes: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> None:
    lists = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    if axes not in (1, 2, 3) or any(len(values) != axes for values in lists.values()):
        shown = ", ".join(f"{name} {list(values)}" for name, values in lists.items())
        raise ValueError(f"a pool has 1 to 3 axes and a number for each: got {axes} and {shown}")
    for name, values in lists.items():
        if min(values) < (name != "padding"):
            raise ValueError(f"{name} must be positive (padding not negative): got {list(values)}")
    if any(2 * p > d * (k - 1) + 1 for p, k, d in zip(padding, kernel, dilation, strict=True)):
        raise ValueError(
            f"padding must be at most half a window: got {list(padding)} for a kernel of"
            f" {list(kernel)}, dilation {list(dilation)}"
        )
    if math.prod(kernel) > LARGEST_WINDOW:
        raise ValueError(
            f"a window may have {LARGEST_WINDOW} elements, as a byte numbers: got {list(kernel)}"
        )


def _offsets(kernel: Ints) -> list[tuple[int, tuple[int, ...]]]:
    """(number, position) of each element of a window, in scan order."""
    return list(enumerate(itertools.product(*map(range, kernel))))


def _seen_at(padded: Tensor, position: Ints, out: Ints, stride: Ints, dilation: Ints) -> Tensor:
    """What all windows see at one of their positions: a view of the padded input."""
    axes = zip(position, out, stride, dilation, strict=True)
    seen: tuple[Any, ...] = tuple(slice(k * d, k * d + (o - 1) * s + 1, s) for k, o, s, d in axes)
    return padded[(..., *seen)]


def _laid_out(values: Tensor, form: torch.memory_format) -> Tensor:
    # `contiguous` would leave the strides of an axis of one, which say the layout.
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device, memory_format=form)
    return out.copy_(values)


def _maxpool(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    size = x.shape[2:]
    out = pooled_size(size, *geometry)
    kernel, stride, padding, dilation, _ = geometry
    pads: list[int] = []
    for n, k, s, p, d, o in zip(size, kernel, stride, padding, dilation, out, strict=True):
        pads[:0] = [p, max(0, (o - 1) * s + d * (k - 1) + 1 - p - n)]
    padded = F.pad(x, pads, value=-math.inf)
    real = F.pad(torch.ones(tuple(size), dtype=torch.bool, device=x.device), pads, value=False)
    best = x.new_full((*x.shape[:2], *out), -math.inf)
    index = torch.zeros(best.shape, dtype=torch.uint8, device=x.device)
    found = torch.zeros(best.shape[2:], dtype=torch.bool, device=x.device)
    for number, position in _offsets(kernel):
        value = _seen_at(padded, position, out, stride, dilation)
        here = _seen_at(real, position, out, stride, dilation)
        # As in PyTorch the first of equals stays, and the last NaN.
        replaced = here & (~found | (value > best) | value.isnan())
        best = torch.where(replaced, value, best)
        index = torch.where(replaced, number, index)
        found = found | here
    return _laid_out(best, layout(x)), _laid_out(index, layout(x))


def _fake_maxpool(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    shape, form = (*x.shape[:2], *pooled_size(x.shape[2:], *geometry)), layout(x)
    values = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    return values, torch.empty_like(values, dtype=torch.uint8)


def _input(kind: str, shape: Ints, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tuple(shape)).to(dtype)
    if kind == "ties":
        return torch.randint(-1, 2, tuple(shape)).to(dtype)
    if kind == "not a number":
        x[torch.rand(x.shape) < 0.3] = -math.inf
        x[torch.rand(x.shape) < 0.2] = math.nan
    elif kind == "nothing":
        x.fill_(-math.inf)
    elif kind == "channels last":
        x = x.contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    elif kind == "strided":
        x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2].transpose(0, 1)
        x = x.contiguous().transpose(0, 1)
    return x


_GEOMETRIES: tuple[tuple[Ints, Ints, Ints, Ints, Ints, bool], ...] = (
    # shape, kernel, stride, padding, dilation, ceil_mode
    ((2, 3, 9), (2,), (2,), (0,), (1,), False),
    ((1, 2, 17), (5,), (3,), (2,), (1,), True),
    ((2, 1, 2081), (3,), (1,), (1,), (1,), False),
    ((1, 2, 4131), (3,), (2,), (1,), (1,), False),
    ((1, 1, 700), (256,), (60,), (128,), (1,), True),
    ((2, 3, 7, 9), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 1, 8, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((1, 5, 5, 4), (3, 3), (1, 1), (1, 1), (1, 1), False),
    ((2, 3, 10, 7), (3, 3), (2, 2), (0, 0), (1, 1), True),
    ((1, 3, 11, 13), (3, 2), (1, 2), (1, 1), (2, 3), True),
    ((2, 2, 11, 13), (2, 3), (3, 5), (1, 0), (1, 1), False),
    # Windows that dilation leaves without an element, one per axis.
    ((1, 2, 3, 1), (1, 2), (1, 1), (0, 1), (1, 2), False),
    ((1, 2, 2, 1, 3), (1, 2, 1), (1, 1, 1), (0, 1, 0), (1, 2, 1), False),
    ((0, 2, 5, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((2, 3, 5, 7, 6), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), True),
    ((1, 2, 4, 5, 9), (3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1), False),
    ((1, 2, 5, 4, 7), (2, 1, 3), (3, 1, 1), (1, 0, 1), (1, 1, 2), False),
)


def _samples() -> Iterator[Sample]:
    for shape, *geometry in _GEOMETRIES:
        for kind in ("ties", "channels last") if len(shape) > 3 else ("ties",):
            yield Sample((_input(kind, shape, torch.float32), *geometry))
    square = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    cube = ((2, 2, 3), (2, 1, 2), (0, 1, 1), (1, 1, 1), False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for kind in ("strided", "channels last", "not a number", "nothing"):
            x = _input(kind, (1, 35, 6, 9), dtype)
            yield Sample((x, *square))
        for kind in ("contiguous", "channels last"):
            x = _input(kind, (2, 3, 4, 5, 6), dtype)
            yield Sample((x, *cube))
    x = _input("not a number", (1, 35, 6, 9), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    yield Sample((x, *square))
    x = _input("channels last", (1, 300, 4, 3), torch.float32)
    yield Sample((x, *square))
    x = _input("channels last", (2, 5, 2, 2), torch.float32)
    yield Sample((x, (2, 2), (2, 2), (0, 0), (1, 1), False))


maxpool_index = define(
    schema="maxpool_index(Tensor x, int[] kernel, int[] stride, int[] padding,"
    " int[] dilation, bool ceil_mode) -> (Tensor, Tensor)",
    reference=_maxpool,
    fake=_fake_maxpool,
    samples=_samples,
    triton="pools",
)
"""maxpool_index(x [N, C, *], kernel, stride, padding, dilation, ceil_mode) -> (values [N, C, *],
index uint8 [N, C, *]): max pooling over 1 to 3 axes as in `torch.nn.functional.max_pool2d`, equal
bit for bit, and the position of each maximum in its window. The first of equal elements counts, or
the last NaN. A window that dilation leaves without an element gives -inf and position 0. Raises
ValueError for windows of more than 256 elements."""


def _backward(grad: Tensor, index: Tensor, size: Ints, *geometry: Ints) -> Tensor:
    _check_backward(grad, index, size, *geometry)
    kernel, stride, padding, dilation = geometry
    out = grad.shape[2:]
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    axes = list(zip(size, *geometry, out, strict=True))
    reach = [max(p + n, (o - 1) * s + d * (k - 1) + 1) for n, k, s, p, d, o in axes]
    total = grad.new_zeros((*grad.shape[:2], *reach), dtype=wide)
    # An element's windows come in row-major order when its positions in them come in reverse.
    for number, position in reversed(_offsets(kernel)):
        named = torch.where(index == number, grad, 0).to(wide)
        _seen_at(total, position, out, stride, dilation).add_(named)
    inner: tuple[Any, ...] = tuple(slice(p, p + n) for n, p in zip(size, padding, strict=True))
    return _laid_out(total[(..., *inner)].to(grad.dtype), layout(index))


def _check_backward(grad: Tensor, index: Tensor, size: Ints, *geometry: Any) -> None:
    if index.dtype != torch.uint8:
        raise ValueError(f"index must be uint8: got {index.dtype}")
    if grad.shape != index.shape:
        raise ValueError(f"grad must be like index {list(index.shape)}: got {list(grad.shape)}")
    kernel, stride, padding, dilation = geometry
    fitting = [pooled_size(size, kernel, stride, padding, dilation, up) for up in (False, True)]
    if not all(o in sizes for o, *sizes in zip(grad.shape[2:], *fitting, strict=True)):
        raise ValueError(
            f"grad must be a pool of an input of {list(size)}, {fitting[0]}: got"
            f" {list(grad.shape)[2:]}"
        )


def _fake_backward(grad: Tensor, index: Tensor, size: Ints, *_: Ints) -> Tensor:
    shape, form = (*grad.shape[:2], *size), layout(index)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)


def _backward_samples() -> Iterator[Sample]:
    for sample in _samples():
        x, *geometry, _ = sample.args
        values, index = _maxpool(*sample.args)
        grad = torch.randn_like(values, memory_format=torch.contiguous_format)
        if len(x) == 2:
            grad = _laid_out(grad, layout(index))
        yield Sample((grad, index, list(x.shape[2:]), *geometry))


maxpool_index_backward = define(
    schema="maxpool_index_backward(Tensor grad, Tensor index, int[] size, int[] kernel,"
    " int[] stride, int[] padding, int[] dilation) -> Tensor",
    reference=_backward,
    fake=_fake_backward,
    samples=_backward_samples,
    triton="pools",
)
"""maxpool_index_backward(grad [N, C, *], index uint8 [N, C, *], size, kernel, stride, padding,
dilation) -> [N, C, *size]: each gradient goes to the element that its index names, 0 to those no
index names. Where windows overlap, gradients are added in the windows' row-major order, those of
half types in float32. The result lies in memory as `index` does."""
