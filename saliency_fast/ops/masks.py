"""Masks: rectifiers that keep one bit per element for their backward, in one pass.

A mask is uint8 [ceil(numel / 8)]: bit i % 8 (little end first) of byte i // 8 belongs to element i
in memory order; padding bits are 0. Tensors stay contiguous or channels_last, whichever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from saliency_fast.ops.registry import Sample, define

OptTensor = Tensor | None
RULES = ("standard", "guided", "deconv")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> torch.memory_format | None:
    """The memory format in which x is dense, contiguous or channels_last; None for others."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST.get(x.dim())
    return last if last and x.is_contiguous(memory_format=last) else None


def dense(x: Tensor) -> Tensor:
    """The tensor itself where it is contiguous or channels_last, else a contiguous copy."""
    return x.contiguous() if layout_of(x) is None else x


def layout_named(x: Tensor, channels_last: bool) -> torch.memory_format:
    """The memory format that `channels_last` names for a tensor like x."""
    if not channels_last:
        return torch.contiguous_format
    if x.dim() not in _CHANNELS_LAST:
        raise ValueError(f"channels_last needs 4 or 5 dimensions: got {tuple(x.shape)}")
    return _CHANNELS_LAST[x.dim()]


def _check_rectifier(slope: float, upper: float) -> None:
    """Refuses slopes and bounds whose gradient one bit per element cannot hold."""
    if not math.isfinite(slope) or not upper > 0:
        raise ValueError(
            f"slope must be finite and upper greater than 0: got slope {slope}, upper {upper}"
        )
    if slope != 0 and math.isfinite(upper):
        raise ValueError(
            f"slope must be 0 where upper is finite: got slope {slope}, upper {upper}; "
            "one bit cannot tell the two sides apart"
        )


def check_forward(
    x: Tensor, scale: OptTensor, shift: OptTensor, residual: OptTensor, slope: float, upper: float
) -> None:
    """Refuses rectifiers without a mask, and parts of z that do not fit x."""
    _check_rectifier(slope, upper)
    least = 1 if scale is None else 2
    if x.dim() < least or x.dtype not in DTYPES:
        raise ValueError(
            f"x must have {least} dimensions or more and be one of {', '.join(map(str, DTYPES))}:"
            f" got {tuple(x.shape)} {x.dtype}"
        )
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together: got one of them; pass both or neither")
    parts = [(n, t, x.shape[1:2]) for n, t in (("scale", scale), ("shift", shift))]
    for name, part, shape in (*parts, ("residual", residual, x.shape)):
        if part is not None and (part.shape != shape or part.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {tuple(shape)} {x.dtype}: got {tuple(part.shape)} {part.dtype}"
            )


