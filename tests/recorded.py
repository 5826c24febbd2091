"""Calls whose records, written with schema 1 by an early version, lie in tests/records/."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saliency_fast as sf


def dyadic(*shape: int) -> Tensor:
    """Numbers that every machine and every release of PyTorch makes alike: eighths in [-1, 1]."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 5 % 17 - 8) / 8).reshape(shape)


def with_weights(model: nn.Module) -> nn.Module:
    """The model with weights from `dyadic`."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(dyadic(*weight.shape) / 2)
    return model.eval()


def image_model() -> nn.Module:
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3), nn.Tanh()
    return with_weights(nn.Sequential(*layers))


def table_model() -> nn.Module:
    return with_weights(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right)


def pair_model() -> nn.Module:
    return with_weights(Pair())


class Sequence(nn.Module):
    """Scores of 5 tokens behind every step [B, T, 4], as a language model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(torch.tanh(self.cell(steps)).cumsum(1))


def sequence_model() -> nn.Module:
    return with_weights(Sequence())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


def dense_model() -> nn.Module:
    return with_weights(Dense())


def summed_squares(x: Tensor) -> Tensor:
    """A model that is no module."""
    return x.square().sum(1)


IMAGE, TABLE = dyadic(2, 1, 5, 5), dyadic(2, 4)


class Call(NamedTuple):
    """model: makes the model; options: of `explain`."""

    model: Any
    inputs: Any
    options: dict[str, Any]


CALLS: dict[str, Call] = {
    "classes": Call(
        image_model,
        IMAGE,
        {"target": [0, 2], "method": sf.IntegratedGradients(steps=3), "baseline": "mean"},
    ),
    "several": Call(
        image_model, IMAGE, {"target": [[0, 1], [2, 0]], "method": sf.SmoothGrad(samples=2)}
    ),
    "predicted": Call(
        image_model,
        IMAGE,
        {
            "target": "predicted",
            "method": sf.FeatureAblation(),
            "features": (torch.arange(25) // 5).reshape(1, 1, 5, 5),
        },
    ),
    "scalar": Call(summed_squares, TABLE, {"method": sf.SmoothGrad(samples=2, seed=(4, 9))}),
    "places": Call(dense_model, IMAGE, {"target": [(0, 1, 2), (2, 4, 0)], "method": "gradient"}),
    "index": Call(
        dense_model,
        IMAGE,
        {
            "target": (1, slice(0, 3), ..., dyadic(3, 5) > 0),
            "method": sf.IntegratedGradients(steps=2),
            "baseline": [None, 0.5, dyadic(5, 5)],
            "region": [(1, 4), (2, 5)],
            "layout": "BCHW",
        },
    ),
    "tolerance": Call(
        table_model, TABLE, {"target": 1, "method": sf.IntegratedGradients(4, tolerance=0.1)}
    ),
    "tuple": Call(
        pair_model,
        (TABLE, dyadic(2, 3)),
        {
            "target": 0,
            "baseline": (None, dyadic(3)),
            "method": sf.IntegratedGradients(steps=2, rule="right"),
        },
    ),
    "set": Call(
        table_model,
        TABLE,
        {"target": 2, "method": sf.ExpectedGradients(4), "baseline": dyadic(3, 4)},
    ),
    "next_token": Call(
        sequence_model,
        dyadic(2, 3, 4),
        {"target": sf.NextToken(torch.tensor([1, 4])), "method": "input_x_gradient"},
    ),
    "layer": Call(image_model, IMAGE, {"target": 1, "method": sf.GradCAM("0")}),
    "together": Call(
        table_model, TABLE, {"target": 0, "rows": "together", "method": "input_x_gradient"}
    ),
    "half": Call(
        image_model,
        IMAGE,
        {"target": 1, "precision": "bfloat16", "method": sf.IntegratedGradients(steps=4)},
    ),
    "double": Call(
        table_model, TABLE.double(), {"target": 1, "method": "gradient", "baseline": None}
    ),
    "nested": Call(
        sequence_model,
        dyadic(2, 3, 4),
        {
            "target": (2, 1),
            "method": sf.TemporalRescaling(sf.IntegratedGradients(steps=2)),
            "layout": "BTF",
        },
    ),
}


def model_of(name: str) -> Any:
    """The model of a call; plain functions are not made."""
    call = CALLS[name]
    model = call.model if call.model is summed_squares else call.model()
    return model.double() if name == "double" else model
