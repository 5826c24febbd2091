"""Models with layers of every kind that the facade is compared at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Worded(nn.Module):
    """Token ids [B, T] through embeddings and attention, whose layer gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.words(ids) + self.places(places)
        y, weights = self.attention(x, x, x)
        z = functional.relu(self.norm(x + y)) * (1 + weights.mean(1)[..., None])
        if mask is not None:
            z = z * mask[..., None]
        return self.head(z.mean(1))


class Pair(nn.Module):
    """A layer of two inputs and two outputs."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(a * b), a.relu()


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 6), nn.Linear(7, 6)
        self.pair, self.head = Pair(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(self.first(x), self.second(x))
        return self.head(a - 2.0 * b)


class Rectified(nn.Module):
    """ReLU modules, one of them in place, and pools of their rank."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        pool: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
        mean: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
        self.body = nn.Sequential(
            *(conv(2, 5, 3, padding=1), nn.ReLU(inplace=True), pool(2)),
            *(conv(5, 4, 3, padding=1), nn.ReLU(), mean(2)),
        )
        self.flat, self.head = nn.Flatten(), nn.Linear(4 * 2**axes, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.body(x)))


class Line(Rectified):
    def __init__(self) -> None:
        super().__init__(1)


class Plane(Rectified):
    def __init__(self) -> None:
        super().__init__(2)


class Space(Rectified):
    def __init__(self) -> None:
        super().__init__(3)


class Smooth(nn.Sequential):
    """The nonlinearities that Captum's DeepLift knows, and softmax over the classes."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Linear(7, 9), nn.ELU(), nn.Linear(9, 9), nn.LeakyReLU(0.1), nn.Linear(9, 8)),
            *(nn.Sigmoid(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 6), nn.Tanh()),
            *(nn.Linear(6, 5), nn.Softmax(dim=1)),
        )


class Residual(nn.Module):
    """Batch norm, a skip connection and a mean outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.second, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2)
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x)))
        y = functional.relu(self.second(y) + y)
        return self.head(self.drop(self.pool(y).mean((2, 3))))


class Again(nn.Module):
    """A rectifier that runs three times, the last time behind a skip connection."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        return self.head(self.act(self.act(self.second(y)) + y - 0.2).mean((2, 3)))


class AgainInPlace(Again):
    def __init__(self) -> None:
        super().__init__(inplace=True)


class Joined(nn.Module):
    """A picture and a table, each with a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = Plane()
        self.table = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.picture(x) + self.table(row)


RANKS = {Line: (2, 8), Plane: (2, 8, 8), Space: (2, 8, 8, 8)}
IDS = torch.arange(15).view(3, 5) * 7 % 11
MASK = torch.ones(3, 5).double().tril(2)
