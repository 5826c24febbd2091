"""Convolutions that keep their weight alone, and which of them have a faster call on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saliency_fast import _torch_compat as compat
from saliency_fast import ops
from saliency_fast.graph.gradients import differentiable
from saliency_fast.graph.opinfo import lean
from saliency_fast.ops.dispatch import forced, native_library
from saliency_fast.ops.winograd import CHANNELS

Ints = list[int]
Sizes = int | tuple[int, ...] | Ints
_convolution_backward = compat.backward_operator("convolution")
WIDE = 25
"""Elements of a kernel from which it outweighs a copy of its input."""
FEW_CHANNELS, WIDE_KERNEL = 4, 16
"""Channels of an image up to which, and width of a kernel from which oneDNN has no fast transpose
with channels innermost."""
UNFOLDS = 20480
"""Elements of one example up to which PyTorch unfolds its convolutions."""
WINOGRAD_TILE, WINOGRAD_FILLED = 4, 0.6
"""Width of Winograd's tiles of outputs, and the share of them that an image must fill."""
WINOGRAD_WEIGHTS = 1 << 22
"""Elements of transformed weights up to which they stay in the cache that cores share."""


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    """`aten::convolution`, by oneDNN also for one small volume, which PyTorch unfolds in up to 27
    times the memory and 10 to 100 times the time.
    """
    if not (_one_volume(x) and _plain(x, weight, *options)):
        return compat.CONVOLUTION(x, weight, bias, *options)
    stride, padding, dilation, transposed, output_padding, groups = options
    # The smaller one takes the other's format: a copy of large weights may outlast the convolution.
    leads = x if x.numel() >= weight.numel() else weight
    channels_last = leads.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x, weight = [one.contiguous(memory_format=layout) for one in (x, weight)]
    if transposed:
        geometry = (padding, output_padding, stride, dilation, groups)
        return compat.ONEDNN_TRANSPOSE(x, weight, bias, *geometry, "none", [], "")
    return compat.ONEDNN_CONVOLUTION(x, weight, bias, padding, stride, dilation, groups)


def _plain(x: Tensor, weight: Tensor, *options: Any) -> bool:
    """Whether the sizes are such that oneDNN, which does not check them, takes them well."""
    stride, padding, dilation, transposed, output_padding, groups = options
    wide = weight.shape[0] if transposed else weight.shape[1] * groups
    if weight.dim() != x.dim() or x.shape[1] != wide:
        return False
    geometry = (x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding)
    for size, kernel, s, p, d, o in zip(*geometry, strict=True):
        reach = d * (kernel - 1)
        # oneDNN fails on kernels that lie in the padding as a whole.
        if min(s, d) < 1 or not 0 <= p <= reach or o >= s:
            return False
        out = (size - 1) * s - 2 * p + reach + o if transposed else size + 2 * p - reach - 1
        if out < 0:
            return False
    return True


def _one_volume(x: Tensor) -> bool:
    few = compat.HAS_ONEDNN and len(x) == 1 and x.dim() == 5 and x.numel() > 0
    return few and on_cpu(x) and compat.onednn_enabled()


def on_cpu(x: Tensor) -> bool:
    """Whether `x` is plain float32 in the host's memory."""
    if x.dtype != torch.float32 or type(x) is not Tensor:
        return False
    # Under `model.meta`, tensors without memory name the device of the model's.
    with compat.WithoutFunctionModes():
        return x.device.type == "cpu"


