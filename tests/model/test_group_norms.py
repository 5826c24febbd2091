"""Group and instance normalisation in both memory formats, against PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.graph.intercept import Calls
from tests.models import randn

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
ROUNDING = 2e-6
NORMS = {
    "instance": nn.InstanceNorm2d(6),
    "instance, affine": nn.InstanceNorm2d(6, affine=True),
    "instance of volumes": nn.InstanceNorm3d(6, affine=True, eps=0.1),
    "groups of one": nn.GroupNorm(6, 6),
    "groups of two": nn.GroupNorm(3, 6),
    "groups without weights": nn.GroupNorm(2, 6, affine=False),
    "one group": nn.GroupNorm(1, 6),
}


def points(name: str, kind: str) -> Tensor:
    axes = 3 if "volumes" in name else 2
    x = randn(3, 6, *(5, 7, 4)[:axes], seed=3).float()
    if kind == "far from zero":
        return x + 100
    if kind == "flat":
        # A channel without spread, and an example of zeros.
        x[:, 1] = 0.25
        x[2] = 0
    return x


@pytest.mark.parametrize("kind", ["random", "far from zero", "flat"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_against_float64(name: str, channels_last: bool, kind: str) -> None:
    norm, x = copy.deepcopy(NORMS[name]), points(name, kind)
    for number, one in enumerate(norm.parameters()):
        one.data.copy_(1 + 0.3 * randn(6, seed=number).float())
        one.requires_grad_(False)
    direction = randn(*x.shape, seed=5).float()
    wide = x.double().requires_grad_()
    expected = copy.deepcopy(norm).double()(wide)
    (expected_grad,) = torch.autograd.grad(expected, wide, direction.double())
    mine = x.contiguous(memory_format=FORMATS[x.dim()]) if channels_last else x
    mine = mine.clone().requires_grad_()
    # Leaves count as weights.
    inside = mine * 1
    with Calls():
        y = norm(inside)
    served = channels_last or "instance" in name
    step = type(y.grad_fn).__name__
    assert ("Lean" in step) == served
    (grad,) = torch.autograd.grad(y, mine, direction)
    # Far from zero float32 has lost digits before the call.
    rounding = ROUNDING * (100 if kind == "far from zero" else 1)
    assert float((y - expected).norm()) <= rounding * float(expected.norm())
    assert float((grad - expected_grad).norm()) <= rounding * float(expected_grad.norm())
    # Layers behind it may write to it, which PyTorch refuses of views.
    assert not float(y.zero_().norm())


@pytest.mark.parametrize("norm", [nn.InstanceNorm3d(8), nn.GroupNorm(4, 8)])
def test_maps(norm: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv3d(1, 8, 3), norm, nn.SiLU(inplace=True), nn.Conv3d(8, 4, 3)]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    x = randn(2, 1, 20, 20, 20, seed=1).float()
    method = sf.IntegratedGradients(steps=20, rule="midpoint")
    found = sf.explain(model, x, method=method, target=1)
    exact = sf.explain(copy.deepcopy(model).double(), x.double(), method=method, target=1)
    gap = float((found.values - exact.values).norm())
    assert gap <= 1e-5 * float(exact.values.norm())


def test_statistics_of_training_stay_with_pytorch() -> None:
    norm = nn.InstanceNorm2d(6, track_running_stats=True).train()
    x = randn(2, 6, 5, 5).float().requires_grad_()
    before = norm.running_mean
    assert before is not None
    before = before.clone()
    inside = x * 1
    with Calls():
        norm(inside)
    assert norm.running_mean is not None
    assert not torch.equal(norm.running_mean, before)
