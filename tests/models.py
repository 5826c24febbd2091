"""Small models of every input rank, seeded, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tabular(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 5))


class Audio(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(2, 6, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 14, 5)
        )


class Image(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(32, 5),
        )


class Video(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 4, 3), nn.ELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5)
        )


class Tokens(nn.Module):
    """Embeddings [B, T, E] to classes through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head((x + y).mean(1))


class Segmenter(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 4, 1))


class Multimodal(nn.Module):
    """An image and a table; the scores need both."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = Image(), Tabular()

    def forward(self, image: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
        found = self.image(image) * torch.sigmoid(self.table(table))
        return found if scale is None else found * scale[:, None]


class Scalar(nn.Module):
    """One number per example."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.softplus(x.flatten(1)).sum(1) ** 1.5


SHAPES = {
    Tabular: (7,),
    Audio: (2, 32),
    Image: (3, 12, 12),
    Video: (2, 5, 7, 6),
    Tokens: (6, 8),
}


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in evaluation mode whose running statistics are not the trivial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
