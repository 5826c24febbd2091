"""Models under backward rules, without an engine; models whose activations come in many forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.rules.intercept import RulesExecutor
from tests.models import randn


def ruled(model: Any, rules: Any, x: Tensor, target: Any, baseline: Tensor | None = None) -> Tensor:
    """What the rules give at the points x [B, *]; `baseline` [B, *] where they compare."""
    leaf = x.clone().requires_grad_()
    points = leaf.view_as(leaf) if baseline is None else torch.cat([leaf, baseline])
    raw = RulesExecutor(model, rules)([points], (), {})[: len(x)]
    score = raw[torch.arange(len(x)), torch.as_tensor(target)]
    cotangent = score.detach() if rules.relevance else torch.ones_like(score)
    return torch.autograd.grad(score, leaf, cotangent)[0]


def scores(model: Any, x: Tensor, target: Any) -> Tensor:
    with torch.no_grad():
        return model(x)[torch.arange(len(x)), torch.as_tensor(target)]


class Row(nn.Sequential):
    """Layers in a row, flat before the first linear one (Captum's LRP knows no Flatten)."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
        return x


def _convolutions(axes: int, act: Callable[[], nn.Module], bias: bool) -> Row:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
    mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    return Row(
        conv(2, 4, 3, padding=1, bias=bias),
        act(),
        pool(2),
        conv(4, 6, 3, stride=2, padding=1, bias=bias),
        act(),
        mean(1),
        nn.Linear(6, 8, bias=bias),
        act(),
        nn.Linear(8, 4, bias=bias),
    )


class TokenMixer(nn.Module):
    """Embeddings [B, T, E] to classes: a residual block of linear layers per token."""

    def __init__(self, act: Callable[[], nn.Module], bias: bool) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 12, bias=bias), act(), nn.Linear(12, 6, bias)
        self.head = nn.Linear(6, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.down(self.act(self.up(x)))).mean(1))


class Residual(nn.Module):
    """A residual image network with batch normalisation and additions in place."""

    def __init__(self, act: Callable[[], nn.Module], bias: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=bias) for _ in range(2))
        self.head, self.act = nn.Linear(4, 4, bias=bias), act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        out = self.second(self.act(self.first(x)))
        out += x
        return self.head(self.act(out).mean((2, 3)))


SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (7,),
    "1-d": (2, 16),
    "2-d": (2, 9, 8),
    "3-d": (2, 6, 5, 6),
    "tokens": (5, 6),
    "residual": (2, 6, 7),
}


def network(kind: str, act: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Module:
    """A float64 model of 4 classes, in evaluation mode; without biases where not `bias`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: nn.Module
        if kind == "mlp":
            model = Row(nn.Linear(7, 9, bias), act(), nn.Linear(9, 8, bias), act(), nn.Linear(8, 4))
            if not bias:
                model[4].bias = None
        elif kind == "tokens":
            model = TokenMixer(act, bias)
        elif kind == "residual":
            model = Residual(act, bias)
            model.norm.running_var.uniform_(0.5, 2.0)
            if bias:
                model.norm.running_mean.normal_()
        else:
            model = _convolutions(int(kind[0]), act, bias)
    return model.double().eval()


def points(kind: str, count: int = 3, seed: int = 0) -> Tensor:
    return randn(count, *SHAPES[kind], seed=seed)


class Functional(nn.Module):
    """`act` where a module would be; a copy first, so that it may work in place."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


RELUS: dict[str, Callable[[], nn.Module]] = {
    "module in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: Functional(F.relu),
    "F.relu in place": lambda: Functional(lambda x: F.relu(x, inplace=True)),
    "F.relu_": lambda: Functional(F.relu_),
    "torch.relu": lambda: Functional(torch.relu),
    "torch.relu_": lambda: Functional(torch.relu_),
    "method": lambda: Functional(lambda x: x.relu()),
    "method in place": lambda: Functional(lambda x: x.relu_()),
    "clamp": lambda: Functional(lambda x: x.clamp(min=0)),
    "clamp in place": lambda: Functional(lambda x: x.clamp_(0)),
    "torch.clamp_min": lambda: Functional(lambda x: torch.clamp_min(x, 0.0)),
    "threshold": lambda: nn.Threshold(0, 0),
    "aten": lambda: Functional(torch.ops.aten.relu),
}