def _transpose(grad: Tensor, weight: Tensor, size: torch.Size, *options: Any) -> Any:
    """The convolution's transpose by a convolution, which asks for no input."""
    stride, padding, dilation, transposed, groups = options
    extra = [0] * len(stride)
    if not transposed:
        # What the strides do not reach at the far end, so that the sizes agree.
        geometry = (size, grad.shape[2:], stride, padding, dilation, weight.shape[2:])
        extra = [
            s - ((g - 1) * t - 2 * p + d * (k - 1) + 1)
            for s, g, t, p, d, k in zip(*geometry, strict=True)
        ]
    if not transposed and _to_few(grad, weight, stride, dilation, extra, groups):
        kernel = list(weight.shape[2:])
        found = compat.UNFOLDED_TRANSPOSES[grad.dim()](
            grad, weight, kernel, None, stride, padding, extra, dilation
        )
    elif not transposed and _by_backward(grad, weight, size, groups):
        x = grad.new_empty(()).expand(len(grad), weight.shape[1], *size)
        about = (stride, padding, dilation, False, [0] * len(stride), groups)
        found = _convolution_backward(grad, x, weight, None, *about, [True, False, False])[0]
    else:
        about = (stride, padding, dilation, not transposed, extra, groups)
        found = convolved(grad, weight, None, *about)
    # Output padding may exceed the stride where the kernel is dilated, and then reach one step on.
    return found if found.shape[2:] == size else found[(..., *map(slice, size))]


def _to_few(
    grad: Tensor, weight: Tensor, stride: Ints, dilation: Ints, extra: Ints, groups: int
) -> bool:
    """Whether unfolding is faster: to gray or coloured images, whose channels oneDNN pads."""
    channels, size = weight.shape[1], weight[0].numel()
    if groups > 1 or channels > 3 or size > weight.shape[0] or not on_cpu(grad):
        return False
    # Other memory formats are copied first, which single channels and large kernels outweigh.
    pays = grad.is_contiguous() or (channels == 1 and size >= WIDE)
    steps = zip(extra, stride, dilation, strict=True)
    return pays and weight.dim() in (4, 5) and all(e < max(s, d) for e, s, d in steps)


def _by_backward(grad: Tensor, weight: Tensor, size: torch.Size, groups: int) -> bool:
    """Whether the backward operator takes less time than the transpose: a seventh less to volumes
    of one channel, a third to a hundredth to channels-last images of few channels by wide kernels.
    """
    channels = weight.shape[1]
    if groups > 1 or channels > FEW_CHANNELS or not on_cpu(grad):
        return False
    if weight.dim() == 4:
        return weight.shape[3] >= WIDE_KERNEL and not grad.is_contiguous()
    large = len(grad) > 1 or math.prod(size) > UNFOLDS
    return weight.dim() == 5 and channels == 1 and large


