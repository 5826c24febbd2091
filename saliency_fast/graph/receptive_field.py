"""Receptive fields: which part of its operands a part of a result needs, and calls on crops.

A value [R, C, *spatial] is cut along its spatial axes. Each rule of a local call registers with
`opinfo` as the field `crop` of its operators.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saliency_fast.graph.autograd.convolutions import each_axis
from saliency_fast.graph.opinfo import operators, out_of_place
from saliency_fast.graph.program import Ref, Step, Value, leaves_in

Span = tuple[int, int]
Box = tuple[Span, ...]
Values = Mapping[int, Value]


@dataclass(frozen=True)
class Window:
    """The receptive field along one axis: output o sees the inputs from o * stride - before to
    `reach` positions further; `after` is padding behind the input.

    spread: the other way round, as in upsampling: input i is seen by the outputs from i * stride -
    before on. origin: of a spread call: on a crop from i its result begins at i * stride - origin.
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
        # Where strides jump over positions, the last window before them stands in.
        first = min(-((self.reach - near) // self.stride), near // self.stride)
        return first, far // self.stride + 1


@dataclass(frozen=True)
class CropRule:
    """How a step runs on crops: `func` of `args`, whose values are crops, without padding.

    Attributes:
        fill: Value of the step's own padding; None where it has none.
        padding: Position in `args` of the padding that is equal on both sides.
        constants: Tensors among the arguments are broadcast, and cropped with the operands.
        keeps, view: As in `OpInfo`.
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
        """How far windows look into padding, by the call itself on both sides and beside it."""
        both_sides, pads = [], []
        for window, span, (first, stop), length in zip(self.windows, out, seen, size, strict=True):
            start, end = window.sees(span)
            ahead, behind = first - start, min(end, length + window.after) - stop
            both = max(0, min(ahead, behind)) if self.padding is not None else 0
            both_sides.append(both)
            pads.append((0, 0) if self.fill is None else (ahead - both, behind - both))
        return both_sides, pads


Rule = Callable[[Step, Values], CropRule | None]


def crop_rule(step: Step, values: Values) -> CropRule | None:
    """How a step runs on crops, None where it is not local or not known to be."""
    make = step.info.crop
    moving = varying(step, values)
    if make is None or step.detached or not (moving and step.args and step.outputs):
        return None
    # What works in place runs out of place: a crop may be a view of what other calls still need.
    if step.changed not in ((), ((moving[0], step.outputs[0]),)) or "out" in step.kwargs:
        return None
    shapes = [values[number] for number in (*step.outputs, *moving)]
    rank = len(shapes[0].shape)
    if rank < 3 or any(len(one.shape) != rank or not one.rowwise for one in shapes):
        return None
    rule: CropRule | None = make(step, values)
    return rule


def _rule(names: str, *, alone: bool = True) -> Callable[[Rule], Rule]:
    """Registers the rule of operators, of which only the first argument varies where `alone`."""

    def add(rule: Rule) -> Rule:
        def crop(step: Step, values: Values) -> CropRule | None:
            return rule(step, values) if not alone or _alone(step, values) else None

        operators(names, crop=crop)
        return rule

    return add


def varying(step: Step, values: Values) -> list[int]:
    """The operands that depend on the points, as often as they are named."""
    refs = (one for one in leaves_in((step.args, step.kwargs)) if isinstance(one, Ref))
    return [one.number for one in refs if values[one.number].varying]


def _bound(step: Step, names: str, **given: Any) -> dict[str, Any]:
    """A step's arguments by name; `given` holds the defaults."""
    return {**given, **dict(zip(names.split(), step.args, strict=False)), **step.kwargs}


def _alone(step: Step, values: Values) -> bool:
    """Whether only the first argument depends on the points, with its spatial axes."""
    first = step.args[0] if step.args else None
    if not isinstance(first, Ref) or varying(step, values) != [first.number]:
        return False
    return _axes(step, len(values[first.number].shape) - 2) == len(values[first.number].shape) - 2


def _axes(step: Step, default: int = 0) -> int:
    named = re.search(r"(\d)d$", step.name)
    return int(named[1]) if named else default


def _about(one: Ref | Tensor, values: Values) -> Value:
    """What is known of an argument."""
    if isinstance(one, Ref):
        return values[one.number]
    return Value(tuple(one.shape), one.dtype, False, False, -1)


def _of_points(step: Step, values: Values, args: Any = None, **more: Any) -> CropRule:
    """The rule of a call, out of place, whose result has at each position what operands have."""
    windows = (Window(),) * (len(values[step.outputs[0]].shape) - 2)
    given = step.args if args is None else args
    return CropRule(windows, out_of_place(step.func), given, step.kwargs, **more)


@_rule("conv1d conv2d conv3d")
def _convolution(step: Step, values: Values) -> CropRule | None:
    names = "input weight bias stride padding dilation groups"
    given = _bound(step, names, bias=None, stride=1, padding=0, dilation=1, groups=1)
    axes = _axes(step)
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
    return CropRule(windows, step.func, args, fill=0.0, padding=4)


@_rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def _transposed(step: Step, values: Values) -> CropRule | None:
    names = "input weight bias stride padding output_padding groups dilation"
    ones = {"stride": 1, "dilation": 1, "groups": 1}
    given = _bound(step, names, bias=None, padding=0, output_padding=0, **ones)
    axes = _axes(step)
    options = [each_axis(given[name], axes) for name in names.split()[3:6]]
    holes, kernel = each_axis(given["dilation"], axes), _about(given["weight"], values).shape[2:]
    windows, extra = [], []
    for s, p, more, d, k in zip(*options, holes, kernel, strict=True):
        windows.append(Window(s, p, d * (k - 1), spread=True, origin=p))
        # Positions behind the last window, which hold the bias alone.
        extra.append(max(0, more - p, s - 1 - d * (k - 1)))
    operands = (step.args[0], given["weight"], given["bias"])
    args = (*operands, options[0], [0] * axes, extra, given["groups"], holes)
    return CropRule(tuple(windows), step.func, args)


@_rule("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
def _pool(step: Step, values: Values) -> CropRule | None:
    greatest, axes = step.name.startswith("max"), _axes(step)
    own = "dilation ceil_mode" if greatest else "ceil_mode count_include_pad divisor_override"
    names = f"input kernel_size stride padding {own}"
    plain = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given = _bound(step, names, count_include_pad=True, divisor_override=None, **plain)
    kernel, before = each_axis(given["kernel_size"], axes), each_axis(given["padding"], axes)
    if any(before) and not given["count_include_pad"]:
        return None
    strides = each_axis(given["stride"], axes) if given["stride"] not in (None, []) else kernel
    holes = each_axis(given["dilation"], axes)
    reaches = [d * (k - 1) for d, k in zip(holes, kernel, strict=True)]
    tail = (given["ceil_mode"], True, given["divisor_override"])[: 2 if axes == 1 else 3]
    after, fill = before, 0.0
    if greatest:
        # Full windows also where the call rounds up: padding is never the greatest.
        tail, after = (holes, False), [2 * reach + 1 for reach in reaches]
        fill = -math.inf
    windows = tuple(map(Window, strides, before, reaches, after))
    args = (step.args[0], kernel, strides, [0] * axes, *tail)
    return CropRule(windows, step.func, args, fill=fill, padding=3, keeps=step.info.keeps)


@_rule(
    """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d
    upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d"""
)
def _upsampled(step: Step, values: Values) -> CropRule | None:
    linear = "linear" in step.name
    names = f"input output_size {'align_corners' if linear else ''} scale_factors"
    given = _bound(step, names, output_size=None, align_corners=False, scale_factors=None)
    if given["align_corners"]:
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
    return CropRule(tuple(windows), step.func, args)


@_rule("pixel_shuffle pixel_unshuffle")
def _shuffled(step: Step, values: Values) -> CropRule | None:
    images = len(values[step.outputs[0]].shape) == 4
    if not images or [type(one) for one in step.args[1:]] != [int]:
        return None
    window = Window(step.args[1], 0, step.args[1] - 1, spread=step.name == "pixel_shuffle")
    return CropRule((window, window), step.func, step.args)


@_rule("pad")
def _padded(step: Step, values: Values) -> CropRule | None:
    given = _bound(step, "input pad mode value", mode="constant", value=None)
    axes, pads = len(values[step.outputs[0]].shape) - 2, list(given["pad"])
    if given["mode"] != "constant" or any(pads[2 * axes :]):
        return None
    pads += [0] * (2 * axes - len(pads))
    pairs = [(pads[2 * axis], pads[2 * axis + 1]) for axis in reversed(range(axes))]
    windows = tuple(Window(1, before, 0, after) for before, after in pairs)
    return CropRule(windows, Tensor.contiguous, (step.args[0],), fill=given["value"] or 0.0)


@_rule("getitem")
def _indexed(step: Step, values: Values) -> CropRule | None:
    """Slices of channels and of space."""
    key = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    slices = [one for one in key if isinstance(one, slice)]
    ends = [end for one in slices for end in (one.start, one.stop, one.step) if end is not None]
    dots = sum(one is ... for one in key)
    whole = not any(type(end) is not int for end in ends) and len(slices) + dots == len(key)
    if not whole or dots > 1:
        return None
    shape = values[step.args[0].number].shape
    split = next((at for at, one in enumerate(key) if one is ...), len(key))
    middle = [slice(None)] * (len(shape) - len(slices))
    spans = [*key[:split], *middle, *key[split + 1 :]]
    if spans[0] != slice(None):
        return None
    cut = [span.indices(length) for span, length in zip(spans, shape, strict=True)][2:]
    windows = tuple(Window(stride, -start) for start, _, stride in cut)
    index = (*spans[:2], *(slice(None, None, stride) for _, _, stride in cut))
    return CropRule(windows, step.func, (step.args[0], index), view=True)


@_rule(
    """add sub subtract rsub neg negative clone to float double half bfloat16 type_as contiguous
    relu relu6 leaky_relu hardtanh clamp threshold sigmoid tanh exp expm1 sqrt rsqrt reciprocal
    mul multiply div divide true_divide gelu silu elu celu selu hardswish hardsigmoid mish softplus
    log_sigmoid where square pow abs log log1p log2 log10 sin cos atan erf clip clamp_min clamp_max
    maximum minimum lerp addcmul addcdiv exp2""",
    alone=False,
)
def _pointwise(step: Step, values: Values) -> CropRule | None:
    """A call whose result has at each position what its operands have there."""
    made, moving = values[step.outputs[0]], varying(step, values)
    leaves = leaves_in((step.args, step.kwargs))
    given = [_about(one, values) for one in leaves if isinstance(one, (Ref, Tensor))]
    same = all(values[one].shape[2:] == made.shape[2:] for one in moving)
    if not same or not all(_broadcasts(one, made.shape) for one in given):
        return None
    if step.changed and any(one.shape and one.dtype != made.dtype for one in given):
        return None
    keeps = step.info.keeps
    view = keeps == "view"
    if view or (keeps == "factors" and len(moving) == 1):
        keeps = "nothing"
    return _of_points(step, values, constants=True, keeps=keeps, view=view)


def _broadcasts(one: Value, shape: tuple[int, ...]) -> bool:
    """Whether an operand of a result of `shape` lies on its positions or is broadcast."""
    ahead = len(shape) - len(one.shape)
    if ahead < 0 or (ahead > 0 and one.rowwise):
        return False
    spatial = zip(one.shape[max(0, 2 - ahead) :], shape[max(2, ahead) :], strict=True)
    return all(own in (1, out) for own, out in spatial)


@_rule(
    """softmax log_softmax chunk split split_with_sizes narrow mean sum cat concat concatenate
    glu""",
    alone=False,
)
def _channelwise(step: Step, values: Values) -> CropRule | None:
    """A call along the channels."""
    position, default = step.info.axis
    dim = step.kwargs.get("dim", step.args[position] if len(step.args) > position else default)
    rank = len(values[step.outputs[0]].shape)
    along = (list(dim) if isinstance(dim, (tuple, list)) else [dim]) in ([1], [1 - rank])
    return _pointwise(step, values) if along else None


@_rule("dropout feature_dropout alpha_dropout feature_alpha_dropout", alone=False)
def _dropout(step: Step, values: Values) -> CropRule | None:
    training = _bound(step, "input p train", train=True)["train"]
    return None if training else _pointwise(step, values)


@_rule("batch_norm prelu")
def _parametric(step: Step, values: Values) -> CropRule | None:
    """A frozen batch normalisation or a PReLU: parameters lie along the channels."""
    names = "input weight bias running_mean running_var training"
    if _bound(step, names, training=False)["training"]:
        return None
    return _of_points(step, values, keeps=step.info.keeps)


@_rule("rectified", alone=False)
def _rectified(step: Step, values: Values) -> CropRule | None:
    named = [one.number for one in (step.args[0], step.args[2]) if isinstance(one, Ref)]
    if varying(step, values) != named or len({values[one].shape for one in named}) > 1:
        return None
    return _of_points(step, values, (*step.args[:5], False), keeps=step.info.keeps)
