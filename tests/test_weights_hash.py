"""The hash of weights, of whatever a module may hold; models that no ordinary module is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.record import weights_sha256
from tests.models import randn


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.arange(6.0), 0.1, 3, torch.quint8)


def by_channel() -> Tensor:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    return torch.quantize_per_channel(torch.arange(6.0).view(2, 3), scales, zeros, 0, torch.qint8)


# A tensor, and how its numbers, or one thing that they mean, are changed.
TENSORS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "dense": (lambda: torch.arange(6.0), lambda x: x + 1),
    "empty": (lambda: torch.zeros(0, 3), lambda x: torch.zeros(3, 0)),
    "a number": (lambda: torch.tensor(3), lambda x: x + 1),
    "bool": (lambda: torch.tensor([True, False]), lambda x: ~x),
    "bfloat16": (lambda: torch.arange(6.0).bfloat16(), lambda x: x + 1),
    "complex": (lambda: torch.randn(3, dtype=torch.complex64), lambda x: x.conj()),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), lambda x: x.float().mul(2).to(x)),
    "expanded": (lambda: torch.ones(1).expand(4), lambda x: x * 2),
    "sparse": (lambda: torch.eye(6).to_sparse(), lambda x: x * 2),
    "sparse, another place": (
        lambda: torch.eye(6).to_sparse(),
        lambda x: x.to_dense().roll(1, 0).to_sparse(),
    ),
    "csr": (lambda: torch.eye(6).to_sparse_csr(), lambda x: x * 2),
    "csc": (lambda: torch.eye(6).to_sparse_csc(), lambda x: (x.to_dense() * 2).to_sparse_csc()),
    "bsr": (
        lambda: torch.eye(6).to_sparse_bsr((2, 2)),
        lambda x: (x.to_dense() * 2).to_sparse_bsr((2, 2)),
    ),
    "meta": (lambda: torch.empty(3, device="meta"), lambda x: torch.empty(4, device="meta")),
    "quantised": (
        quantised,
        lambda x: torch.quantize_per_tensor(x.dequantize(), 0.2, 3, torch.quint8),
    ),
    "quantised by channel": (
        by_channel,
        lambda x: torch.quantize_per_channel(
            x.dequantize() + 1,
            x.q_per_channel_scales(),
            x.q_per_channel_zero_points(),
            0,
            torch.qint8,
        ),
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda x: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda x: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged),
    ),
    "mkldnn": (lambda: torch.arange(6.0).to_mkldnn(), lambda x: (x.to_dense() + 1).to_mkldnn()),
}


class Holder(nn.Module):
    """A linear layer with a buffer that it does not use."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for one in self.parameters():
                one.fill_(0.5)
        self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_module_holds(name: str) -> None:
    make, change = TENSORS[name]
    model = Holder(make())
    first = weights_sha256(model)
    assert first is not None
    assert (
        weights_sha256(model)
        == weights_sha256(Holder(make() if name != "complex" else model.held))
        == first
    )
    other = weights_sha256(Holder(change(make())))
    assert other is not None
    assert other != first
    found = sf.explain(model, randn(2, 6).float(), target=1)
    assert found.provenance.weights_sha256 == first
    model.held = change(model.held)
    assert weights_sha256(model) != first


def test_what_is_not_made_yet() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.LazyLinear(3))
    assert weights_sha256(model) is not None


def test_packed_weights() -> None:
    """Of quantised layers, which are neither parameters nor buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = []
        for value in (1.0, 2.0, 1.0):
            net = nn.Sequential(nn.Linear(4, 4))
            nn.init.constant_(net[0].weight, value)
            nn.init.constant_(net[0].bias, value)
            found.append(weights_sha256(torch.ao.quantization.quantize_dynamic(net, {nn.Linear})))
    assert found[0] == found[2] != found[1]


class Extra(nn.Linear):
    """A layer with extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra
        nn.init.ones_(self.weight)
        nn.init.ones_(self.bias)

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


def test_extra_state() -> None:
    one, same, other = (weights_sha256(Extra(torch.tensor([n]))) for n in (1.0, 1.0, 2.0))
    assert one == same != other


NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
X = randn(3, 3, 8, 8).float()


def frozen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.script(NET))


def exported() -> Any:
    return torch.export.export(NET, (X[:1],)).module()


@pytest.mark.parametrize("make", [frozen, exported])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smoothgrad", "occlusion"])
@pytest.mark.parametrize("rows", [1, 3])
def test_deployed_models(make: Callable[[], Any], method: str, rows: int) -> None:
    """Frozen TorchScript has no mode, a static export takes one row: each as the module itself."""
    model, x = make(), X[:rows]
    found = sf.explain(model, x, target=3, method=method)
    expected = sf.explain(NET, x, target=3, method=method, lean=False)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
    plan = sf.Engine(model, method).plan(x, 3)
    assert plan.points_per_launch == 1 or make is frozen


def test_frozen_weights_have_a_hash() -> None:
    one = weights_sha256(frozen())
    with torch.no_grad():
        NET[0].bias.add_(1)
    other = weights_sha256(frozen())
    with torch.no_grad():
        NET[0].bias.sub_(1)
    assert one is not None
    assert one != other
