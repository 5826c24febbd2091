"""Class activation maps again, slowly: one example and one channel at a time, from the papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Score = Callable[[Tensor], Tensor]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def tapped(model: nn.Module, layer: nn.Module, score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer gives for one example, and the score's gradient there, both [C, *s]."""
    held: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        held.append(output)
        # The model may overwrite what it gets.
        return output.clone()

    handle = layer.register_forward_hook(keep)
    try:
        value = score(model(x[None].clone().requires_grad_()))
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value.sum(), held)
    return held[0][0].detach(), gradient[0]


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Equations 1 and 2 of Selvaraju (2017), without its ReLU."""
    total = torch.zeros_like(a[0])
    for channel in range(len(a)):
        alpha = g[channel].sum() / g[channel].numel()
        total += alpha * a[channel]
    return total


def grad_cam_plus_plus(a: Tensor, g: Tensor) -> Tensor:
    """Equations 5 and 19 of Chattopadhyay (2018)."""
    total = torch.zeros_like(a[0])
    for channel in range(len(a)):
        weight = 0.0
        for one in g[channel].flatten().tolist():
            if one != 0:
                below = 2 * one**2 + float(a[channel].sum()) * one**3
                weight += one**2 / below * max(one, 0.0)
        total += weight * a[channel]
    return total


def xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Equation 8 of Fu (2020)."""
    total = torch.zeros_like(a[0])
    for channel in range(len(a)):
        whole = a[channel].sum()
        if whole != 0:
            total += (a[channel] / whole * g[channel]).sum() * a[channel]
    return total


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    """Equations 5 and 6 of Jiang (2021)."""
    return sum((g[c].relu() * a[c] for c in range(len(a))), torch.zeros_like(a[0]))


def hires_cam(a: Tensor, g: Tensor) -> Tensor:
    """Draelos (2020): the gradient and the activations, place by place."""
    return sum((g[c] * a[c] for c in range(len(a))), torch.zeros_like(a[0]))


def eigen_cam(a: Tensor, g: Tensor) -> Tensor:
    """Muhammad (2020): the activations [places, C] on their first right singular vector."""
    flat = a.flatten(1).T
    found = flat @ torch.linalg.svd(flat, full_matrices=False)[2][0]
    return (found * found.sum().sign()).view(a.shape[1:])


CAMS = {
    one.__name__: one
    for one in (grad_cam, grad_cam_plus_plus, xgrad_cam, layer_cam, hires_cam, eigen_cam)
}


def score_cam(model: nn.Module, score: Score, x: Tensor, a: Tensor) -> Tensor:
    """Algorithm 1 of Wang (2020), for one example x [C, *spatial], without its ReLU."""
    scores = []
    for channel in a:
        mask = resized(channel, tuple(x.shape[1:]))
        width = mask.max() - mask.min()
        mask = (mask - mask.min()) / width if width > 0 else torch.zeros_like(mask)
        scores.append(score(model((x * mask)[None])).detach().squeeze())
    weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    return sum((w * one for w, one in zip(weights, a, strict=True)), torch.zeros_like(a[0]))


def resized(one: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = MODES[len(size)]
    return functional.interpolate(one[None, None], size, mode=mode, align_corners=False)[0, 0]