def check_backward(grad: Tensor, mask: Tensor, scale: OptTensor, slope: float, rule: str) -> None:
    """Refuses unknown rules, and a mask that is not one of grad's elements."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}: got {rule!r}")
    check_forward(grad, scale, scale, None, slope, math.inf)
    size = (grad.numel() + 7) // 8
    if mask.dim() != 1 or mask.numel() != size or mask.dtype != torch.uint8:
        raise ValueError(f"mask must be uint8 [{size}]: got {mask.dtype} {tuple(mask.shape)}")


def check_in_place(x: Tensor) -> None:
    if layout_of(x) is None:
        raise ValueError(
            f"x is changed in place and must be contiguous or channels_last: got strides "
            f"{x.stride()} for shape {tuple(x.shape)}; call relu_mask"
        )


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize == 2 else t


def _per_channel(t: Tensor, width: int) -> Tensor:
    """[C] so that it broadcasts against [N, C, *] of `width` dimensions."""
    return _widened(t).view(1, -1, *(1,) * (width - 2))


def _packed(flags: Tensor) -> Tensor:
    ordered = flags if flags.is_contiguous() else flags.movedim(1, -1)
    bits = torch.nn.functional.pad(ordered.flatten(), (0, -flags.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=flags.device)).sum(1).to(torch.uint8)


def _unpacked(mask: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    bits = (mask[:, None] >> torch.arange(8, device=mask.device)).bitwise_and(1).bool()
    shape = like.movedim(1, -1).shape if channels_last else like.shape
    flags = bits.flatten()[: like.numel()].view(shape)
    return flags.movedim(-1, 1) if channels_last else flags


def _relu_mask(
    x: Tensor, scale: OptTensor, shift: OptTensor, residual: OptTensor, slope: float, upper: float
) -> tuple[Tensor, Tensor]:
    check_forward(x, scale, shift, residual, slope, upper)
    x = dense(x)
    z = _widened(x)
    if scale is not None and shift is not None:
        z = _per_channel(scale, x.dim()) * z + _per_channel(shift, x.dim())
    if residual is not None:
        z = z + _widened(residual)
    low = z <= 0  # false for NaN, which passes through and sets its bit
    y = torch.where(low, torch.zeros_like(z) if slope == 0 else slope * z, z)
    high = torch.zeros_like(low)
    if math.isfinite(upper):  # else there is no bound, and +inf is below it
        bound = torch.full_like(z, upper)
        high = z >= bound
        y = torch.where(high, bound, y)
    flags = torch.empty_like(x, dtype=torch.bool).copy_(~(low | high))
    return torch.empty_like(x).copy_(y), _packed(flags)


def _relu_mask_(x: Tensor, *options: Any) -> Tensor:
    check_in_place(x)
    y, mask = _relu_mask(x, *options)
    x.copy_(y)
    return mask


def _backward(grad: Tensor, mask: Tensor, scale: OptTensor, *options: Any) -> tuple[Tensor, Tensor]:
    slope, rule, both, channels_last = options
    check_backward(grad, mask, scale, slope, rule)
    layout = layout_named(grad, channels_last)
    wide, flags = _widened(grad), _unpacked(mask, grad, channels_last)
    zero = torch.zeros_like(wide)
    positive = torch.where(wide <= 0, zero, wide)
    if rule == "standard":
        m = torch.where(flags, wide, zero if slope == 0 else slope * wide)
    else:
        m = positive if rule == "deconv" else torch.where(flags, positive, zero)
    scaled = m if scale is None else _per_channel(scale, grad.dim()) * m

    def finished(t: Tensor) -> Tensor:
        return torch.empty_like(grad, memory_format=layout).copy_(t)

    second = finished(m) if both and scale is not None else grad.new_empty(0)
    return finished(scaled), second


def _pack_mask(flags: Tensor) -> Tensor:
    if flags.dtype not in (torch.bool, *DTYPES):
        raise ValueError(f"flags must be bool or floating point: got {flags.dtype}")
    return _packed(dense(flags) != 0)


def empty_mask(x: Tensor, *_: object) -> Tensor:
    """An unwritten mask of the elements of x."""
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    kept = torch.preserve_format if layout_of(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=kept), empty_mask(x)


def _fake_backward(
    grad: Tensor, mask: Tensor, scale: OptTensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _, _, both, channels_last = options
    layout = layout_named(grad, channels_last)
    first = torch.empty_like(grad, memory_format=layout)
    second = torch.empty_like(first) if both and scale is not None else grad.new_empty(0)
    return first, second


_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "contiguous": (
        *((1,), (13,), (3, 1027), (2, 3, 7), (2, 5, 9, 7), (2, 6, 40, 41), (2, 3, 4, 3, 5)),
        *((3, 1, 5, 7), (0, 3, 4, 4)),
    ),
    "channels_last": ((2, 5, 9, 7), (2, 16, 3, 5), (2, 6, 40, 41), (2, 3, 4, 3, 5), (3, 1, 5, 7)),
    "strided": ((2, 5, 9, 7), (3, 19)),
}
_LAYOUTS = tuple((shape, layout) for layout, shapes in _SHAPES.items() for shape in shapes)
_RECTIFIERS = ((0.0, math.inf), (0.01, math.inf), (0.0, 6.0))
_SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 6.0, -1.0, 1e-30)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.mT.contiguous().mT if layout == "strided" else x


def _values(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    return _laid_out((4 * torch.randn(shape)).to(dtype), layout)


def _special(dtype: torch.dtype) -> Tensor:
    """Every pair of special numbers, in some order, at an odd size."""
    pairs = torch.tensor(list(product(_SPECIAL, _SPECIAL)) + [(1.0, 2.0)] * 11)
    return pairs.to(dtype).T.reshape(2, 1, 5, 15).repeat(1, 3, 1, 1)


def _forward_samples() -> Iterator[Sample]:
    number = 0
    for (shape, layout), (scaled, added) in product(_LAYOUTS, product((False, True), repeat=2)):
        if scaled and len(shape) == 1:
            continue
        dtype = DTYPES[(number + number // 4) % 4]
        slope, upper = _RECTIFIERS[number % 3]
        number += 1
        x = _values(shape, layout, dtype)
        channels = torch.randn(2, shape[1]).to(dtype) if scaled else (None, None)
        # A residual in another layout than x every other time.
        residual = _values(shape, layout if number % 2 else "contiguous", dtype) if added else None
        yield Sample((x, *channels, residual, slope, upper))
    for dtype, (slope, upper) in product(DTYPES, _RECTIFIERS):
        x, residual = _special(dtype)[:1], _special(dtype)[1:]
        scale, shift = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.5, 3.0]]).to(dtype)
        yield Sample((x, None, None, None, slope, upper))
        yield Sample((x, scale, shift, residual, slope, upper))
    x, channels = _values((2, 8, 3, 5), "channels_last", torch.float32), torch.randn(8, 2)
    yield Sample((x, channels[:, 0], channels[:, 1], None, 0.0, math.inf))


def _in_place_samples() -> Iterator[Sample]:
    return (sample for sample in _forward_samples() if layout_of(sample.args[0]) is not None)


def _backward_samples() -> Iterator[Sample]:
    number = 0
    for (shape, layout), rule in product(_LAYOUTS, RULES):
        for scaled, both in ((False, True), (True, False), (True, True)):
            if scaled and len(shape) == 1:
                continue
            dtype = DTYPES[(number + number // 4) % 4]
            number += 1
            grad = _values(shape, layout, dtype)
            mask = _packed(torch.rand(shape) < 0.5)
            scale = torch.randn(shape[1]).to(dtype) if scaled else None
            # Gradients come in another layout than the mask's every third time.
            last = len(shape) in _CHANNELS_LAST and (layout == "channels_last") != (number % 3 == 0)
            slope = 0.2 * (number % 2)
            yield Sample((grad, mask, scale, slope, rule, both, last))
    for dtype, rule, slope in product(DTYPES, RULES, (0.0, 0.01)):
        grad, scale = _special(dtype), torch.tensor([1.0, -2.0, 0.5]).to(dtype)
        mask = _packed(torch.rand(grad.shape) < 0.5)
        yield Sample((grad, mask, scale, slope, rule, True, False))


def _pack_samples() -> Iterator[Sample]:
    for shape, layout in _LAYOUTS:
        flags = _laid_out(torch.rand(shape) < 0.5, layout)
        yield Sample((flags,))
    for full in (True, False):
        yield Sample((torch.full((3, 11), full),))
    for number, (shape, layout) in enumerate(_LAYOUTS):
        yield Sample((_values(shape, layout, DTYPES[number % 4]).relu(),))
    for dtype in DTYPES:
        yield Sample((_special(dtype),))


_FORWARD = "Tensor? scale, Tensor? shift, Tensor? residual, float slope, float upper"

relu_mask = define(
    schema=f"relu_mask(Tensor x, {_FORWARD}) -> (Tensor, Tensor)",
    reference=_relu_mask,
    fake=_fake,
    samples=_forward_samples,
    triton="masks",
    cuda=True,
)
"""relu_mask(x [N, C, *], scale [C] | None, shift [C] | None, residual like x | None, slope, upper)
-> (y like x, mask): z = scale x + shift + residual (x may be [*] without scale), and y = z where
0 < z < upper, slope z where z <= 0, upper above. The mask tells where 0 < z < upper or z is NaN;
upper inf is no bound, so that +inf counts as within. x that is neither contiguous nor channels_last
is copied. Raises where slope != 0 meets a finite upper."""

relu_mask_ = define(
    schema=f"relu_mask_(Tensor(a!) x, {_FORWARD}) -> Tensor",
    reference=_relu_mask_,
    fake=empty_mask,
    samples=_in_place_samples,
    triton="masks",
    cuda=True,
)
"""relu_mask_(x, ...) -> mask: `relu_mask` that writes y over x, which must be contiguous or
channels_last."""

relu_mask_backward = define(
    schema="relu_mask_backward(Tensor grad, Tensor mask, Tensor? scale, float slope, str rule,"
    " bool both, bool channels_last) -> (Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    samples=_backward_samples,
    triton="masks",
    cuda=True,
)
"""relu_mask_backward(grad [N, C, *], mask, scale [C] | None, slope, rule, both, channels_last) ->
(scale m, m): m is the gradient of z by one of three rules. "standard": grad where the bit is set,
else slope grad; "guided": max(grad, 0) where it is, else 0 (Springenberg, 2015); "deconv":
max(grad, 0) everywhere (Zeiler, 2014). The second result is empty [0] without `both` or without
scale, where it would repeat the first. Results have the layout of the mask's bits."""

pack_mask = define(
    schema="pack_mask(Tensor flags) -> Tensor",
    reference=_pack_mask,
    fake=empty_mask,
    samples=_pack_samples,
    triton="masks",
    cuda=True,
)
"""pack_mask(flags [*]) -> mask, in memory order, of flags that are True or of numbers other than 0,
NaN included; what is neither contiguous nor channels_last is made contiguous."""
