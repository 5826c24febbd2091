"""Local calls: which part of its operands a part of a result needs, and what it is on crops.

A value [R, C, *spatial] is cut along its spatial axes. A call is local where any box of its result
needs only boxes of its operands: convolutions, pools, upsampling, elementwise and channel-wise
calls. `tiles` runs them on crops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from saliency_fast.graph.autograd.convolutions import each_axis
from saliency_fast.graph.passes.fuse_relu import rectified
from saliency_fast.graph.program import Ref, Step, Value

Span = tuple[int, int]
Box = tuple[Span, ...]
Values = Mapping[int, Value]
_nn = torch._C._nn


@dataclass(frozen=True)
class Window:
    """What output o sees along one axis: inputs o * stride - before to `reach` places further.

    spread: the other way round, input i is seen by outputs i * stride - before and on; the call
    on a crop from i begins at i * stride - origin. after: padding behind the input.
    """

    stride: int = 1
    before: int = 0
    reach: int = 0
    after: int = 0
    spread: bool = False
    origin: int = 0

    def sees(self, out: Span) -> Span:
        """The inputs that outputs need; some may lie outside of the input."""
        return self._apart(out) if self.spread else self._along(out)

    def reaches(self, seen: Span) -> Span:
        """The outputs that inputs have a part in; some may lie outside of the output."""
        return self._along(seen) if self.spread else self._apart(seen)

    def _along(self, span: Span) -> Span:
        first = span[0] * self.stride - self.before
        return first, (span[1] - 1) * self.stride - self.before + self.reach + 1

    def _apart(self, span: Span) -> Span:
        near, far = span[0] + self.before, span[1] - 1 + self.before
        # Where strides jump over places, the last window before them stands in.
        first = min(-((self.reach - near) // self.stride), near // self.stride)
        return first, far // self.stride + 1


@dataclass(frozen=True)
class Local:
    """A step on crops: `func` of `args`, whose values are crops and whose padding is none.

    fill: what the step's own padding holds. padding: the place in `args` that takes padding alike
    on both sides. constants: tensors among the arguments are broadcast, and cropped with the rest.
    keeps: what autograd keeps: nothing, bits, bytes, output or operands. view: the result shares
    its operand's memory.
    """

    windows: tuple[Window, ...]
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fill: float | None = None
    padding: int | None = None
    constants: bool = False
    keeps: str = "nothing"
    view: bool = False

    def sees(self, out: Box, size: Sequence[int]) -> Box:
        """The box of operands of `size` that a box of the result needs; never empty."""
        found = []
        for window, span, length in zip(self.windows, out, size, strict=True):
            first, stop = window.sees(span)
            first = min(max(first, 0), length - 1)
            found.append((first, max(min(stop, length), first + 1)))
        return tuple(found)

    def reaches(self, seen: Box, size: Sequence[int]) -> Box | None:
        """The box of a result of `size` that a box of an operand has a part in."""
        spans = [window.reaches(span) for window, span in zip(self.windows, seen, strict=True)]
        box = tuple((max(a, 0), min(b, n)) for (a, b), n in zip(spans, size, strict=True))
        return box if all(a < b for a, b in box) else None

    def made(self, seen: Box, sizes: Sequence[int]) -> Box:
        """The box of the result, of `sizes`, that a spread call makes of the operands' box."""
        spans = zip(self.windows, seen, sizes, strict=True)
        starts = [(first * window.stride - window.origin, n) for window, (first, _), n in spans]
        return tuple((start, start + n) for start, n in starts)

    def pads(self, out: Box, seen: Box, size: Sequence[int]) -> tuple[list[int], list[Span]]:
        """How far windows look beyond the box of operands, into padding: what the call itself adds
        on both sides, and what it does not.
        """
        alike, pads = [], []
        for window, span, (first, stop), length in zip(self.windows, out, seen, size, strict=True):
            start, end = window.sees(span)
            ahead, behind = first - start, min(end, length + window.after) - stop
            both = max(0, min(ahead, behind)) if self.padding is not None else 0
            alike.append(both)
            pads.append((0, 0) if self.fill is None else (ahead - both, behind - both))
        return alike, pads


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around boxes."""
    axes = zip(*boxes, strict=True)
    return tuple((min(a for a, _ in spans), max(b for _, b in spans)) for spans in axes)


def leaves(template: Any) -> list[Ref | Tensor]:
    """The values and tensors among arguments, in order."""
    return [one for one in tree_leaves(template) if isinstance(one, (Ref, Tensor))]


def rule_of(step: Step, values: Values) -> Local | None:
    """How a step runs on crops, None where it is not local or not known to be."""
    maker = _MAKERS.get(step.func)
    moving = varying(step, values)
    if maker is None or step.detached or not (moving and step.args and step.outputs):
        return None
    # What works in place runs out of place: a crop may be a view of what others still need.
    if step.changed not in ((), ((moving[0], step.outputs[0]),)) or "out" in step.kwargs:
        return None
    shapes = [values[number] for number in (*step.outputs, *moving)]
    rank = len(shapes[0].shape)
    if rank < 3 or any(len(one.shape) != rank or not one.rowwise for one in shapes):
        return None
    return maker(step, values)


def varying(step: Step, values: Values) -> list[int]:
    """The operands that depend on the points, as often as they are named."""
    named = [one for one in leaves((step.args, step.kwargs)) if isinstance(one, Ref)]
    return [one.number for one in named if values[one.number].varying]


def _bound(step: Step, names: str, **given: Any) -> dict[str, Any]:
    """A step's arguments by name; `given` where it names none."""
    return {**given, **dict(zip(names.split(), step.args, strict=False)), **step.kwargs}


