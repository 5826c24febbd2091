"""What depends on weights alone runs once a call: the same maps, counted as fixed bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import saliency_fast as sf
from saliency_fast.graph.passes.invariant import invariant_bytes, with_invariants
from tests.model.answers import METHODS, always_lean, check, way_of, why
from tests.model.lean_models import Case, Net, seeded
from tests.model.recording import record
from tests.models import randn

X = randn(3, 2, 6, 6, seed=3)


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


def standardised(m: Net, x: Tensor) -> Tensor:
    w = m.second.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    return F.conv2d(m.first(x).sin(), w, m.second.bias, padding=1)


def filled(m: Net, x: Tensor) -> Tensor:
    """A table that is made in place, and one that rows overwrite."""
    table = torch.zeros(6, dtype=x.dtype)
    table[2:] = m.first.weight.sum()
    out = torch.zeros(4, 6, 6, dtype=x.dtype)
    out += m.first(x)[0].detach() * 0 + 1
    return m.first(x) * table.cos() * out.mean()


def repeated(m: Net, x: Tensor) -> Tensor:
    """Weights and rows: what is made for each row is no invariant."""
    token = m.scale.exp().expand(len(x), 4, 6, 6)
    return torch.cat([token, m.first(x) + m.scale.exp()], 1)[:, 2:6].sin()


def positions(m: Net, x: Tensor) -> Tensor:
    return m.first(x) + m.table(torch.arange(4)).sin().sum(0)[:, None, None]


def plain_view(m: Net, x: Tensor) -> Tensor:
    return F.linear(m.first(x).flatten(2).mean(2), m.second.weight[:, :, 1, 1])[:, :, None, None]


MODELS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    # A body, and the names of calls that no launch makes.
    "standardised": (standardised, "std"),
    "norm": (lambda m, x: m.relu(m.norm(m.first(x))), ""),
    "positions": (positions, "arange embedding"),
    "in place": (filled, ""),
    "rows": (repeated, "exp"),
    "a weight as it is": (plain_view, ""),
}


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
@pytest.mark.parametrize("name", MODELS)
def test_against_autograd(name: str, method: Any) -> None:
    body, over = MODELS[name]
    model = seeded(lambda: Net(body))
    engine, case = sf.Engine(model, method, points_per_launch=4), Case(lambda: model, inputs=(X,))
    check(engine, case)
    assert way_of(engine) == "program", why(engine)
    program = record(model, X).pruned()
    ready = with_invariants(program).program
    for rows in (1, 2, 5):
        # Points are handed over.
        points = [randn(rows, 2, 6, 6, seed=rows) for _ in range(2)]
        assert torch.equal(program(points[:1], ()), ready(points[1:], ()))
    left = {step.name for step in ready.steps}
    assert left.isdisjoint(over.split())
    # Nothing is kept: weights that were written to, also behind PyTorch's count, are read anew.
    for one in model.parameters():
        one.data.mul_(1.3)
    check(engine, case)
    with torch.no_grad():
        model.norm.running_var.add_(0.5)
    check(engine, case)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(20, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_parametrised_layers(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    first = nn.Linear(20, 20) if name == "orthogonal" else nn.Conv2d(3, 8, 3)
    model = nn.Sequential(first, nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))
    x = randn(2, 20) if name == "orthogonal" else randn(2, 3, 9, 9)
    model.double().eval()(x)
    method = sf.IntegratedGradients(steps=6)
    found = sf.explain(model, x, target=1, method=method)
    expected = sf.explain(model, x, target=1, method=method, lean=False)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)


class Wide(nn.Module):
    """Weights far larger than what a point takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 128, 3, 2), nn.Conv2d(128, 256, 3, bias=False)
        self.head = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        w = self.second.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self.head(F.conv2d(self.first(x).relu(), w).relu().mean((2, 3)))


def wide() -> tuple[Wide, Tensor]:
    torch.manual_seed(0)
    return Wide().eval(), randn(1, 3, 16, 16).float()


def test_weights_are_fixed_bytes() -> None:
    model, x = wide()
    engine = sf.Engine(model, sf.IntegratedGradients(steps=32))
    plan, weight = engine.plan(x, 1), model.second.weight.nbytes
    assert weight <= plan.fixed_bytes < 3 * weight
    assert plan.points_per_launch == 32
    assert plan.launch_bytes < 32 * weight / 4
    strategy = replace(next(iter(engine._location.cache.values())).strategy)
    assert strategy.invariant_bytes == weight
    assert strategy._invariant is not None
    assert "std" not in {step.name for step in strategy._invariant.program.steps}


def test_little_memory_makes_them_in_every_launch() -> None:
    """Where the budget leaves no room for copies: slower, and the same map."""
    model, x = wide()
    expected = sf.explain(model, x, target=1, method=sf.Gradient())
    weight = model.second.weight.nbytes
    engine = sf.Engine(model, sf.Gradient(), memory_budget=int(5.2 * weight))
    torch.testing.assert_close(engine(x, 1).values, expected.values, rtol=1e-4, atol=1e-6)


def test_requests_that_share_launches_hold_no_copies() -> None:
    model, x = wide()
    expected = sf.explain(model, x, target=1)
    asked = {"inputs": x, "target": 1}
    with sf.Engine(model, latency=0.05) as engine:
        found = engine.explain_many([asked, asked])
        several = [one.strategy for one in engine._location.cache.values()]
    assert any(not one.copies and one.invariant_bytes == 0 for one in several)
    for one in found:
        torch.testing.assert_close(one.values, expected.values, rtol=1e-4, atol=1e-6)


def test_volumes_have_their_weights_in_order_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv3d(2, 32, 3), nn.ReLU(), nn.Conv3d(32, 64, 3), nn.BatchNorm3d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 4)),
    ).eval()
    x = randn(2, 2, 8, 8, 8).float()
    for method in (sf.Gradient(), sf.IntegratedGradients(steps=8)):
        found = sf.explain(model, x, target=1, method=method)
        expected = sf.explain(model, x, target=1, method=method, lean=False)
        gap = (found.values - expected.values).norm() / expected.values.norm()
        assert gap < 1e-4, found.provenance.strategy


def test_what_leads_to_them_is_let_go_of() -> None:
    """Of a chain of tensors as large as a weight two live at once, not all."""
    from saliency_fast.engine.memory import MemoryMeter

    weight = nn.Parameter(randn(64, 64))

    def body(x: Tensor) -> Tensor:
        w = weight
        for _ in range(10):
            w = (w * 1.01).sin()
        return x @ w

    program = record(body, randn(1, 64)).pruned()
    assert invariant_bytes(program) == weight.nbytes
    meter = MemoryMeter()
    with meter:
        done = with_invariants(program)
    assert meter.peak <= 3 * weight.nbytes
    assert len(done.program.steps) == 1
