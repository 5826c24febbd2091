"""Calls that lean versions serve, and others that a model may make, as modules and as functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.ways import Model
from tests.models import randn

SIDES = {1: (13,), 2: (9, 10), 3: (6, 7, 8)}
KINKS = torch.tensor([0.0, -0.0, 1.0, -1.0, 6.0, -6.0, 3.0, -3.0, 0.5, -0.5, 20.0, -20.0])


@dataclass(frozen=True)
class Case:
    """A model of points [3, *shape]; node: the lean version that must serve, None for autograd's.

    kept: bytes from forward to backward, from the points and the output; None makes no promise.
    values: "random", with "kinks" where slopes change, or with "ties".
    """

    model: Model
    shape: tuple[int, ...]
    node: str | None = None
    kept: Callable[[Tensor, Tensor], int] | None = None
    values: str = "random"

    def points(self) -> Tensor:
        x = randn(3, *self.shape, seed=4)
        if self.values == "kinks":
            x.flatten()[: 3 * len(KINKS) : 3] = KINKS
        return x.mul(2).round() if self.values == "ties" else x


def nothing(x: Tensor, y: Tensor) -> int:
    return 0


def a_bit(x: Tensor, y: Tensor) -> int:
    return math.ceil(x.numel() / 8)


def a_byte(x: Tensor, y: Tensor) -> int:
    return y.numel()


def a_place(x: Tensor, y: Tensor) -> int:
    return 8 * y.numel()


def per_channel(x: Tensor, y: Tensor) -> int:
    return 8 * x.shape[1]


def its_input(x: Tensor, y: Tensor) -> int:
    return 8 * x.numel()


def made(kind: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A module in evaluation mode whose weights and statistics are not the trivial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = kind(*args, **options).double().eval()
        for name, one in [*module.named_parameters(), *module.named_buffers()]:
            if one.is_floating_point():
                one.data.uniform_(0.3, 2.0) if name.endswith("var") else one.data.normal_(0, 0.7)
    return module


CASES: dict[str, Case] = {}


def convolutions(axes: int) -> None:
    kind, shape = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], (4, *SIDES[axes])
    for stride in (1, 2, 3):
        # Together all that the strides may leave over at the far end.
        for padding in (0, 1, 2):
            name = f"conv{axes}d stride {stride} padding {padding}"
            module = made(kind, 4, 5, 3, stride, padding)
            CASES[name] = Case(module, shape, "_Lean", nothing)
    for options in (
        {"dilation": 2},
        {"dilation": 2, "stride": 2, "padding": 3},
        {"groups": 2, "stride": 2},
        {"groups": 4, "padding": 1},
        {"bias": False},
        {"padding": "valid", "stride": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "groups": 4},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate"},
    ):
        channels = 8 if options.get("groups") == 4 else 6
        module = made(kind, 4, channels, 3, **options)
        CASES[f"conv{axes}d {options}"] = Case(module, shape, "_Lean", nothing)
    uneven, steps, edges = (4, 3, 5)[:axes], (3, 1, 2)[:axes], (0, 2, 1)[:axes]
    CASES[f"conv{axes}d uneven"] = Case(
        made(kind, 4, 2, uneven, steps, edges), shape, "_Lean", nothing
    )
    CASES[f"conv{axes}d same, even kernel"] = Case(made(kind, 4, 2, 4, padding="same"), shape)


def transposed_convolutions(axes: int) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    shape = (4, *(one // 2 for one in SIDES[axes]))
    for stride in (1, 2, 3):
        # Larger ones than strides are for dilated kernels.
        for extra in range(3):
            dilation = 3 if extra >= stride else 1
            module = made(kind, 4, 6, 3, stride, 1, extra, groups=2, dilation=dilation)
            name = f"conv_transpose{axes}d stride {stride} output_padding {extra}"
            CASES[name] = Case(module, shape, "_Lean", nothing)
    module = made(kind, 4, 3, (4, 3, 5)[:axes], (3, 1, 2)[:axes], (0, 1, 2)[:axes], bias=False)
    CASES[f"conv_transpose{axes}d uneven"] = Case(module, shape, "_Lean", nothing)


def max_pools(axes: int) -> None:
    kind = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
    for options in (
        {},
        {"stride": 1},
        {"padding": 1},
        {"stride": 2, "padding": 1, "ceil_mode": True},
        {"stride": 2, "dilation": 2},
        {"stride": 3, "dilation": 2, "padding": 1, "ceil_mode": True},
    ):
        for values in ("random", "ties"):
            case = Case(kind(3, **options), (4, *SIDES[axes]), "_Lean", a_byte, values)
            CASES[f"max_pool{axes}d {options} {values}"] = case
    uneven = kind((3, 2, 1)[:axes], (1, 2, 1)[:axes])
    CASES[f"max_pool{axes}d uneven"] = Case(uneven, (4, *SIDES[axes]), "_Lean", a_byte, "ties")
    places = kind(3, 2, return_indices=True)
    CASES[f"max_pool{axes}d indices"] = Case(lambda x: places(x)[0], (4, *SIDES[axes]))
    unpool = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)[axes - 1](2)
    halves = kind(2, return_indices=True)
    sizes = SIDES[axes]
    CASES[f"max_unpool{axes}d"] = Case(lambda x: unpool(*halves(x), sizes), (4, *SIDES[axes]))


def average_pools(axes: int) -> None:
    kind = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
    divisors = ({"divisor_override": 5},) if axes > 1 else ()
    for options in (
        {},
        {"stride": 1, "padding": 1},
        {"stride": 2, "padding": 1, "ceil_mode": True},
        {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
        *divisors,
    ):
        case = Case(kind(3, **options), (4, *SIDES[axes]), "_Lean", nothing)
        CASES[f"avg_pool{axes}d {options}"] = case


def adaptive_pools(axes: int) -> None:
    average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    most = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[axes - 1]
    shape = (4, *SIDES[axes])
    sizes: list[Any] = [1, 3, 5]
    sizes += [(None, 4), (3, None)] if axes == 2 else [(None, 2, 5)] if axes == 3 else []
    for size in sizes:
        CASES[f"adaptive_avg_pool{axes}d {size}"] = Case(average(size), shape, "_Lean", nothing)
        name = f"adaptive_max_pool{axes}d {size}"
        CASES[name] = Case(most(size), shape, "_AdaptiveMaxPool", a_place, "ties")
    both = most(3, return_indices=True)
    CASES[f"adaptive_max_pool{axes}d indices"] = Case(both, shape, "_AdaptiveMaxPool", a_place)


for number in (1, 2, 3):
    convolutions(number)
    transposed_convolutions(number)
    max_pools(number)
    average_pools(number)
    adaptive_pools(number)


def rectifiers(shape: tuple[int, ...]) -> None:
    channels = shape[0]
    threshold = (0.5, -2.0)
    for name, module, in_place, node in (
        ("relu", nn.ReLU(), nn.ReLU(inplace=True), "_Ramp"),
        ("leaky_relu", nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), "_Ramp"),
        ("steep leaky_relu", nn.LeakyReLU(1.5), None, "_Ramp"),
        ("relu6", lambda x: torch._C._nn.relu6(x), lambda x: torch._C._nn.relu6_(x), "_Ramp"),
        ("nn.ReLU6", nn.ReLU6(), nn.ReLU6(inplace=True), "_Lean"),
        ("hardtanh", nn.Hardtanh(), nn.Hardtanh(inplace=True), "_Lean"),
        ("wide hardtanh", nn.Hardtanh(-3.0, 0.5), None, "_Lean"),
        ("threshold", nn.Threshold(*threshold), nn.Threshold(*threshold, inplace=True), "_Lean"),
        ("clamp", lambda x: x.clamp(-1, 0.5), lambda x: x.clamp_(-1, 0.5), "_Lean"),
        ("clamp_min", lambda x: torch.clamp(x, min=0.5), lambda x: x.clamp_min_(0.5), "_Lean"),
        ("clamp_max", lambda x: x.clamp(max=0.5), lambda x: x.clamp_max_(0.5), "_Lean"),
        ("prelu of one", made(nn.PReLU), None, "_Lean"),
        ("prelu", made(nn.PReLU, channels), None, "_Lean"),
    ):
        label = f"{name} {len(shape)}-d"
        CASES[label] = Case(module, shape, node, a_bit, "kinks")
        if in_place is not None:
            # Where it has a lean version in place, which alone may promise anything.
            served = node == "_Ramp"
            CASES[f"{label} in place"] = Case(
                in_place, shape, node if served else None, a_bit if served else None, "kinks"
            )


for size in ((17,), (4, 13), (4, 5, 7), (4, 3, 4, 5)):
    rectifiers(size)

IMAGE, VOLUME, TOKENS = (6, 5, 7), (4, 3, 4, 5), (7, 12)
WEIGHT, BIAS = randn(5, 4, 3, 3, seed=1), randn(5, seed=2)
FORMS, MIX, TABLE = randn(3, 12, 12, seed=3), randn(6, 3, seed=4), randn(7, 12, seed=5)
SLOPES = randn(6, seed=6)
BOUNDS = torch.linspace(-1, 0, 7, dtype=torch.float64)


def attention(**options: Any) -> Model:
    def attend(x: Tensor) -> Tensor:
        q, k, v = (x * s for s in (0.7, 1.1, -0.4))
        return F.scaled_dot_product_attention(q, k, v, **options)

    return attend


def by_hand(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(2, (3, 4)).unbind(2)
    return (q @ k.transpose(1, 2) / 2.0).softmax(-1) @ v


CASES |= {
    "linear": Case(made(nn.Linear, 12, 5), TOKENS, None, nothing),
    "linear without bias": Case(made(nn.Linear, 12, 5, bias=False), (12,), None, nothing),
    "bilinear": Case(lambda x: F.bilinear(x, x.flip(1), FORMS), TOKENS),
    "F.conv2d": Case(lambda x: F.conv2d(x, WEIGHT, BIAS, (1, 2), 1), (4, 9, 10), "_Lean", nothing),
    "F.conv2d, names": Case(
        lambda x: torch.conv2d(input=x, weight=WEIGHT, stride=2), (4, 9, 10), "_Lean", nothing
    ),
    "conv2d by the points' own": Case(
        lambda x: F.conv2d(x, x.mean((0, 2, 3)).view(1, -1, 1, 1) * WEIGHT), (4, 9, 10)
    ),
    "F.conv_transpose2d": Case(
        lambda x: F.conv_transpose2d(x, WEIGHT[:4, :2], None, 2, 1, 1), (4, 5, 6), "_Lean"
    ),
    "batch_norm": Case(made(nn.BatchNorm2d, 6), IMAGE, "_Lean", per_channel),
    "batch_norm without weights": Case(
        made(nn.BatchNorm2d, 6, affine=False), IMAGE, "_Lean", per_channel
    ),
    "batch_norm of tables": Case(made(nn.BatchNorm1d, 9), (9,), "_Lean", per_channel),
    "batch_norm of series": Case(made(nn.BatchNorm1d, 7), TOKENS, "_Lean", per_channel),
    "batch_norm of volumes": Case(made(nn.BatchNorm3d, 4), VOLUME, "_Lean", per_channel),
    "batch_norm of its batch": Case(made(nn.BatchNorm2d, 6, track_running_stats=False), IMAGE),
    "layer_norm": Case(made(nn.LayerNorm, 12), TOKENS),
    "layer_norm of two axes": Case(lambda x: F.layer_norm(x, (5, 7)), IMAGE),
    "group_norm": Case(made(nn.GroupNorm, 3, 6), IMAGE),
    "instance_norm": Case(made(nn.InstanceNorm2d, 6, affine=True), IMAGE),
    "instance_norm of volumes": Case(made(nn.InstanceNorm3d, 4), VOLUME),
    "local_response_norm": Case(nn.LocalResponseNorm(3, alpha=0.5), IMAGE),
    "rms_norm": Case(made(nn.RMSNorm, 12), TOKENS, "_Lean"),
    "rms_norm of two axes": Case(lambda x: F.rms_norm(x, (5, 7), eps=1e-3), IMAGE, "_Lean"),
    "normalize": Case(lambda x: F.normalize(x, dim=1), IMAGE),
    "softmax": Case(lambda x: x.softmax(1) + F.log_softmax(x, -1), IMAGE),
    "attention": Case(attention(), TOKENS),
    "attention, causal": Case(attention(is_causal=True, scale=0.3), TOKENS),
    "attention, masked": Case(attention(attn_mask=BOUNDS.view(7, 1) > BOUNDS - 0.4), TOKENS),
    "attention, biased": Case(attention(attn_mask=randn(7, 7)), TOKENS),
    "attention by hand": Case(by_hand, TOKENS),
    "dropout": Case(made(nn.Dropout, 0.5), IMAGE, None, nothing),
    "F.dropout": Case(lambda x: F.dropout2d(x, 0.5, training=False), IMAGE, None, nothing),
    "cat": Case(lambda x: torch.cat([x, x[:, :2], -x], 1), IMAGE, None, nothing),
    "stack": Case(lambda x: torch.stack((x, x.mT.mT), 2), IMAGE, None, nothing),
    "sum of two": Case(lambda x: x + x.flip(1), IMAGE, None, nothing),
    "sum of three": Case(lambda x: torch.add(x, x.flip(2), alpha=0.5).sub(x), IMAGE, None, nothing),
    "pixel_shuffle": Case(nn.PixelShuffle(2), (8, 3, 4), None, nothing),
    "unfold": Case(nn.Unfold(2), (3, 4, 5), None, nothing),
    "einsum": Case(lambda x: torch.einsum("bchw,cd->bdhw", x, MIX), IMAGE, None, nothing),
    "embedding": Case(lambda x: x + F.embedding(torch.arange(7), TABLE), TOKENS),
    "relu by name": Case(lambda x: torch.relu(input=x), IMAGE, "_Ramp", a_bit),
    "two in one": Case(
        lambda x: F.leaky_relu(x, negative_slope=0.3) + torch.relu(x), IMAGE, "_Ramp"
    ),
    "relu of a view": Case(lambda x: x.mT.relu(), IMAGE, "_Ramp", a_bit, "kinks"),
    "max_pool of a view": Case(lambda x: F.max_pool2d(x.mT, 2), IMAGE, "_Lean", a_byte),
    "avg_pool of a view": Case(lambda x: F.avg_pool2d(x.mT, 2), IMAGE, "_Lean", nothing),
    "F.max_pool2d, names": Case(
        lambda x: F.max_pool2d(x, kernel_size=(3, 2), stride=[2, 1], padding=(1, 0)),
        IMAGE,
        "_Lean",
        a_byte,
    ),
    "max_pool1d of long windows": Case(nn.MaxPool1d(260, 5), (2, 300)),
    "max_pool2d of large windows": Case(nn.MaxPool2d(17, 1), (2, 19, 20)),
    "lp_pool": Case(lambda x: F.lp_pool2d(x.abs() + 0.1, 2.0, 2), IMAGE),
}
# By their other names, and where parameters depend on the points.
CASES |= {
    "torch.relu_": Case(lambda x: torch.relu_(x), IMAGE, "_Ramp", a_bit, "kinks"),
    "Tensor.relu_": Case(lambda x: x.relu_(), IMAGE, "_Ramp", a_bit, "kinks"),
    "Tensor.prelu": Case(lambda x: x.prelu(SLOPES), IMAGE, "_Lean", a_bit, "kinks"),
    **{
        kind: Case(
            partial(getattr(torch._C._nn, kind), padding=[1, 2] * axes), (3, 4, 5, 6)[: axes + 1]
        )
        for axes in (1, 2, 3)
        for kind in (f"reflection_pad{axes}d", f"replication_pad{axes}d")
    },
    "prelu by the points' own": Case(lambda x: F.prelu(x, x.mean((0, 2, 3))), IMAGE),
    "batch_norm by the points' own": Case(
        lambda x: F.batch_norm(x, SLOPES, SLOPES.exp(), None, x.mean((0, 2, 3))), IMAGE
    ),
    "rms_norm by the points' own": Case(lambda x: F.rms_norm(x, (12,), x.mean((0, 1))), TOKENS),
    "clamp by the points' own": Case(lambda x: x.clamp(x.mT.mean(), x.exp()), IMAGE),
    "clamp by nothing": Case(lambda x: x.clamp(0.5, -0.5) + x.clamp(-9, 9), IMAGE, "_Lean"),
}
for name in (
    "gelu silu softplus hardswish hardsigmoid elu selu celu mish tanh sigmoid softsign tanhshrink "
    "hardshrink softshrink logsigmoid rrelu relu hardtanh relu6 leaky_relu"
).split():
    CASES[f"F.{name}"] = Case(getattr(F, name), IMAGE, values="kinks")
CASES["F.gelu, tanh"] = Case(lambda x: F.gelu(x, approximate="tanh"), IMAGE)
CASES["F.glu"] = Case(lambda x: F.glu(x, 1), IMAGE)
for name in ("silu", "elu", "hardswish", "mish", "celu", "hardsigmoid"):
    in_place = getattr(nn, {"elu": "ELU", "silu": "SiLU", "celu": "CELU"}.get(name, name.title()))
    CASES[f"{name} in place"] = Case(in_place(inplace=True), IMAGE, values="kinks")
for axes, mode in (
    *((1, one) for one in ("nearest", "nearest-exact", "linear")),
    *((2, one) for one in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")),
    *((3, one) for one in ("nearest", "nearest-exact", "trilinear", "area")),
):
    for options in ({"scale_factor": 2}, {"size": (5, 4, 7)[:axes]}):
        slanted = {"align_corners": True} if "linear" in mode else {}
        resized = partial(F.interpolate, **options, **slanted, mode=mode)
        CASES[f"interpolate {axes}-d {mode} {options}"] = Case(resized, (2, *(3, 5, 4)[:axes]))
for axes, mode in (
    (a, one) for a in (1, 2, 3) for one in ("constant", "reflect", "replicate", "circular")
):
    padded = partial(F.pad, pad=(2, 1, 0, 2, 1, 1)[: 2 * axes], mode=mode)
    CASES[f"pad {axes}-d {mode}"] = Case(padded, (3, 4, 5, 6)[: axes + 1], None, nothing)

TRACKED = made(nn.InstanceNorm2d, 6, track_running_stats=True)
before = TRACKED.running_mean._version
TRACKED(randn(1, *IMAGE))
if TRACKED.running_mean._version == before:
    # PyTorch 2.9 writes the statistics anew in evaluation mode, too: nothing is recorded there.
    CASES["instance_norm, tracked"] = Case(TRACKED, IMAGE)
