"""Controls: maps that know nothing of the model, which every metric should tell from real ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.model.targets import Target
from saliency_fast.ops import philox, random_bits


def edge_detector(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """The magnitude of the input's gradient in space, [B, *spatial]: it looks like an explanation
    and asks no model (Adebayo, 2018). Differences of neighbours, summed over channels.
    """
    x = inputs.double() if inputs.dim() > 2 else inputs.double()[:, None]
    total = torch.zeros_like(x[:, 0])
    for axis in range(2, x.dim()):
        ends = (1, 1)
        lanes = functional.pad(x.movedim(axis, -1).flatten(1, -2), ends, mode="replicate")
        slope = (lanes[..., 2:] - lanes[..., :-2]) / 2.0
        slope = slope.view(x.movedim(axis, -1).shape).movedim(-1, axis)
        total += slope.square().sum(1)
    return total.sqrt().to(inputs.dtype)


def random_map(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """Uniform noise in [0, 1), another for each example of a batch, [B, *spatial]; the same every
    time.
    """
    spatial = inputs.shape[2:] if inputs.dim() > 2 else inputs.shape[1:]
    item = torch.arange(len(inputs), device=inputs.device)
    bits = random_bits(item, item, spatial.numel(), 0, philox.BASELINE)
    share: Tensor = ((bits >> 8).double() * 2.0**-24).view(len(inputs), *spatial)
    return share.to(inputs.dtype)


def centre_map(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """High in the middle and falling off to zero at the corners, [B, *spatial]: the guess of who
    has not looked.
    """
    spatial = inputs.shape[2:] if inputs.dim() > 2 else inputs.shape[1:]
    far = torch.zeros(spatial, dtype=torch.float64, device=inputs.device)
    for axis, size in enumerate(spatial):
        place = torch.arange(size, dtype=torch.float64, device=inputs.device)
        away = (place - (size - 1) / 2.0) / size
        far = far + (away**2).view(-1, *(1,) * (len(spatial) - axis - 1))
    return (far.max() - far).expand(len(inputs), *spatial).to(inputs.dtype).contiguous()


CONTROLS = {"edge_detector": edge_detector, "random": random_map, "centre": centre_map}
"""By name, as reports take them beside methods."""
