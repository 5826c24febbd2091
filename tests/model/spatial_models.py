"""Small networks of the usual kinds, and the layer a class activation map is taken at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block with one ReLU module for both of its activations, as torchvision's have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(6), Block(6))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.layer1(self.stem(x))).flatten(1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(32, 7), nn.ReLU(True), nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseNet(nn.Module):
    """Channels are concatenated, and what is behind the last norm is functional."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.grow = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = functional.relu(self.norm(torch.cat([y, self.grow(y)], 1)))
        return self.classifier(functional.adaptive_avg_pool2d(y, 1).flatten(1))


class UNet3d(nn.Module):
    """Segments a volume: its output is spatial too."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool3d(2)
        self.bottom = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.merge = nn.Sequential(nn.Conv3d(8, 4, 3, padding=1), nn.ReLU())
        self.out = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.down(x)
        y = self.up(self.bottom(self.pool(kept)))
        return torch.softmax(self.out(self.merge(torch.cat([kept, y], 1))), 1)


class Attention(nn.Module):
    """Self-attention as timm writes it, with the weights in sight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(-1)
        self.drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
        weights = self.drop(self.softmax(q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5))
        return self.proj((weights @ v).transpose(1, 2).reshape(rows, tokens, width))


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of `patch`, a class token in front, whose output alone is classified."""

    def __init__(self, rank: int = 2, patch: int = 4, width: int = 8) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.patch_embed = convolution(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(ViTBlock(width), ViTBlock(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class Encoder(nn.Module):
    """PyTorch's own transformer layers on a sequence [B, T, E], averaged."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Swin(nn.Module):
    """Channels last [B, H, W, C], averaged over places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.block = ViTBlock(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).permute(0, 2, 3, 1)
        y = self.block(y.flatten(1, 2)).view(y.shape)
        return self.head(self.norm(y).mean((1, 2)))


class ConvLSTM(nn.Module):
    """A convolution, then a recurrence of which the last step is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.Tanh())
        self.lstm = nn.LSTM(6, 7, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.conv(x).transpose(1, 2))[0][:, -1])


# kind: (shape of an example, the layer "auto" finds)
LAYERS: dict[type[nn.Module], tuple[tuple[int, ...], str]] = {
    ResNet: ((3, 12, 16), "layer1"),
    VGG: ((3, 12, 16), "features.4"),
    DenseNet: ((3, 12, 16), "norm"),
    UNet3d: ((1, 4, 6, 8), "merge"),
    ViT: ((3, 12, 16), "blocks.1.norm1"),
    Encoder: ((9, 8), "encoder.layers.1.norm1"),
    Swin: ((3, 12, 16), "norm"),
    ConvLSTM: ((3, 11), "conv"),
}
