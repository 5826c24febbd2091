"""What is compared before a way serves: several points, in float64 where rounding may explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saliency_fast as sf
from saliency_fast.engine import calibrate, config, measure, strategies
from saliency_fast.errors import BudgetError
from saliency_fast.graph.passes import affine_prefix as prefix
from saliency_fast.graph.passes.fusion import fused
from tests.configured import configure
from tests.model.answers import always_lean, way_of, why
from tests.models import randn


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


class Net(nn.Module):
    """`share` of the score by a branch that `gate` may close."""

    def __init__(self, share: float, gate: float = -1e9) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.share, self.gate, self.head = share, gate, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        branch = F.threshold(self.second(y).tanh().mean((2, 3)), self.gate, 0.0)
        return self.head(y.mean((2, 3)) + self.share * branch)


def cut(program: Any, *_: Any) -> Any:
    """A fault in a program: no gradient passes its tanh."""
    steps = [replace(one, detached=one.detached or one.name == "tanh") for one in program.steps]
    return fused(replace(program, steps=tuple(steps)))


def break_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (strategies, prefix):
        monkeypatch.setattr(module, "fused", cut)


def made(share: float, gate: float = -1e9) -> nn.Module:
    torch.manual_seed(0)
    return Net(share, gate).eval()


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_a_fault_of_a_small_branch(
    share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_programs(monkeypatch)
    model, x = made(share).to(dtype), randn(2, 3, 12, 12).to(dtype)
    engine = sf.Engine(model, sf.IntegratedGradients(steps=4))
    found = engine(x, 1)
    expected = sf.Engine(model, sf.IntegratedGradients(steps=4), lean=False)(x, 1).values
    assert found.provenance.strategy == "call by call", why(engine)
    assert gap(found.values, expected) < 1e-5


SILENT: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    # A method, and inputs at whose first point the branch is closed.
    "another example": (sf.Gradient(), lambda x: x * torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)),
    "another place on the path": (sf.IntegratedGradients(steps=8), lambda x: 3 * x[:1]),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_fault_where_the_first_point_is_silent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, inputs = SILENT[name]
    x = inputs(randn(2, 3, 12, 12).float())
    model = made(5.0, gate=0.16)
    expected = sf.Engine(model, method, lean=False)(x, 1).values
    break_programs(monkeypatch)
    engine = sf.Engine(model, method)
    found = engine(x, 1)
    assert found.provenance.strategy == "call by call", why(engine)
    assert gap(found.values, expected) < 1e-5
    # The test's own premise: by the first point alone the fault would not be seen.
    monkeypatch.setattr(measure.Measurement, "elsewhere", lambda self, draws: [])
    engine = sf.Engine(made(5.0, gate=0.16), method)
    assert gap(engine(x, 1).values, expected) > 0.1, why(engine)


class Kinked(nn.Module):
    """A deep network of rectifiers, whose float32 gradient rounding carries across many kinks."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(24)]
        norms = [nn.BatchNorm2d(16) for _ in layers]
        self.stem = nn.Conv2d(3, 16, 3)
        both = zip(layers, norms, strict=True)
        self.body = nn.Sequential(*[m for two in both for m in (*two, nn.ReLU())])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_rounding_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 alone does not tell, float64 does: the program serves."""
    torch.manual_seed(1)
    model = Kinked().eval()
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):
            nn.init.normal_(one.running_mean, 0, 0.3)
            nn.init.uniform_(one.running_var, 0.05, 0.2)
    agreement = {**config.DEFAULT.agreement, torch.float32: 1e-9}
    configure(monkeypatch, agreement=agreement)
    asked = []
    exactly = calibrate._Comparison._exactly

    def spy(self: Any, *args: Any) -> float | None:
        asked.append(exactly(self, *args))
        return asked[-1]

    monkeypatch.setattr(calibrate._Comparison, "_exactly", spy)
    for side in (24, 96):
        asked.clear()
        engine = sf.Engine(model, sf.IntegratedGradients(steps=4), hashes=False)
        engine(randn(1, 3, side, side).float(), 1)
        assert way_of(engine) == "program", why(engine)
        assert asked
        assert all(one is not None and one < 1e-9 for one in asked)


def test_scores_never_outweigh_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large input that is foreseen on shapes, whose corner's gradient disagrees."""
    break_programs(monkeypatch)
    configure(monkeypatch, unforeseen_bytes=0, foreseen_bytes=0)
    model, x = made(5.0), randn(1, 3, 80, 80).float()
    engine = sf.Engine(model, sf.Gradient())
    found = engine(x, 1)
    expected = sf.Engine(model, sf.Gradient(), lean=False)(x, 1).values
    assert gap(found.values, expected) < 1e-5, found.provenance.strategy
    assert found.provenance.strategy == "call by call", why(engine)
    with pytest.raises(BudgetError, match="could be"):
        sf.Engine(made(5.0), sf.Gradient(), memory_budget="1MiB")(x, 1)
