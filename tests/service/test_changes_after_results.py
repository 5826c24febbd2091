"""Whoever has a result may change the model: nothing is put back."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import saliency_fast as sf


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gain = nn.Linear(6, 8), nn.Linear(8, 3), 1
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()) * self.gain


def test_a_model_is_the_callers_once_there_is_a_result() -> None:
    model, x = Changed().eval(), torch.randn(3, 6)
    with sf.Engine(model, "gradient") as engine:
        for number in range(60):
            engine.submit(x, 1).result()
            weight = nn.Parameter(torch.randn(3, 8))
            model.gain, model.last.weight = number, weight
            model.train(number % 2 == 0)
            with torch.no_grad():
                model.count.fill_(number)
            time.sleep(0.002)
            assert model.gain == number
            assert model.last.weight is weight
            assert model.training == (number % 2 == 0)
            assert float(model.count) == number
            model.eval()