def convolution_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, *geometry: Any
) -> Any:
    """ReLU of a convolution, plus `added` like its result: one call where the library has one, and
    for the backward pass one bit per element, read from the result.

    geometry: stride, padding and dilation, a number per axis, and groups.
    """
    size, layout = x.shape[2:], dense_format(x)
    channels_last = False

    def run(x: Tensor, *added: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        nonlocal channels_last
        y = _with_relu(x, weight, bias, added[0] if added else None, *geometry)
        channels_last = not y.is_contiguous()
        return y, (ops.pack_mask(y), weight)

    def back(grad: Tensor, mask: Tensor, weight: Tensor) -> Any:
        passed, _ = ops.relu_mask_backward(grad, mask, None, 0.0, "standard", False, channels_last)
        about = (*geometry[:3], False, geometry[3])
        found = _transpose(passed.contiguous(memory_format=layout), weight, size, *about)
        return found if added is None else (found, passed)

    if not torch.is_grad_enabled():
        return _with_relu(x, weight, bias, added, *geometry)
    return differentiable(x, run, back, *(() if added is None else (added,)))


def _with_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, *geometry: Any
) -> Tensor:
    """The call of the library, and on other devices the three calls that it stands for."""
    if compat.cudnn_fuses(x):
        return compat.cudnn_convolution_relu(x, weight, bias, added, *geometry)
    stride, padding, dilation, groups = geometry
    y = convolved(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    found: Tensor = (y if added is None else y.add_(added)).relu_()
    return found


def winograd_pays(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> bool:
    """Whether a convolution of float32 images on the CPU is faster by `ops.winograd`.

    Shapes of one image decide, so that the rows of a launch do not, nor any timing. geometry:
    stride, padding, dilation, groups.
    """
    stride, padding, dilation, groups = geometry
    if weight.shape[2:] != (3, 3) or groups != 1 or max(*stride, *dilation) > 1:
        return False
    out, channels = weight.shape[:2]
    if out % CHANNELS or channels % CHANNELS or x.shape[1] != channels:
        return False
    if (WINOGRAD_TILE + 2) ** 2 * out * channels > WINOGRAD_WEIGHTS or not winograd_built():
        return False
    if any(one is not None and one.dtype != torch.float32 for one in (weight, bias)):
        return False
    sizes = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    tiles = math.prod(-(-size // WINOGRAD_TILE) for size in sizes)
    filled = math.prod(sizes) / max(1, tiles * WINOGRAD_TILE**2)
    return bool(min(sizes) > 0 and min(padding) >= 0 and filled >= WINOGRAD_FILLED)


@cache
def winograd_built() -> bool:
    """Whether the C++ version runs here, on instructions for which it is made."""
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return capable and native_library() is not None and forced() in (None, "native")


def _lean(axes: int, *, transposes: bool) -> Callable[..., Any]:
    rest = "output_padding groups dilation" if transposes else "dilation groups"
    names = f"stride padding {rest}".split()
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}

    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any, **named: Any
    ) -> Any:
        scores = axes == 2 and not transposes and not torch.is_grad_enabled()
        scores = scores and input.dim() == 4 and on_cpu(input)
        if not scores and not _served(input, weight, bias, axes):
            return NotImplemented
        options = defaults | dict(zip(names, given, strict=False)) | named
        axial = ("stride", "dilation", "output_padding")
        stride, dilation, more = [each_axis(options[one], axes) for one in axial]
        padding, groups = even_edges(options["padding"], weight, dilation), options["groups"]
        if padding is None:
            return NotImplemented
        if scores:
            served = winograd_pays(input, weight, bias, stride, padding, dilation, groups)
            return ops.winograd(input, weight, bias, padding) if served else NotImplemented
        geometry, size = (stride, padding, dilation, transposes), input.shape[2:]
        layout = dense_format(input)

        def back(grad: Tensor, weight: Tensor) -> Any:
            # Steps before this one, such as PyTorch's gradient of SiLU, take up to five times as
            # long where their input and its gradient lie differently.
            return _transpose(
                grad.contiguous(memory_format=layout), weight, size, *geometry, groups
            )

        return differentiable(
            input, lambda x: (convolved(x, weight, bias, *geometry, more, groups), (weight,)), back
        )

    return convolution


for _axes in (1, 2, 3):
    lean(getattr(torch, f"conv{_axes}d"))(_lean(_axes, transposes=False))
    lean(getattr(torch, f"conv_transpose{_axes}d"))(_lean(_axes, transposes=True))


def dense_format(x: Tensor) -> torch.memory_format:
    """Channels last where a batch of images or volumes lies so and not otherwise, else plain."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def _served(x: Tensor, weight: Tensor, bias: Tensor | None, axes: int) -> bool:
    """Batches of numbers through weights that do not depend on the points."""
    moving = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (weight, bias)
    )
    wanted = (x.requires_grad or _one_volume(x)) and not moving
    return x.dim() == axes + 2 and x.is_floating_point() and wanted


def even_edges(padding: Sizes | str, weight: Tensor, dilation: Ints) -> Ints | None:
    """A padding per axis, also of one by name; None where that differs between both sides."""
    if not isinstance(padding, str):
        return each_axis(padding, len(dilation))
    if padding == "valid":
        return [0] * len(dilation)
    sides = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(both % 2 for both in sides) else [both // 2 for both in sides]


def each_axis(value: Sizes, axes: int) -> Ints:
    """One number per axis."""
    given = [value] if isinstance(value, int) else list(value)
    return given * axes if len(given) == 1 else given
