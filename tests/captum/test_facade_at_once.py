"""Gradients of small modules at small inputs take one plain run; others go by the engine, alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum import attr
from torch import Tensor, nn

import saliency_fast.captum as facade
from saliency_fast.captum import attribution
from saliency_fast.errors import SaliencyError
from tests.traces import Notes

NAMES = ("Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution")


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace))
        self.head = nn.Linear(5, 3)
        self.notes = Notes(runs=0)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.notes.runs += 1
        return self.head(self.body(x * scale).mean((2, 3)))


def _net(**of: Any) -> Net:
    torch.manual_seed(0)
    return Net(**of).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("small", [0, attribution.SMALL_INPUTS])
@pytest.mark.parametrize("target", [1, [0, 2, 1, 1], torch.tensor([2, 0, 0, 1])])
@pytest.mark.parametrize("name", NAMES)
def test_either_way_is_captums(
    x: Tensor, name: str, target: Any, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "SMALL_INPUTS", small)
    net = _net()
    found = getattr(facade, name)(net).attribute(x, target, additional_forward_args=0.5)
    expected = getattr(attr, name)(net).attribute(x, target, additional_forward_args=0.5)
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-12
    assert not found.requires_grad


def test_one_run_serves(x: Tensor) -> None:
    net = _net()
    facade.Saliency(net).attribute(x, 1)
    assert net.notes.runs == 1


def test_large_modules_and_inputs_go_by_the_engine(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _net()
    assert attribution.is_small(net, (x,))
    assert not attribution.is_small(net, (x.repeat(8, 1, 1, 1),))
    assert not attribution.is_small(net, (x[..., None],))
    assert not attribution.is_small(net, (x.half(),))
    monkeypatch.setattr(attribution, "SMALL_NORMED", 8)
    assert not attribution.is_small(net, (x,))
    assert attribution.is_small(net.head, (x,))
    monkeypatch.setattr(attribution, "SMALL_MODULE", 8)
    assert not attribution.is_small(net.head, (x,))


def test_a_model_changed_in_between_is_noticed(x: Tensor) -> None:
    net = _net()
    first = facade.InputXGradient(net).attribute(x, 1)
    net.body[2] = nn.Tanh()
    second = facade.InputXGradient(net).attribute(x, 1)
    assert float((first - second).norm()) > 1e-3


@pytest.mark.parametrize("inplace", [False, True])
def test_training_mode_leaves_no_trace(x: Tensor, inplace: bool) -> None:
    net = _net(inplace=inplace).train()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    given = x.clone()
    facade.Saliency(net).attribute(x, 1)
    assert net.training
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert all(one.grad is None for one in net.parameters())


def test_what_is_wrong_is_said_by_the_engine(x: Tensor) -> None:
    net = _net()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(SaliencyError, match="NaN"):
        facade.Saliency(net).attribute(x, 1)
    with torch.no_grad():
        net.head.weight.fill_(torch.inf)
    with pytest.raises(SaliencyError, match="NaN or infinite"):
        facade.Saliency(net).attribute(x.nan_to_num(), 1)
