"""Gradients of normalisations of one row, however it lies in memory, against closed formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saliency_fast as sf
from saliency_fast.graph.gradients import gradients
from tests.models import randn

CHANNELS = 6
MEAN, SCALE, SHIFT = (randn(CHANNELS, seed=n) for n in (1, 2, 3))
VARIANCE = randn(CHANNELS, seed=4).square() + 0.5
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZES = {"image": (5, 7), "volume": (3, 4, 5)}


def as_tokens(x: Tensor) -> Tensor:
    """[B, T, C] in memory, seen as an image: the stride of a batch of one is no image's."""
    return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=LAST[x.dim()]),
    "tokens": as_tokens,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def wide(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def by_hand(x: Tensor, axes: list[int] | None) -> Tensor:
    """Over `axes`, or with the fixed statistics."""
    mean = wide(MEAN, x) if axes is None else x.mean(axes, keepdim=True)
    variance = wide(VARIANCE, x) if axes is None else (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) * (variance + 1e-5).rsqrt() * wide(SCALE, x) + wide(SHIFT, x)


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], list[int] | None]]] = {
    "batch, fixed": (
        lambda x: F.batch_norm(x, MEAN, VARIANCE, SCALE, SHIFT, False),
        lambda axes: None,
    ),
    "batch, its own": (
        lambda x: F.batch_norm(x, None, None, SCALE, SHIFT, True),
        lambda axes: [0, *range(2, axes)],
    ),
    "instance": (
        lambda x: F.instance_norm(x, weight=SCALE, bias=SHIFT),
        lambda axes: list(range(2, axes)),
    ),
    "instance, fixed": (
        lambda x: F.instance_norm(x, MEAN, VARIANCE, SCALE, SHIFT, False),
        lambda axes: None,
    ),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [1, 2])
def test_against_the_formula_in_every_layout(norm: str, kind: str, rows: int) -> None:
    call, axes = NORMS[norm]
    for ours, of_x in LAYOUTS.items():
        for theirs, of_grad in LAYOUTS.items():
            x = of_x(randn(rows, CHANNELS, *SIZES[kind], seed=5)).requires_grad_()
            grad = of_grad(randn(*x.shape, seed=6))
            (expected,) = torch.autograd.grad(by_hand(x, axes(x.dim())), x, grad)
            (found,) = gradients(call(x), x, grad)
            scale = max(float(expected.norm()), float(grad.norm()))
            assert float((found - expected).norm()) <= 1e-12 * scale, f"x {ours}, gradient {theirs}"


def test_the_graph_is_left_as_it_was() -> None:
    x = randn(1, CHANNELS, 5, 7).requires_grad_()
    y = NORMS["batch, fixed"][0](x)
    seen: list[tuple[int, ...]] = []
    handle = y.grad_fn.register_prehook(lambda grads: seen.append(grads[0].stride()))
    gradients(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.square().sum(), x)
    handle.remove()
    assert seen[1] == y.stride()


class Tokens(nn.Module):
    """An image, normalised, and read as tokens from there on: their gradient lies as tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm
        self.second, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x).tanh()).flatten(2).transpose(1, 2)
        places = torch.linspace(0.5, 2.0, tokens.shape[1], dtype=x.dtype)
        return self.head((self.second(tokens).sigmoid() * places[:, None]).mean(1))


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("size", [(6, 5), (96, 80)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_one_picture_has_the_map_that_it_has_in_a_batch(
    norm: type[nn.Module], size: tuple[int, int], lean: bool
) -> None:
    torch.manual_seed(0)
    model, x = Tokens(norm(8, affine=True)).double().eval(), randn(2, 3, *size)
    step = randn(2, 3, *size, seed=9)
    with torch.no_grad():
        # Fourth order, in the direction `step`.
        at = {h: model(x + 1e-3 * h * step)[:, 1] for h in (-2, -1, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-3
    both = sf.explain(model, x, target=1, method=sf.Gradient(), lean=lean).values
    for row in range(2):
        one = sf.explain(model, x[row : row + 1], target=1, method=sf.Gradient(), lean=lean)
        torch.testing.assert_close(one.values, both[row : row + 1], rtol=1e-9, atol=1e-12)
        along = float((one.values * step[row]).sum())
        assert along == pytest.approx(float(slope[row]), rel=1e-6), one.provenance.strategy
