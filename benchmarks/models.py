"""The models of the benchmarks: plain PyTorch, random but reproducible weights, eval mode.

Builders draw every number from a generator of their own, so the global one is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "MLP",
    "WORKLOADS",
    "ResNet",
    "UNet3d",
    "VisionTransformer",
    "VolumeNet",
    "Workload",
    "calibrate",
    "mlp",
    "resnet50",
    "small_cnn",
    "small_mlp",
    "unet3d",
    "vit_b16",
    "volume_net",
]

Norm = Literal["batch", "instance"]
ModelT = TypeVar("ModelT", bound=nn.Module)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (*_BATCH_NORMS, nn.InstanceNorm3d, nn.LayerNorm)
_PASSES = 3


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; v1.5: the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, 4 * width, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        # `+=` on the fresh tensor, as torchvision writes it: the in-place add is part of the load.
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """Bottleneck residual network (He 2015), the v1.5 variant."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        stages: list[nn.Module] = []
        for level, count in enumerate(blocks):
            width = 64 * 2**level
            stage: list[nn.Module] = []
            for block in range(count):
                stride = 2 if block == 0 and level > 0 else 1
                stage.append(Bottleneck(channels, width, stride))
                channels = width * Bottleneck.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.stages(x))
        out: Tensor = self.fc(torch.flatten(x, 1))
        return out


class Attention(nn.Module):
    """Multi-head self-attention through `scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] to [B, N, dim]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: attention, then a GELU network of 4 * dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] to [B, N, dim]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Vision transformer with a class token and learned positions (Dosovitskiy 2020)."""

    def __init__(
        self,
        num_classes: int = 1000,
        image: int = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(
                f"image must be a multiple of patch: got image={image}, patch={patch}; "
                f"pass image={image - image % patch} or {image + patch - image % patch}"
            )
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, image, image] to logits [B, num_classes]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(x.shape[0], -1, -1), tokens), dim=1)
        tokens = self.norm(self.blocks(tokens + self.positions))
        out: Tensor = self.head(tokens[:, 0])
        return out


def _double_conv(channels: int, width: int, norm: Norm) -> nn.Sequential:
    """Two 3x3x3 convolutions, each normalised and rectified: channels to width."""

    def normalisation() -> nn.Module:
        if norm == "batch":
            return nn.BatchNorm3d(width)
        return nn.InstanceNorm3d(width, affine=True)

    return nn.Sequential(
        nn.Conv3d(channels, width, 3, padding=1, bias=False),
        normalisation(),
        nn.ReLU(inplace=True),
        nn.Conv3d(width, width, 3, padding=1, bias=False),
        normalisation(),
        nn.ReLU(inplace=True),
    )


class UNet3d(nn.Module):
    """Three-level volumetric U-Net (Cicek 2016): two poolings, two skips."""

    def __init__(
        self, in_channels: int = 1, classes: int = 4, width: int = 16, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if norm not in ("batch", "instance"):
            raise ValueError(f"norm must be 'batch' or 'instance': got {norm!r}; pass one of them")
        self.encode1 = _double_conv(in_channels, width, norm)
        self.encode2 = _double_conv(width, 2 * width, norm)
        self.bottom = _double_conv(2 * width, 4 * width, norm)
        self.up2 = nn.ConvTranspose3d(4 * width, 2 * width, 2, stride=2)
        self.decode2 = _double_conv(4 * width, 2 * width, norm)
        self.up1 = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.decode1 = _double_conv(2 * width, width, norm)
        self.pool = nn.MaxPool3d(2)
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, D, H, W], sides multiples of 4, to logits [B, classes, D, H, W]."""
        fine = self.encode1(x)
        middle = self.encode2(self.pool(fine))
        coarse = self.bottom(self.pool(middle))
        y = self.decode2(torch.cat((middle, self.up2(coarse)), dim=1))
        y = self.decode1(torch.cat((fine, self.up1(y)), dim=1))
        out: Tensor = self.head(y)
        return out


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, then a GELU network of 4 * width, over channels innermost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] to [B, width, H, W]."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out: Tensor = x + (self.mlp(y) * self.scale).permute(0, 3, 1, 2)
        return out


class ConvNeXt(nn.Module):
    """Convolutions in the shape of a transformer (Liu 2022)."""

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        before, stages = 3, list[nn.Module]()
        for level, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            size = 2 if level else 4
            norm = _ChannelNorm(before) if level else nn.Identity()
            down = (norm, nn.Conv2d(before, width, size, stride=size))
            stages += [*down, *([] if level else [_ChannelNorm(width)])]
            stages += [ConvNeXtBlock(width) for _ in range(depth)]
            before = width
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.LayerNorm(before, eps=1e-6), nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, num_classes]."""
        out: Tensor = self.head(self.norm(self.stages(x).mean((2, 3))))
        return out


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Sequential):
    """Three hidden ReLU layers: [B, features] to logits [B, classes]."""

    def __init__(self, features: int = 64, classes: int = 10, width: int = 256) -> None:
        super().__init__(
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )


