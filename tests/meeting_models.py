"""Models whose rows meet: an example scores alone something else than beside others."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Meeting(nn.Module):
    """A small network behind `first`, which looks at all rows."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x)))


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.max() > 1.5 else x


def loop(x: Tensor) -> Tensor:
    while float(x.abs().max()) > 0.5:
        x = x / 2
    return x


def quantised(x: Tensor) -> Tensor:
    scale = x.abs().max().detach() / 15 + 1e-6
    return x + ((x / scale).round() * scale - x).detach()


def capacity(x: Tensor) -> Tensor:
    """Two experts that take two rows each; what is more goes by."""
    to = (x.mean((1, 2, 3)) > x.std((1, 2, 3))).long()
    place = F.one_hot(to, 2).cumsum(0).gather(1, to[:, None])[:, 0]
    return torch.where((place <= 2)[:, None, None, None], x * (2.0 + to[:, None, None, None]), x)


def recurrent(x: Tensor) -> Tensor:
    """A recurrent network whose time is the axis of the rows."""
    torch.manual_seed(0)
    net = nn.GRU(x.shape[-1], x.shape[-1], dtype=x.dtype)
    with torch.no_grad():
        for one in net.parameters():
            one.requires_grad_(False)
    return net(x[:, 0])[0][:, None]


FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "standardised": lambda x: (x - x.mean()) / (x.std() + 1e-3),
    "largest": lambda x: x / (x.max() + 0.1),
    "smallest": lambda x: x - x.amin((0, 2, 3), keepdim=True),
    "median": lambda x: x - x.median(),
    "quantile": lambda x: x / (0.1 + x.abs().quantile(0.9)),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True, momentum=0.0),
    "softmax over rows": lambda x: x.softmax(0),
    "mean over rows": lambda x: x - x.mean(0),
    "sums over rows": lambda x: x.cumsum(0),
    "neighbours": lambda x: x + 0.5 * x.roll(1, 0),
    "backwards": lambda x: x + x.flip(0),
    "sorted": lambda x: x + 0.1 * x.sort(0).values,
    "attention": lambda x: x + torch.softmax(x.flatten(1) @ x.flatten(1).T, -1).mean(0).sum() * x,
    "pairs": lambda x: x + 0.01 * torch.einsum("bchw,dchw->b", x, x)[:, None, None, None],
    "number of rows": lambda x: x * len(x),
    "branch on the number of rows": lambda x: 2 * x if len(x) > 2 else x,
    "convolved rows": lambda x: x + F.avg_pool1d(x.flatten(1).T[None], 3, 1, 1)[0].T.view_as(x),
    "transformed rows": lambda x: x + 0.1 * torch.fft.fft(x, dim=0).real,
    "norm": lambda x: x / (1 + torch.linalg.vector_norm(x)),
    "branch": branch,
    "loop": loop,
    "quantised": quantised,
    "capacity": capacity,
    "recurrent": recurrent,
}


def meeting(name: str) -> Meeting:
    """One of the models, in float64."""
    torch.manual_seed(3)
    return Meeting(FIRST[name]).double().eval()


def without_statistics() -> nn.Module:
    """Batch normalisation that has no running statistics."""
    torch.manual_seed(3)
    first = nn.BatchNorm2d(1, affine=False, track_running_stats=False)
    return nn.Sequential(first, *Meeting(F.relu).body, nn.Linear(16, 3)).double().eval()
