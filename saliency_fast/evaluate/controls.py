"""Control maps, which do not depend on the model: a metric should rank real maps above them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saliency_fast.evaluate.maps import spatial_shape
from saliency_fast.model.targets import Target
from saliency_fast.ops import philox, random_bits


def edge_detector(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """The magnitude of the input's spatial gradient, which looks like an explanation (Adebayo,
    2018): central differences, summed over channels.

    Args:
        model: Ignored, as is `target`.
        inputs: [B, C, *spatial] or [B, F].
        target: Ignored.

    Returns:
        Maps [B, *spatial].

    Example:
        >>> edge_detector(torch.nn.Identity(), torch.tensor([[0.0, 2.0, 2.0]]))
        tensor([[1., 1., 0.]])
    """
    x = inputs.double() if inputs.dim() > 2 else inputs.double()[:, None]
    slopes = [(shifted(x, axis, -1) - shifted(x, axis, 1)) / 2.0 for axis in range(2, x.dim())]
    return torch.stack(slopes).square().sum((0, 2)).sqrt().to(inputs.dtype)


def random_map(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """Uniform noise in [0, 1), which differs between the examples of a batch and never between
    calls; arguments and result as in `edge_detector`.

    Example:
        >>> random_map(torch.nn.Identity(), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 4, 4])
    """
    spatial = spatial_shape(inputs)
    example = torch.arange(len(inputs), device=inputs.device)
    bits = random_bits(example, example, spatial.numel(), 0, philox.BASELINE)
    noise: Tensor = ((bits >> 8).double() * 2.0**-24).view(len(inputs), *spatial)
    return noise.to(inputs.dtype)


def centre_map(model: Callable[..., object], inputs: Tensor, target: Target = None) -> Tensor:
    """High in the centre, where photographers put objects, and zero at the corners, by squared
    distance; arguments and result as in `edge_detector`.

    Example:
        >>> centre_map(torch.nn.Identity(), torch.zeros(1, 4))
        tensor([[0.0000, 0.1250, 0.1250, 0.0000]])
    """
    spatial = spatial_shape(inputs)
    squared = torch.zeros(spatial, dtype=torch.float64, device=inputs.device)
    for axis, size in enumerate(spatial):
        position = torch.arange(size, dtype=torch.float64, device=inputs.device)
        away = (position - (size - 1) / 2.0) / size
        squared = squared + (away**2).view(-1, *(1,) * (len(spatial) - axis - 1))
    return (squared.max() - squared).expand(len(inputs), *spatial).to(inputs.dtype).contiguous()


def shifted(x: Tensor, axis: int, by: int) -> Tensor:
    """The tensor shifted along an axis, its edge repeated: position p moves to p + by."""
    size = x.shape[axis]
    source = (torch.arange(size, device=x.device) - by).clamp(0, size - 1)
    return x.index_select(axis, source)


CONTROLS = {"edge_detector": edge_detector, "random": random_map, "centre": centre_map}
"""The controls by the names that `report` takes."""
