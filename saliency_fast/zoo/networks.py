"""Two small classifiers of cluttered digits, one of each kind that attribution meets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

_DATA = Path(__file__).parent / "data"


class DigitsCNN(nn.Module):
    """Strided convolutions, BatchNorm, ReLU and max-pooling: [B, 1, 64, 64] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(1, 16),
            nn.MaxPool2d(2),
            _convolution(16, 32),
            _convolution(32, 48, stride=2),
            _convolution(48, 64),
            _convolution(64, 96, stride=2),
            _convolution(96, 112),
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(112, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(images)).flatten(1))
        return logits


class DigitsViT(nn.Module):
    """Convolutional stem, 64 tokens, maximum over tokens: [B, 1, 64, 64] to logits [B, 10]. Pre-
    LayerNorm blocks and GELU (Dosovitskiy et al., 2021), stem after Xiao et al. (2021).
    """

    def __init__(self, width: int = 64, depth: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            ChannelNorm(24),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            ChannelNorm(48),
            nn.GELU(),
            nn.Conv2d(48, width, 4, stride=2, padding=1),
        )
        self.norm_patches = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for layer in self.stem:
            if isinstance(layer, nn.Conv2d):
                # Strokes must outweigh the random biases; the biases stay, for without them a black
                # region is all zeros, where LayerNorm's gradient is 1 / sqrt(eps).
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.stem(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(self.norm_patches(patches) + self.positions)
        logits: Tensor = self.head(self.norm(tokens).amax(dim=1))
        return logits


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel: [B, C, H, W] to [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return normed


class Block(nn.Module):
    """One pre-LayerNorm transformer block: tokens [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_attention(tokens))
        mixed: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return mixed


class Attention(nn.Module):
    """Multi-head self-attention: tokens [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # [B, T, 3 D] -> three of [B, heads, T, D / heads]
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def digits_cnn() -> nn.Module:
    """The trained `DigitsCNN` in evaluation mode: float32 [B, 1, 64, 64] in [0, 1] to [B, 10].

    Example:
        >>> import torch
        >>> from saliency_fast import zoo
        >>> zoo.digits_cnn()(torch.zeros(2, 1, 64, 64)).shape
        torch.Size([2, 10])
    """
    return _trained(DigitsCNN, "digits_cnn.safetensors")


def digits_vit() -> nn.Module:
    """The trained `DigitsViT` in evaluation mode: float32 [B, 1, 64, 64] in [0, 1] to [B, 10].

    Example:
        >>> import torch
        >>> from saliency_fast import zoo
        >>> zoo.digits_vit()(torch.zeros(2, 1, 64, 64)).shape
        torch.Size([2, 10])
    """
    return _trained(DigitsViT, "digits_vit.safetensors")


MODELS: dict[str, Callable[[], nn.Module]] = {"digits": digits_cnn, "digits-vit": digits_vit}


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        # BatchNorm's shift makes a bias here redundant.
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _trained(build: Callable[[], nn.Module], file: str) -> nn.Module:
    # On "meta" nothing is drawn, so the caller's random state stays as it was.
    with torch.device("meta"):
        model = build()
    model.load_state_dict(load_file(_DATA / file), assign=True)
    return model.eval()
