"""Random small networks over what models are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.recording import prepared

Layer = Callable[[Tensor], Tensor]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
ADAPTIVE_MEAN = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
SIDES = {1: (13,), 2: (9, 8), 3: (6, 5, 7)}
CHANNELS = 4


class Called(nn.Module):
    """A function of tensors, with the modules that it calls."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


def _conv(axes: int, draw: random.Random, channels: int = CHANNELS) -> nn.Module:
    """Keeps or halves the sides."""
    groups = draw.choice((1, 1, 2, channels))
    kernel, dilation = draw.choice((1, 3, 3)), draw.choice((1, 1, 2))
    padding = dilation * (kernel // 2)
    more = {"padding": padding, "dilation": dilation, "groups": groups, "bias": draw.random() < 0.7}
    return CONV[axes](channels, CHANNELS, kernel, draw.choice((1, 1, 2)), **more)


def _same(axes: int, draw: random.Random) -> nn.Module:
    """A convolution that keeps the sides."""
    return CONV[axes](CHANNELS, CHANNELS, 3, padding="same", bias=draw.random() < 0.5)


def _attention(x: Tensor, into: nn.Module, out: nn.Module) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    query, key, value = into(tokens).chunk(3, -1)
    heads = (one.reshape(*one.shape[:2], 2, -1).transpose(1, 2) for one in (query, key, value))
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(tokens.shape)
    return x + out(mixed).transpose(1, 2).reshape(x.shape)


def _over_channels(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def _added_in_place(x: Tensor, conv: nn.Module) -> Tensor:
    y = conv(x)
    y += x
    return y


def _twice(x: Tensor, conv: nn.Module) -> Tensor:
    return conv(F.relu(conv(x)))


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second * torch.sigmoid(first), first], 1)


def _shifted(x: Tensor) -> Tensor:
    return x[:, :, 1:] - 0.5 * x[:, :, :-1] if x.shape[2] > 2 else x


def _wide(x: Tensor, conv: nn.Module) -> Tensor:
    return conv(torch.cat([x, x.tanh()], 1))


KINDS: dict[str, Callable[[int, random.Random], nn.Module]] = {
    "conv": _conv,
    "conv again": _conv,
    "conv norm relu": lambda axes, draw: nn.Sequential(
        _conv(axes, draw), BATCH[axes](CHANNELS), nn.ReLU(inplace=draw.random() < 0.5)
    ),
    "residual": lambda axes, draw: Called(
        lambda x, a, b, c: F.relu((b(a(x)) + x).add_(c(x))),
        _same(axes, draw),
        BATCH[axes](CHANNELS),
        _same(axes, draw),
    ),
    "added in place": lambda axes, draw: Called(_added_in_place, _same(axes, draw)),
    "twice": lambda axes, draw: Called(_twice, _same(axes, draw)),
    "cat": lambda axes, draw: Called(_wide, CONV[axes](2 * CHANNELS, CHANNELS, 1)),
    "transposed": lambda axes, draw: UP[axes](CHANNELS, CHANNELS, 2, 2, groups=draw.choice((1, 2))),
    "batch norm": lambda axes, draw: BATCH[axes](CHANNELS, affine=draw.random() < 0.7),
    "instance norm": lambda axes, draw: INSTANCE[axes](CHANNELS, affine=draw.random() < 0.5),
    "group norm": lambda axes, draw: nn.GroupNorm(2, CHANNELS),
    "layer norm": lambda axes, draw: Called(_over_channels, nn.LayerNorm(CHANNELS)),
    "rms norm": lambda axes, draw: Called(_over_channels, nn.RMSNorm(CHANNELS, 1e-3)),
    "rectifier": lambda axes, draw: draw.choice(
        (
            *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, inplace=True)),
            *(nn.PReLU(), nn.PReLU(CHANNELS), nn.ReLU6(), nn.Hardtanh(-0.5, 1.5)),
            *(nn.Threshold(0.2, -1.0), Called(lambda x: x.clamp(-0.7, 0.9))),
        )
    ),
    "smooth": lambda axes, draw: draw.choice(
        (
            *(nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Softplus()),
            *(nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.ELU(inplace=True), nn.SELU(), nn.Mish()),
            *(nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softsign()),
        )
    ),
    "max pool": lambda axes, draw: draw.choice(
        (MAX[axes](2, ceil_mode=True), MAX[axes](3, 2, 1), MAX[axes](3, 1, 1))
    ),
    "mean pool": lambda axes, draw: draw.choice(
        (MEAN[axes](2, ceil_mode=True), MEAN[axes](2, 1, 1, count_include_pad=False))
    ),
    "adaptive": lambda axes, draw: draw.choice((ADAPTIVE_MAX, ADAPTIVE_MEAN))[axes](3),
    "resized": lambda axes, draw: nn.Upsample(
        (4,) * axes, mode=draw.choice(("nearest", LINEAR[axes]))
    ),
    "padded": lambda axes, draw: draw.choice(
        (
            Called(lambda x: F.pad(x, (1, 0) * axes, value=0.3)),
            Called(lambda x: F.pad(x, (1, 1) * axes, mode="replicate")),
        )
    ),
    "dropout": lambda axes, draw: nn.Dropout(0.5),
    "softmax": lambda axes, draw: nn.Softmax(1),
    "gate": lambda axes, draw: Called(lambda x, a: x * torch.sigmoid(a(x)), _same(axes, draw)),
    "halves": lambda axes, draw: Called(_halves),
    "shifted": lambda axes, draw: Called(_shifted),
    "arithmetic": lambda axes, draw: Called(
        lambda x: 2 - x / (1 + x.square()) + (0.1 + x.abs()).sqrt()
    ),
    "attention": lambda axes, draw: Called(
        _attention, nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
    ),
}


class Network(nn.Module):
    """Layers of the given kinds between a first convolution and one of three heads."""

    def __init__(self, axes: int, kinds: Sequence[str], seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.first = CONV[axes](2, CHANNELS, 3, padding=1)
        self.layers = nn.ModuleList(KINDS[kind](axes, draw) for kind in kinds)
        self.head, self.end = nn.Linear(CHANNELS, 3), draw.choice(("mean", "max", "square"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            # What made x may keep it for its gradient, and must not see it overwritten.
            x = layer(x + 0.1 if getattr(layer, "inplace", False) else x)
        # The mean of what was normalised is no function of anything.
        flat = x.flatten(2)
        ends = {"mean": flat.sin().mean, "max": flat.amax, "square": flat.square().mean}
        return self.head(ends[self.end](-1))


def network(axes: int, kinds: Sequence[str], seed: int) -> tuple[nn.Module, Tensor]:
    """In float64 and for evaluation, with two examples for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return prepared(Network(axes, kinds, seed)), torch.randn(2, 2, *SIDES[axes]).double()
