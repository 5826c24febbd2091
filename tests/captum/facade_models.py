"""Models that the facade is compared on, beside those of tests.models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Sentence(nn.Module):
    """Embeddings with token ids, a switch and a mask behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor, loud: bool, extra: Any) -> Tensor:
        y = torch.tanh(x * self.table(ids)) * mask[..., None]
        return self.head(y.sum(1)) * (2.0 if loud else 1.0) * extra["scale"]


class Two(nn.Module):
    """Inputs [B] each, one number per example."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(torch.relu(a) - 1 - torch.relu(b)) + a.sigmoid() * b


class OneNumber(nn.Module):
    """One number for a whole batch, in a tensor [1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin().sum().reshape(1)


class Shared(nn.Module):
    """Inputs of two lengths: one row serves all."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.tanh() * weight).sum(1)


class Normed(nn.Sequential):
    """Batch norm and no dropout: in training mode rows depend on each other."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 4), nn.BatchNorm1d(4)
        )


def squared_gradients(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: Any = None,
    additional_forward_args: Any = None,
) -> tuple[Tensor, ...]:
    """A gradient function of a user's own: of the squared score."""
    further = additional_forward_args or ()
    output = forward_fn(*inputs, *further)
    rows = torch.arange(len(output))
    target = torch.as_tensor(target_ind).expand(len(output))
    return torch.autograd.grad(output[rows, target].square().sum(), inputs)
