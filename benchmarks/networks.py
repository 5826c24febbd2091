"""Eight networks of different kinds, with inputs and baselines, on which quadrature is compared.

The built-in ones; four trained here, in seconds, on data that packages ship (scikit-learn's digits
and breast cancer table, photographs of scikit-image cut into pieces, text and code of the standard
library); a ResNet-50 and a 3-D U-Net with random weights.
"""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import resnet50, unet3d
from saliency_fast import zoo

PHOTOGRAPHS = ("brick", "grass", "gravel", "camera", "coins", "astronaut", "coffee", "retina")
LETTERS, LENGTH, WIDTH = 96, 40, 64


@dataclass(frozen=True)
class Network:
    """A model, inputs [B, *] and baselines [1 | B, *] by name."""

    model: nn.Module
    x: Tensor
    baselines: dict[str, Tensor]


def blurred(x: Tensor, radius: int) -> Tensor:
    """The mean of each square neighbourhood."""
    return F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float = 3e-3) -> nn.Module:
    """The model in eval mode, trained on batches of 64; draws from a generator of its own."""
    generator, count = torch.Generator().manual_seed(0), len(x) // 64 * 64
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * (count // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator)[:count].split(64):
            optimiser.zero_grad()
            F.cross_entropy(model.train()(x[batch]), y[batch]).backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def _built_in(name: str) -> Network:
    x = zoo.held_out().images[:4]
    mean = x.mean().expand_as(x[:1]).clone()
    starts = {"black": torch.zeros_like(x[:1]), "mean": mean, "blurred": blurred(x, 5)}
    return Network(zoo.MODELS[name](), x, starts)


def small_digits() -> Network:
    """SiLU, batch normalisation and pooling, on 8x8 digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    parts: list[nn.Module] = []
    for before, after in ((1, 24), (24, 32)):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
    parts += [nn.MaxPool2d(2), nn.Conv2d(32, 48, 3, padding=1), nn.SiLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    train(model, x[:1500], y[:1500], 12)
    white, mean = torch.ones(1, 1, 8, 8), x[:1500].mean(0, keepdim=True)
    return Network(model, x[1500:1504], {"black": 0 * white, "mean": mean, "white": white})


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


def photographs() -> Network:
    """A residual network that tells photographs apart by pieces of 32x32."""
    import skimage.data

    draw, pieces, labels = np.random.default_rng(0), list[Tensor](), list[int]()
    for label, name in enumerate(PHOTOGRAPHS):
        image = np.atleast_3d(getattr(skimage.data, name)())[..., :3].astype(np.float32) / 255
        image = np.broadcast_to(image, (*image.shape[:2], 3))
        for _ in range(150):
            i, j = (int(draw.integers(0, size - 64)) for size in image.shape[:2])
            piece = torch.tensor(image[i : i + 64, j : j + 64].copy()).permute(2, 0, 1)
            pieces.append(F.avg_pool2d(piece[None], 2))
            labels.append(label)
    order = torch.tensor(draw.permutation(len(labels)))
    x, y = torch.cat(pieces)[order], torch.tensor(labels)[order]
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x = (x - mean) / deviation
    stem = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), _Residual(32)]
    body = [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), _Residual(64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(PHOTOGRAPHS))]
    model = train(nn.Sequential(*stem, *body, *head), x[:1000], y[:1000], 8)
    black, x = (-mean / deviation).expand(1, 3, 32, 32).clone(), x[1000:1004]
    return Network(
        model, x, {"black": black, "mean": torch.zeros_like(black), "blurred": blurred(x, 5)}
    )


def table() -> Network:
    """A multi-layer perceptron on the breast cancer table, standardised."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x, y = torch.tensor(data.data).float(), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
    layers = [nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)]
    model = train(nn.Sequential(*layers), x[:450], y[:450], 30)
    starts = {"mean": torch.zeros(1, 30), "lowest": x.min(0, keepdim=True)[0], "another": x[:1]}
    return Network(model, x[450:454], starts)


class _Encoder(nn.Module):
    """A transformer over embeddings [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, "gelu", 1e-5, True, True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(x + self.places)).mean(1))
        return logits


def text() -> Network:
    """Whether 40 characters are documentation or code of the standard library, in embeddings."""
    modules = (argparse, json, textwrap, os, sys, inspect)
    members = [one for module in modules for one in vars(module).values() if callable(one)]
    prose = "".join(inspect.getdoc(one) or "" for one in members)
    code = "".join(inspect.getsource(one) for one in (argparse, textwrap, json.decoder))
    draw, rows = np.random.default_rng(0), list[list[int]]()
    for source in (prose, code):
        numbers = [min(max(ord(letter) - 32, 0), LETTERS - 1) for letter in source]
        starts = draw.integers(0, len(numbers) - LENGTH, 900)
        rows += [numbers[start : start + LENGTH] for start in starts]
    order = torch.tensor(draw.permutation(len(rows)))
    x, y = torch.tensor(rows)[order], (torch.arange(len(rows)) >= 900).long()[order]
    encoder, embedding = _Encoder(), nn.Embedding(LETTERS, WIDTH)
    train(nn.Sequential(embedding, encoder), x[:1600], y[:1600], 8, 1e-3)
    blank = embedding(torch.zeros(1, LENGTH, dtype=torch.int64))
    mean = embedding.weight.mean(0).expand(1, LENGTH, WIDTH).clone()
    starts = {"zeros": torch.zeros_like(blank), "blanks": blank, "mean": mean}
    return Network(encoder, embedding(x[1600:1604]), starts)


def residual() -> Network:
    """ResNet-50 with random weights, on a photograph of 64x64 and its darker mirror image."""
    import skimage.data

    image = torch.tensor(skimage.data.astronaut()[:448, :448]).permute(2, 0, 1)[None] / 255
    x = (F.avg_pool2d(image, 7) - 0.45) / 0.225
    x = torch.cat([x, x.flip(2) * 0.5])
    mean = torch.zeros(1, 3, 64, 64)
    return Network(resnet50(), x, {"black": mean - 2, "mean": mean, "blurred": blurred(x, 7)})


class _MeanScores(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x).flatten(2).mean(2)
        return scores


def volume() -> Network:
    """3-D U-Net with random weights, mean scores over a ball with a core in noise, 24 cubed."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 24)] * 3, indexing="ij"))
    radius = grid.norm(dim=0)
    ball = (radius < 0.7).float() + 0.3 * (radius < 0.4)
    x = (ball + 0.05 * torch.randn(ball.shape, generator=draw))[None, None]
    mean, noise = x.mean().expand_as(x).clone(), 0.3 * torch.randn(x.shape, generator=draw)
    starts = {"zeros": torch.zeros_like(x), "mean": mean, "noise": noise}
    return Network(_MeanScores(unet3d()), x, starts)


NETWORKS: dict[str, Callable[[], Network]] = {
    "digits": lambda: _built_in("digits"),
    "digits-vit": lambda: _built_in("digits-vit"),
    "small-digits": small_digits,
    "photographs": photographs,
    "table": table,
    "text": text,
    "resnet50": residual,
    "unet3d": volume,
}


def build(name: str) -> Network:
    """A network by name; what is drawn leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]()
