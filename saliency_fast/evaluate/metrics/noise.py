"""Noise: perturbed copies of inputs, drawn by example and sample alone."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.ops import noise_points, philox, random_bits

NOISES = ("uniform", "gaussian")


def noisy(
    inputs: Tensor, spread: Tensor, item: Tensor, sample: Tensor, noise: str, seed: int
) -> Tensor:
    """Copies [R, *] of the rows item int64 [R] of inputs [B, *], with noise of number sample
    int64 [R].

    noise: "uniform" from -spread to spread, or "gaussian" with that standard deviation, float64
    [B]. The noise depends on the seed and the sample and not on the example: it is the same
    whatever batch an example stands in.
    """
    seeds = torch.full((len(inputs),), seed, dtype=torch.int64, device=inputs.device)
    if noise == "gaussian":
        points: Tensor = noise_points(inputs, spread, seeds, item, sample, False, 0)
        return points
    if noise != "uniform":
        raise InputError(f"noise must be one of {', '.join(NOISES)}: got {noise!r}")
    bits = random_bits(seeds[item], sample, inputs[0].numel(), 0, philox.NOISE)
    # The middle of one of 2 ** 24 cells: exact in float32, never the ends.
    share = ((bits >> 8).double() + 0.5) * 2.0**-23 - 1.0
    moved: Tensor = (share * spread[item, None]).to(inputs.dtype)
    return inputs[item] + moved.view(-1, *inputs.shape[1:])
