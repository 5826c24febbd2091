"""Convolutions that keep their weight alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saliency_fast import ops
from saliency_fast.graph.autograd.winograd import pays

Sizes = int | tuple[int, ...] | list[int]
_aten = torch.ops.aten
_convolution = _aten.convolution
WIDE = 25
"""Elements of a kernel from which it outweighs a copy of what it is given."""
FEW_CHANNELS, WIDE_KERNEL = 4, 16
"""Channels of an image up to which, and places of a kernel's last axis from which oneDNN has no
fast transpose with channels innermost."""
UNFOLDS = 20480
"""Elements of one example up to which PyTorch unfolds its convolutions, for good or ill."""
_ONEDNN = bool(torch._C._has_mkldnn)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    """`aten::convolution` with its options, by oneDNN also for one small volume.

    PyTorch unfolds its input instead, which takes up to 27 times the memory and 10 to 100 times as
    long.
    """
    if _by_onednn(x) and _plain(x, weight, *options):
        stride, padding, dilation, transposed, output_padding, groups = options
        # As `aten::convolution` hands them on.
        layout = _layout(x)
        x, weight = [one.contiguous(memory_format=layout) for one in (x, weight)]
        if transposed:
            return torch.ops.mkldnn._convolution_transpose_pointwise(
                *(x, weight, bias, padding, output_padding, stride, dilation, groups),
                *("none", [], ""),
            )
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return _convolution(x, weight, bias, *options)


def _plain(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> bool:
    """Whether the sizes are such that oneDNN, which does not check them, takes them well."""
    wide = weight.shape[0] if transposed else weight.shape[1] * groups
    if weight.dim() != x.dim() or x.shape[1] != wide:
        return False
    axes = zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    )
    for size, kernel, s, p, d, o in axes:
        reach = d * (kernel - 1)
        # oneDNN fails on kernels that lie in the padding as a whole.
        if min(s, d) < 1 or not 0 <= p <= reach or o >= s:
            return False
        out = (size - 1) * s - 2 * p + reach + o if transposed else size + 2 * p - reach - 1
        if out < 0:
            return False
    return True


def _layout(x: Tensor) -> torch.memory_format:
    innermost = torch.channels_last_3d
    return innermost if x.is_contiguous(memory_format=innermost) else torch.contiguous_format


def _by_onednn(x: Tensor) -> bool:
    few = _ONEDNN and len(x) == 1 and x.dim() == 5 and x.numel() > 0
    return few and _on_cpu(x) and torch._C._get_mkldnn_enabled()


def _on_cpu(x: Tensor) -> bool:
    """Whether `x` is plain float32 in the host's memory."""
    if x.dtype != torch.float32 or type(x) is not Tensor:
        return False
    # Shapes alone answer that they are where the model's tensors would be.
    with torch._C.DisableTorchFunction():
        return x.device.type == "cpu"


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
        stride, padding, dilation, transposed, _, groups = options
        ctx.save_for_backward(weight)
        ctx.size = x.shape[2:]
        ctx.options = (stride, padding, dilation, transposed, groups)
        return convolved(x, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _transpose(grad, weight, ctx.size, *ctx.options), *(None,) * 8


def _transpose(
    grad: Tensor,
    weight: Tensor,
    size: torch.Size,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> Any:
    """The convolution's transpose, itself a convolution: unlike the backward operator it asks for
    no input, and its result has the memory format of `grad`.
    """
    extra = [0] * len(stride)
    if not transposed:
        # What the strides do not reach at the far end, so that the sizes agree.
        extra = [
            s - ((g - 1) * t - 2 * p + d * (k - 1) + 1)
            for s, g, t, p, d, k in zip(
                size, grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        ]
    options = (stride, padding, dilation, not transposed, extra, groups)
    if not transposed and _to_few(grad, weight, stride, dilation, extra, groups):
        found = _unfolded(grad, weight, stride, padding, dilation, extra)
    elif not transposed and _by_backward(grad, weight, size, groups):
        x = grad.new_empty(()).expand(len(grad), weight.shape[1], *size)
        options = (stride, padding, dilation, False, [0] * len(stride), groups)
        found, _, _ = _aten.convolution_backward(
            grad, x, weight, None, *options, [True, False, False]
        )
    else:
        found = convolved(grad, weight, None, *options)
    # Output padding may exceed the stride where the kernel is dilated, and then reach one step on.
    return found if found.shape[2:] == size else found[(..., *map(slice, size))]


def _to_few(
    grad: Tensor,
    weight: Tensor,
    stride: list[int],
    dilation: list[int],
    extra: list[int],
    groups: int,
) -> bool:
    """Whether a transpose leads to gray or coloured images, whose channels oneDNN pads to whole
    vectors, and what it unfolds instead is no larger than what it is given.
    """
    channels, size = weight.shape[1], weight[0].numel()
    if groups > 1 or channels > 3 or size > weight.shape[0] or not _on_cpu(grad):
        return False
    # Other memory formats are copied first, which single channels and large kernels outweigh.
    pays = grad.is_contiguous() or (channels == 1 and size >= WIDE)
    steps = zip(extra, stride, dilation, strict=True)
    return pays and weight.dim() in (4, 5) and all(e < max(s, d) for e, s, d in steps)


def _unfolded(
    grad: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    extra: list[int],
) -> Any:
    transpose = _aten.slow_conv_transpose2d if grad.dim() == 4 else _aten.slow_conv_transpose3d
    kernel = list(weight.shape[2:])
    return transpose(grad, weight, kernel, None, stride, padding, extra, dilation)


def _by_backward(grad: Tensor, weight: Tensor, size: torch.Size, groups: int) -> bool:
    """Whether the backward operator takes less time than the transpose, and the input that it asks
    for is small: to volumes of one channel a seventh less, to images of few channels by kernels
    that are wide a third to a hundredth, where channels lie innermost.
    """
    channels = weight.shape[1]
    if groups > 1 or channels > FEW_CHANNELS or not _on_cpu(grad):
        return False
    if weight.dim() == 4:
        return weight.shape[3] >= WIDE_KERNEL and not grad.is_contiguous()
    large = len(grad) > 1 or math.prod(size) > UNFOLDS
    return weight.dim() == 5 and channels == 1 and large


def _lean(axes: int) -> Callable[..., Any]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Any:
        alone = axes == 2 and not torch.is_grad_enabled() and input.dim() == 4 and _on_cpu(input)
        if not alone and not _served(input, weight, bias, axes):
            return NotImplemented
        steps, holes = each_axis(stride, axes), each_axis(dilation, axes)
        edges = even_edges(padding, weight, holes)
        if edges is None:
            return NotImplemented
        if alone:
            served = pays(input, weight, bias, steps, edges, holes, groups)
            return ops.winograd(input, weight, bias, edges) if served else NotImplemented
        return _Convolve.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, steps, edges, holes, False, [0] * axes, groups
        )

    return convolution


def _lean_transposed(axes: int) -> Callable[..., Any]:
    def transposed_convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Any:
        if not _served(input, weight, bias, axes):
            return NotImplemented
        steps, edges = each_axis(stride, axes), each_axis(padding, axes)
        holes, more = each_axis(dilation, axes), each_axis(output_padding, axes)
        return _Convolve.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, steps, edges, holes, True, more, groups
        )

    return transposed_convolution


def _served(x: Tensor, weight: Tensor, bias: Tensor | None, axes: int) -> bool:
    """Batches of numbers through weights that do not depend on the points."""
    moving = weight.requires_grad or (bias is not None and bias.requires_grad)
    wanted = (x.requires_grad and not moving) or _by_onednn(x)
    return x.dim() == axes + 2 and x.is_floating_point() and wanted


def even_edges(padding: Sizes | str, weight: Tensor, dilation: list[int]) -> list[int] | None:
    """A padding per axis, also of one by name; None where that differs between both sides."""
    if not isinstance(padding, str):
        return each_axis(padding, len(dilation))
    if padding == "valid":
        return [0] * len(dilation)
    sides = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(both % 2 for both in sides) else [both // 2 for both in sides]


def each_axis(value: Sizes, axes: int) -> list[int]:
    """One number per axis."""
    given = [value] if isinstance(value, int) else list(value)
    return given * axes if len(given) == 1 else given


LEAN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: _lean(1),
    torch.conv2d: _lean(2),
    torch.conv3d: _lean(3),
    torch.conv_transpose1d: _lean_transposed(1),
    torch.conv_transpose2d: _lean_transposed(2),
    torch.conv_transpose3d: _lean_transposed(3),
}
