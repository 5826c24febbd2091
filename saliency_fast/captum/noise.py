"""Noise: what stochastic methods draw, from seeds that PyTorch's global generator gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.points import Noise, first_elements
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.smoothgrad import samples_level

CHUNK = 64 * 1024**2
"""Bytes of noisy inputs that are held at once, unless the caller says how many."""


def read_stdevs(stdevs: Any, inputs: Inputs) -> tuple[float, ...]:
    """One standard deviation per input."""
    if not isinstance(stdevs, tuple):
        if not isinstance(stdevs, float):
            raise ContractError(
                f"stdevs must be type float. Given: {type(stdevs)}; pass float(stdevs), or a tuple "
                "with one for each input"
            )
        return (stdevs,) * len(inputs)
    if len(stdevs) != len(inputs):
        raise ContractError(
            f"The number of input tensors in {len(inputs)} must be equal to the number of stdevs "
            f"values {len(stdevs)}"
        )
    return tuple(map(float, stdevs))


def draw_seeds(batch: int) -> Tensor:
    """A seed for each example, int64 [B]: examples of one batch have noise of their own."""
    return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device="cpu")


def samples_at_once(inputs: Inputs, samples: int) -> int:
    """How many noisy copies of the batch fit into `CHUNK`; one at least."""
    each = sum(x.numel() * x.element_size() for x in inputs)
    return min(samples, max(1, CHUNK // max(1, each)))


def noisy(
    inputs: Inputs, stdevs: tuple[float, ...], seeds: Tensor, start: int, stop: int
) -> Inputs:
    """Samples `start` to `stop` of every example, [B * samples, *], example-major."""
    count, device = stop - start, inputs[0].device
    found = []
    for x, stdev, first in zip(inputs, stdevs, first_elements(inputs), strict=True):
        item = torch.arange(len(x), device=device).repeat_interleave(count)
        sample = torch.arange(start, stop, device=device).repeat(len(x))
        sigma = torch.full((len(x),), stdev, dtype=torch.float64, device=device)
        plain = x.detach().contiguous().view(len(x), -1)
        rows = ops.noise_points(plain, sigma, seeds.to(device), item, sample, False, first)
        found.append(rows.view(-1, *x.shape[1:]))
    return tuple(found)


@dataclass(frozen=True)
class Sampled:
    """Gradients of noisy copies; reduction: of a recipe. One seed per example."""

    samples: int
    stdev: float
    reduction: str
    seed: tuple[int, ...]
    name = "smoothgrad"

    def recipe(self) -> Recipe:
        noise = Noise(0.0, self.stdev, self.seed, antithetic=False)
        return WeightedSum(noise, samples_level(self.samples, False), self.reduction)