def _alone(step: Step, values: Values, axes: int = 0) -> bool:
    """Whether the first argument alone depends on the points, and has so many spatial axes."""
    first = step.args[0] if step.args else None
    if not isinstance(first, Ref) or varying(step, values) != [first.number]:
        return False
    return axes in (0, len(values[first.number].shape) - 2)


def _about(one: Ref | Tensor, values: Values) -> Value:
    """What is known of an argument."""
    if isinstance(one, Ref):
        return values[one.number]
    return Value(tuple(one.shape), one.dtype, False, False, -1)


def _convolution(step: Step, values: Values, axes: int) -> Local | None:
    names = "input weight bias stride padding dilation groups"
    given = _bound(step, names, bias=None, stride=1, padding=0, dilation=1, groups=1)
    if not _alone(step, values, axes):
        return None
    strides, holes = each_axis(given["stride"], axes), each_axis(given["dilation"], axes)
    kernel = _about(given["weight"], values).shape[2:]
    reaches = [d * (k - 1) for d, k in zip(holes, kernel, strict=True)]
    before = after = [0] * axes
    if given["padding"] == "same":
        before, after = [reach // 2 for reach in reaches], [(reach + 1) // 2 for reach in reaches]
    elif given["padding"] != "valid":
        before = after = each_axis(given["padding"], axes)
    windows = tuple(map(Window, strides, before, reaches, after))
    operands = (step.args[0], given["weight"], given["bias"])
    args = (*operands, strides, [0] * axes, holes, given["groups"])
    return Local(windows, step.func, args, fill=0.0, padding=4)


def _transposed(step: Step, values: Values, axes: int) -> Local | None:
    names = "input weight bias stride padding output_padding groups dilation"
    ones = {"stride": 1, "dilation": 1, "groups": 1}
    given = _bound(step, names, bias=None, padding=0, output_padding=0, **ones)
    if not _alone(step, values, axes):
        return None
    options = [each_axis(given[name], axes) for name in names.split()[3:6]]
    holes, kernel = each_axis(given["dilation"], axes), _about(given["weight"], values).shape[2:]
    windows, extra = [], []
    for s, p, more, d, k in zip(*options, holes, kernel, strict=True):
        windows.append(Window(s, p, d * (k - 1), spread=True, origin=p))
        # Places behind the last window, which hold the bias alone.
        extra.append(max(0, more - p, s - 1 - d * (k - 1)))
    operands = (step.args[0], given["weight"], given["bias"])
    args = (*operands, options[0], [0] * axes, extra, given["groups"], holes)
    return Local(tuple(windows), step.func, args)


def _pool(step: Step, values: Values, axes: int, greatest: bool) -> Local | None:
    own = "dilation ceil_mode" if greatest else "ceil_mode count_include_pad divisor_override"
    names = f"input kernel_size stride padding {own}"
    plain = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = _bound(step, names, count_include_pad=True, divisor_override=None, **plain)
    kernel, before = each_axis(given["kernel_size"], axes), each_axis(given["padding"], axes)
    if not _alone(step, values, axes) or (any(before) and not given["count_include_pad"]):
        return None
    strides = each_axis(given["stride"], axes) if given["stride"] not in (None, []) else kernel
    holes = each_axis(given["dilation"], axes)
    reaches = [d * (k - 1) for d, k in zip(holes, kernel, strict=True)]
    tail = (given["ceil_mode"], True, given["divisor_override"])[: 2 if axes == 1 else 3]
    after, fill, keeps = before, 0.0, "nothing"
    if greatest:
        # Full windows also where the call rounds up: what they see there is never the greatest.
        tail, after = (holes, False), [2 * reach + 1 for reach in reaches]
        fill, keeps = -math.inf, "bytes"
    windows = tuple(map(Window, strides, before, reaches, after))
    args = (step.args[0], kernel, strides, [0] * axes, *tail)
    return Local(windows, step.func, args, fill=fill, padding=3, keeps=keeps)


def _upsampled(step: Step, values: Values, axes: int, linear: bool) -> Local | None:
    names = f"input output_size {'align_corners' if linear else ''} scale_factors"
    given = _bound(step, names, output_size=None, align_corners=False, scale_factors=None)
    if not _alone(step, values, axes) or given["align_corners"]:
        return None
    sizes = [values[one].shape[2:] for one in (step.args[0].number, step.outputs[0])]
    factors = [out // own for own, out in zip(*sizes, strict=True)]
    exact = all(own * f == out for own, out, f in zip(*sizes, factors, strict=True))
    if not exact or list(given["scale_factors"] or factors) != factors:
        return None
    windows = [Window(f, 0, f - 1, spread=True) for f in factors]
    if linear:
        # Outputs that lie less than one input away from an input, on both of its sides.
        windows = [Window(f, f // 2, f // 2 + (3 * f) // 2 - 1, spread=True) for f in factors]
    scales = [float(f) for f in factors]
    args = (step.args[0], None, *([False] if linear else []), scales)
    return Local(tuple(windows), step.func, args)


def _shuffled(step: Step, values: Values, up: bool) -> Local | None:
    if not _alone(step, values, 2) or len(step.args) != 2 or type(step.args[1]) is not int:
        return None
    window = Window(step.args[1], 0, step.args[1] - 1, spread=up)
    return Local((window, window), step.func, step.args)


def _padded(step: Step, values: Values) -> Local | None:
    given = _bound(step, "input pad mode value", mode="constant", value=None)
    axes, pads = len(values[step.outputs[0]].shape) - 2, list(given["pad"])
    if given["mode"] != "constant" or any(pads[2 * axes :]) or not _alone(step, values):
        return None
    pads += [0] * (2 * axes - len(pads))
    pairs = [(pads[2 * axis], pads[2 * axis + 1]) for axis in reversed(range(axes))]
    windows = tuple(Window(1, before, 0, after) for before, after in pairs)
    return Local(windows, Tensor.contiguous, (step.args[0],), fill=given["value"] or 0.0)


def _indexed(step: Step, values: Values) -> Local | None:
    """Slices of channels and of space."""
    key = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    slices = [one for one in key if isinstance(one, slice)]
    ends = [end for one in slices for end in (one.start, one.stop, one.step) if end is not None]
    dots = sum(one is ... for one in key)
    whole = not any(type(end) is not int for end in ends) and len(slices) + dots == len(key)
    if not whole or dots > 1 or not _alone(step, values):
        return None
    shape = values[step.args[0].number].shape
    place = next((at for at, one in enumerate(key) if one is ...), len(key))
    middle = [slice(None)] * (len(shape) - len(slices))
    spans = [*key[:place], *middle, *key[place + 1 :]]
    if spans[0] != slice(None):
        return None
    cut = [span.indices(length) for span, length in zip(spans, shape, strict=True)][2:]
    windows = tuple(Window(stride, -start) for start, _, stride in cut)
    index = (*spans[:2], *(slice(None, None, stride) for _, _, stride in cut))
    return Local(windows, step.func, (step.args[0], index), view=True)


def _pointwise(step: Step, values: Values, func: Callable[..., Any], keeps: str) -> Local | None:
    """A call whose result has at each place what its operands have there."""
    made, moving = values[step.outputs[0]], varying(step, values)
    given = [_about(one, values) for one in leaves((step.args, step.kwargs))]
    alike = all(values[one].shape[2:] == made.shape[2:] for one in moving)
    if not alike or not all(_broadcasts(one, made.shape) for one in given):
        return None
    if step.changed and any(one.shape and one.dtype != made.dtype for one in given):
        return None
    windows = (Window(),) * (len(made.shape) - 2)
    view = keeps == "view"
    if view or (keeps == "factors" and len(moving) == 1):
        keeps = "nothing"
    return Local(windows, func, step.args, step.kwargs, constants=True, keeps=keeps, view=view)


def _broadcasts(one: Value, shape: tuple[int, ...]) -> bool:
    """Whether an operand of a result of `shape` lies on its places, or is alike on an axis."""
    ahead = len(shape) - len(one.shape)
    if ahead < 0 or (ahead > 0 and one.rowwise):
        return False
    spatial = zip(one.shape[max(0, 2 - ahead) :], shape[max(2, ahead) :], strict=True)
    return all(own in (1, out) for own, out in spatial)


def _channelwise(
    step: Step, values: Values, func: Any, place: int, default: Any, keeps: str
) -> Local | None:
    """A call along the channels."""
    dim = step.kwargs.get("dim", step.args[place] if len(step.args) > place else default)
    rank = len(values[step.outputs[0]].shape)
    if (list(dim) if isinstance(dim, (tuple, list)) else [dim]) not in ([1], [1 - rank]):
        return None
    return _pointwise(step, values, func, keeps)


def _dropout(step: Step, values: Values, func: Callable[..., Any]) -> Local | None:
    training = _bound(step, "input p train", train=True)["train"]
    return None if training else _pointwise(step, values, func, "view")


def _parametric(step: Step, values: Values, keeps: str) -> Local | None:
    """A frozen batch normalisation or a PReLU: parameters lie along the channels."""
    names = "input weight bias running_mean running_var training"
    if not _alone(step, values) or _bound(step, names, training=False)["training"]:
        return None
    windows = (Window(),) * (len(values[step.outputs[0]].shape) - 2)
    return Local(windows, step.func, step.args, step.kwargs, keeps=keeps)


def _rectified(step: Step, values: Values) -> Local | None:
    named = [one.number for one in (step.args[0], step.args[2]) if isinstance(one, Ref)]
    if varying(step, values) != named or len({values[one].shape for one in named}) > 1:
        return None
    windows = (Window(),) * (len(values[step.outputs[0]].shape) - 2)
    return Local(windows, rectified, (*step.args[:5], False), keeps="bits")


_POINTWISE = {
    "nothing": "add sub subtract rsub neg negative clone to float double half bfloat16 type_as",
    "view": "contiguous",
    "bits": "relu relu6 leaky_relu hardtanh clamp threshold",
    "output": "sigmoid tanh exp expm1 sqrt rsqrt reciprocal",
    "factors": "mul multiply div divide true_divide",
    "operands": "gelu silu elu celu selu hardswish hardsigmoid mish softplus log_sigmoid where "
    "square pow abs log log1p log2 log10 sin cos atan erf clip clamp_min clamp_max maximum minimum "
    "lerp addcmul addcdiv exp2",
}
_CHANNELWISE = {
    "softmax log_softmax": (1, None, "output"),
    "chunk split split_with_sizes": (2, 0, "view"),
    "narrow": (1, None, "view"),
    "mean sum": (1, None, "nothing"),
    "cat concat concatenate": (1, 0, "nothing"),
    "glu": (1, -1, "operands"),
}
_SPACES = (torch, torch._C._VariableFunctions, Tensor, _nn)
_DROPOUTS = "dropout feature_dropout alpha_dropout feature_alpha_dropout"
_Maker = Callable[[Step, Values], Local | None]


def _named(names: str, maker: Callable[..., Local | None], **options: Any) -> Iterator[Any]:
    """The calls of names, and their twins in place, with makers that know the ones out of place."""
    for name, space in itertools.product(names.split(), _SPACES):
        func = getattr(space, name, None)
        for call in (func, getattr(space, f"{name}_", None)):
            if func is not None and call is not None:
                yield call, partial(maker, func=func, **options)


def _elementwise() -> Iterator[Any]:
    for keeps, names in _POINTWISE.items():
        yield from _named(names, _pointwise, keeps=keeps)
    for names, (place, default, keeps) in _CHANNELWISE.items():
        yield from _named(names, _channelwise, place=place, default=default, keeps=keeps)
    yield from _named(_DROPOUTS, _dropout)


def _windowed() -> Iterator[Any]:
    for axes, kind in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
        average = getattr(_nn, f"avg_pool{axes}d", torch.avg_pool1d)
        yield getattr(torch, f"conv{axes}d"), partial(_convolution, axes=axes)
        yield getattr(torch, f"conv_transpose{axes}d"), partial(_transposed, axes=axes)
        yield getattr(torch, f"max_pool{axes}d"), partial(_pool, axes=axes, greatest=True)
        yield average, partial(_pool, axes=axes, greatest=False)
        for name in ("upsample_nearest", "_upsample_nearest_exact", f"upsample_{kind}"):
            linear = name.endswith("linear")
            yield getattr(_nn, f"{name}{axes}d"), partial(_upsampled, axes=axes, linear=linear)


_MAKERS: dict[Callable[..., Any], _Maker] = {
    **dict(_elementwise()),
    **dict(_windowed()),
    torch.pixel_shuffle: partial(_shuffled, up=True),
    torch.pixel_unshuffle: partial(_shuffled, up=False),
    _nn.pad: _padded,
    Tensor.__getitem__: _indexed,
    torch.batch_norm: partial(_parametric, keeps="nothing"),
    torch.prelu: partial(_parametric, keeps="bits"),
    rectified: _rectified,
}