class VolumeNet(nn.Sequential):
    """One-channel volumes through a wide stem: [B, 1, D, H, W] to logits [B, classes]."""

    def __init__(self, classes: int = 4, width: int = 32) -> None:
        super().__init__(
            nn.Conv3d(1, width, 7, stride=2, padding=3),
            nn.GELU(),
            nn.Conv3d(width, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv3d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(2 * width, classes),
        )


def resnet50(num_classes: int = 1000, *, seed: int = 0) -> ResNet:
    """ResNet-50 v1.5: [B, 3, H, W] to [B, num_classes], 25.6 M parameters at 1000 classes."""
    return _built(lambda: ResNet(num_classes=num_classes), seed, (4, 3, 96, 96))


def vit_b16(
    num_classes: int = 1000, image: int = 224, *, depth: int = 12, seed: int = 0
) -> VisionTransformer:
    """ViT-B/16: [B, 3, image, image] to [B, num_classes], 86.6 M parameters by default."""
    return _built(lambda: VisionTransformer(num_classes, image, depth=depth), seed)


def convnext_t(num_classes: int = 1000, *, seed: int = 0) -> ConvNeXt:
    """ConvNeXt-T: [B, 3, H, W] to [B, num_classes], 28.6 M parameters at 1000 classes."""
    return _built(lambda: ConvNeXt(num_classes=num_classes), seed)


def unet3d(
    in_channels: int = 1, classes: int = 4, width: int = 16, norm: Norm = "batch", *, seed: int = 0
) -> UNet3d:
    """3-D U-Net: [B, in_channels, D, H, W] to [B, classes, D, H, W], sides multiples of 4."""
    calibration = (2, in_channels, 16, 16, 16)
    return _built(lambda: UNet3d(in_channels, classes, width, norm), seed, calibration)


def mlp(features: int = 64, classes: int = 10, *, seed: int = 0) -> MLP:
    """Three hidden layers of 256: [B, features] to [B, classes]."""
    return _built(lambda: MLP(features, classes), seed)


def volume_net(classes: int = 4, width: int = 32, *, seed: int = 0) -> VolumeNet:
    """A 7x7x7 stem over one channel, which is most of its work: [B, 1, D, H, W] to [B, classes]."""
    return _built(lambda: VolumeNet(classes, width), seed)


def small_cnn(classes: int = 10, *, seed: int = 0) -> nn.Sequential:
    """Three normalised and pooled 3x3 convolutions of 16, 32, 64: [B, 3, H, W] to [B, classes]."""

    def make() -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels, width in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
        return nn.Sequential(*layers, *head)

    return _built(make, seed, (4, 3, 32, 32))


def small_mlp(features: int = 30, classes: int = 5, *, seed: int = 0) -> nn.Sequential:
    """Two hidden ReLU layers of 128: [B, features] to [B, classes]."""

    def make() -> nn.Sequential:
        hidden = (nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(128, classes))

    return _built(make, seed)


def _digits() -> nn.Module:
    # Late, so that the other workloads need nothing of the library they measure.
    from saliency_fast.zoo import digits_cnn

    model: nn.Module = digits_cnn()
    return model


def _built(
    make: Callable[[], ModelT], seed: int, calibration: tuple[int, ...] | None = None
) -> ModelT:
    """The model on the CPU in float32 and eval mode; `calibration` is an input shape [B, ...]."""
    # PyTorch's own initialisers draw from the global generator; on the meta device they do nothing.
    with torch.device("meta"):
        model = make()
    model = model.float().to_empty(device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    _initialise(model, generator)
    if calibration is not None:
        calibrate(model, calibration, generator)
    return model.eval()


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter: He normal weights (He 2015), norms near one, small biases."""
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS):
            module.reset_running_stats()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) and name == "weight":
                # Away from one, so that a dropped or swapped scale is seen.
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name == "weight":
                parameter.normal_(0.0, math.sqrt(2.0 / _fan_in(module)), generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            # As training leaves them: at full strength sixteen branches amplify rounding until a
            # float32 gradient is off by percents, for every contender.
            module.bn3.weight *= 0.2


def _fan_in(module: nn.Module) -> int:
    """How many inputs each output of a convolution or linear layer adds up."""
    if isinstance(module, nn.ConvTranspose3d):
        # Stride equals kernel: windows do not overlap, one tap of each input channel.
        return module.in_channels
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        return module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return module.in_features
    raise TypeError(
        f"no initialisation for {type(module).__name__}.weight: expected a convolution or a linear "
        "layer; add its fan-in here"
    )


@torch.no_grad()
def calibrate(model: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Set BatchNorm's running statistics to the average over a few random batches of `shape`."""
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        # None is PyTorch's plain average; a momentum of 0.1 would keep most of the initial 0 and 1.
        norm.momentum = None
    model.train()
    for _ in range(_PASSES):
        model(torch.randn(shape, generator=generator, device="cpu"))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@dataclass(frozen=True)
class Workload:
    """One row of the benchmarks: a model, the shape of its inputs and what is explained.

    name: the key in `WORKLOADS`.
    build: makes the model, float32, on the CPU, in eval mode.
    shape: one input, without the batch dimension.
    target: an output index [class], or a leading tuple of one; what is left over is summed.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"shape must hold positive sizes: got {self.shape}; "
                "pass one input's shape without the batch"
            )

    def inputs(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal inputs [batch, *shape] on the CPU.

        Item i is the same whatever the batch, and, up to rounding, whatever the dtype.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1: got {batch}; pass a positive number")
        generator = torch.Generator("cpu").manual_seed(seed)
        examples = [
            torch.randn(self.shape, generator=generator, dtype=torch.float32, device="cpu")
            for _ in range(batch)
        ]
        return torch.stack(examples).to(dtype)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("resnet50", resnet50, (3, 224, 224), 283),
        Workload("vit_b16", vit_b16, (3, 224, 224), 283),
        Workload("unet3d", unet3d, (1, 64, 64, 64), (1,)),
        Workload("mlp", mlp, (64,), 3),
        Workload("digits", _digits, (1, 64, 64), 3),
    )
}
