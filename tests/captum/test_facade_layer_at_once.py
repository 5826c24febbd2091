"""Gradients at small layers take one run of the batch; larger ones go by the engine, alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum import attr
from torch import Tensor, nn

import saliency_fast.captum as facade
from saliency_fast.captum import layers
from saliency_fast.errors import ModelError
from tests.traces import Notes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.late = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)
        self.notes = Notes(runs=0)

    def forward(self, x: Tensor) -> Tensor:
        self.notes.runs += 1
        found = self.late(self.early(x).relu_()).relu()
        return self.head(found.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gap(found: Any, expected: Any) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("little", [0, layers.SMALL_GRAPH])
@pytest.mark.parametrize("name", ["LayerGradCam", "LayerGradientXActivation"])
@pytest.mark.parametrize("layer", ["early", "late", "head"])
def test_either_way_is_captums(
    net: Net, x: Tensor, name: str, layer: str, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "SMALL_GRAPH", little)
    at, kwargs = net.get_submodule(layer), {"target": [0, 2, 1]}
    found = getattr(facade, name)(net, at).attribute(x, **kwargs)
    expected = getattr(attr, name)(net, at).attribute(x, **kwargs)
    assert _gap(found, expected) < 1e-12
    assert not found.requires_grad


def test_one_run_serves(net: Net, x: Tensor) -> None:
    facade.LayerGradCam(net, net.late).attribute(x, target=1)
    assert net.notes.runs == 1


@pytest.mark.parametrize("little", [0, layers.SMALL_GRAPH])
def test_training_mode_leaves_no_trace(
    net: Net, x: Tensor, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "SMALL_GRAPH", little)
    net.train()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    facade.LayerGradCam(net, net.late).attribute(x, target=1)
    assert net.training
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert all(one.grad is None and one.requires_grad for one in net.parameters())
    assert not any(one._forward_hooks for one in net.modules())


def test_errors_are_the_engines(net: Net, x: Tensor) -> None:
    unseen = nn.Sequential(net.early, nn.Flatten(), nn.Linear(144, 3).double()).eval()
    detached = lambda x: unseen(x).detach()  # noqa: E731
    with pytest.raises(ModelError, match="not differentiable"):
        facade.LayerGradCam(detached, net.early).attribute(x, target=1)
    assert not any(one._forward_hooks for one in net.modules())
