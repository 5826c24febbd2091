"""Records a model as a program; models of local calls of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.graph.program import Program
from saliency_fast.graph.recorder import Recorder, unified

Model = Callable[[Tensor], Tensor]
_DRAWN = torch.Generator().manual_seed(3)


def record(model: Callable[..., Any], x: Tensor) -> Program:
    """The program of `model` for any number of rows like those of x [R, *]."""
    found = []
    for rows in (1, 2):
        points = x[:1].repeat(rows, *[1] * (x.dim() - 1))
        recorder = Recorder((points,), ())
        with recorder:
            raw = model(points)
        found.append(recorder.program(raw))
    return unified(*found)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAWN, dtype=torch.float64)


def prepared(module: nn.Module) -> nn.Module:
    """In float64 and for evaluation, with statistics that batch normalisation would have learnt."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            if part.affine:
                nn.init.uniform_(part.weight, -1, 2)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.double().eval()


class Stages(nn.Sequential):
    """Three stages and a mean: the cut is the last feature map."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(2, 4, 5, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(4, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x, inplace=True)


class Volume(nn.Module):
    """A small 3-D U-Net: the map is the cut."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(True))
        self.deep = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU())
        self.up = up
        self.head = nn.Conv3d(7, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.up(self.deep(F.max_pool3d(skip, 2)))
        sizes = zip(skip.shape[:1:-1], deep.shape[:1:-1], strict=True)
        pads = [n for a, b in sizes for n in (0, a - b)]
        return self.head(torch.cat([skip, F.pad(deep, pads)], 1))


class Gated(nn.Module):
    """Squeeze and excitation: the cut is in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3)
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.stem(x))
        return self.body(y * self.gate(y.mean((2, 3)))[:, :, None, None].sigmoid())


CONSTANT, PLANE = drawn(1, 4, 1, 1), drawn(1, 13, 18)
KERNEL = drawn(4, 2, 3, 3)


def constants(x: Tensor) -> Tensor:
    grid = PLANE.abs().expand(len(x), 1, 13, 18)
    y = (x - CONSTANT[:, :2]) / CONSTANT.abs()[:, 2:] * PLANE + 0.5
    each = torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1)
    return torch.cat([y, grid * 2], 1).mul_(PLANE) * PLANE[0, :, :1] * (each + 1)


def channels(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL)
    parts = (*y.chunk(2, 1), *y.split([1, 3], 1), y.narrow(1, 0, 1), y[:, 1:], y[..., 1:2, :, :])
    joined = torch.cat(parts, 1)
    return joined.softmax(1) * joined.mean(1, keepdim=True).sigmoid() * joined[:, -1:]


def cropped(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL)
    return (y[..., 1:-1, 1:-1] * y[:, :, 2:, :-2])[:, :, ::2, 1::3]


def in_place(x: Tensor) -> Tensor:
    x.mul_(2.0).add_(1.0)
    y = F.conv2d(x, KERNEL)
    y += CONSTANT
    return F.hardtanh(F.leaky_relu(y, 0.1, inplace=True), -1, 2).mean((2, 3))


def both(x: Tensor) -> Tensor:
    return F.conv2d(x, KERNEL).square().mean((2, 3)) + x.mean((1, 2, 3))[:, None].square()


def branches(x: Tensor) -> Tensor:
    wide = F.conv2d(x, KERNEL, padding=3, dilation=3)
    return torch.cat([x, wide], 1) * wide[:, :1]


def blind(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL)
    with torch.no_grad():
        gate = y.sigmoid()
    return y * gate


def seq(*parts: nn.Module) -> nn.Module:
    return prepared(nn.Sequential(*parts))


ACTIVATIONS = (
    *(nn.Conv2d(2, 4, 3), nn.SiLU(True), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.Conv2d(4, 4, 1)),
    *(nn.LeakyReLU(0.1, True), nn.ELU(), nn.Hardtanh(), nn.Conv2d(4, 4, 1), nn.ReLU6(True)),
    *(nn.Hardswish(), nn.Mish(), nn.Softplus(), nn.PReLU(4), nn.Dropout2d(), nn.Softmax(1)),
)
IMAGES: dict[str, Model] = {
    "stages": prepared(Stages()),
    "residual": seq(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), Residual(3), Residual(3)),
    "gated": prepared(Gated()),
    "dilated": seq(
        nn.Conv2d(2, 4, 3, padding="same", dilation=2),
        nn.Conv2d(4, 4, (4, 2), padding="same", groups=2),
        nn.Conv2d(4, 2, 2, padding="valid"),
    ),
    "all padding": seq(nn.Conv2d(2, 3, 1, padding=2), nn.Conv2d(3, 2, 2, 3, padding=(3, 0))),
    "jumps": seq(nn.Conv2d(2, 3, 1, stride=3), nn.Conv2d(3, 2, 2)),
    "ceil": seq(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    "dilated pool": seq(nn.MaxPool2d(2, 2, 0, 2, ceil_mode=True), nn.Conv2d(2, 2, 3)),
    "average": seq(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.AvgPool2d(3, 1, 1)),
    "divisor": seq(nn.AvgPool2d((2, 3), divisor_override=5)),
    "nearest": seq(nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(2, 2, 3, padding=1)),
    "exact": seq(nn.Conv2d(2, 2, 3), nn.Upsample(scale_factor=2, mode="nearest-exact")),
    "bilinear": seq(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 3, 2)),
    "bilinear odd": seq(nn.Conv2d(2, 2, 3), nn.Upsample(scale_factor=(3, 1), mode="bilinear")),
    "shuffle": seq(nn.Conv2d(2, 4, 2), nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    "padded": seq(nn.ZeroPad2d((1, 0, 2, 0)), nn.ConstantPad2d(3, 2.0), nn.ConstantPad2d(-1, 0.0)),
    "transposed": seq(nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), nn.Conv2d(3, 2, 3)),
    "transposed even": seq(nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.ReLU()),
    "transposed jumps": seq(nn.ConvTranspose2d(2, 3, 1, 3, 0, 2), nn.Conv2d(3, 2, 3)),
    "transposed dilated": seq(nn.ConvTranspose2d(2, 2, 3, 2, 2, 1, groups=2, dilation=2)),
    "activations": seq(*ACTIVATIONS),
    "constants": constants,
    "channels": channels,
    "cropped": cropped,
    "in place": in_place,
    "both": both,
    "branches": branches,
    "blind": blind,
}


class Patches(nn.Module):
    """Attention among patches: only their embedding is local."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 4, 3, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        return self.attention(y, y, y, need_weights=False)[0].mean(1)


class Segmenter(nn.Module):
    """A 2-D U-Net with two levels."""

    def __init__(self) -> None:
        super().__init__()

        def twice(a: int, b: int) -> nn.Module:
            parts = (nn.BatchNorm2d(b), nn.ReLU(True), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(True))
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), *parts)

        self.a, self.b, self.c, self.d = twice(3, 8), twice(8, 16), twice(16, 16), twice(24, 8)
        self.up, self.head = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.c(self.b(F.max_pool2d(a, 2)))
        return self.head(self.d(torch.cat([a, self.up(b)], 1)))
