"""Fills: what stands where a region was, made of the input itself, in two ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.evaluate.substrates import substrate_of

BLURRED, INPAINTED = "blurred", "inpainted"
AVERAGED, ZEROED = "set to the mean", "set to zero"
KNOWN = 1e-3
"""How much of a Gaussian's weight must lie on places that are known for them to tell a value."""


def fills(inputs: Tensor, gone: Tensor) -> dict[str, Tensor]:
    """Two inputs [B, C, *spatial] by name that know nothing of the places `gone`, bool
    [B, *spatial], or little: for spaces "blurred" and "inpainted", for features "set to the
    mean" (each example's own) and "set to zero".
    """
    if inputs.dim() == 2:
        return {
            AVERAGED: substrate_of("mean", inputs).expand_as(inputs).contiguous(),
            ZEROED: torch.zeros_like(inputs),
        }
    return {BLURRED: substrate_of("blur", inputs), INPAINTED: inpaint(inputs, gone)}


def inpaint(inputs: Tensor, gone: Tensor) -> Tensor:
    """Inputs [B, C, *spatial] with the places `gone` [B, *spatial] filled from around them.

    Each is the mean of known places under a Gaussian, of one place at first and twice as wide in
    every turn, for those that are not reached before (normalised convolution; Knutsson and Westin,
    1993). An example of which nothing is left gets its mean.
    """
    found = inputs.clone()
    known = (~gone[:, None]).to(inputs.dtype)
    missing = gone[:, None].clone()
    width, longest = 1.0, max(inputs.shape[2:])
    while bool(missing.any()) and width <= 2 * longest:
        weight, total = known, inputs * known
        for axis in range(2, inputs.dim()):
            weight, total = _spread(weight, axis, width), _spread(total, axis, width)
        reached = missing & (weight > KNOWN)
        found = torch.where(reached, total / weight.clamp_min(KNOWN), found)
        missing = missing & ~reached
        width *= 2.0
    axes = tuple(range(2, inputs.dim()))
    mass = known.sum(axes, keepdim=True)
    mean = torch.where(
        mass > 0,
        (inputs * known).sum(axes, keepdim=True) / mass.clamp_min(1),
        inputs.mean(axes, keepdim=True),
    )
    return torch.where(missing, mean, found).contiguous()


def _spread(x: Tensor, axis: int, width: float) -> Tensor:
    """A Gaussian of `width` places along an axis; nothing lies beyond the ends."""
    size = x.shape[axis]
    reach = min(math.ceil(3.0 * width), size - 1)
    if reach < 1:
        return x
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (offset / width) ** 2)
    kernel = (kernel / kernel.sum()).to(x.dtype)
    lanes = x.movedim(axis, -1)
    spread = functional.conv1d(lanes.reshape(-1, 1, size), kernel.view(1, 1, -1), padding=reach)
    return spread.view(lanes.shape).movedim(-1, axis).contiguous()
