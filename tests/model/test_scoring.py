"""Programs for scores alone: as right as the model's own calls, and with what goes along."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import strategies
from saliency_fast.graph.autograd.convolutions import winograd_built
from saliency_fast.graph.passes import scores_only as scorings
from saliency_fast.graph.passes.fusion import fused
from saliency_fast.graph.passes.scores_only import prepared_bytes, scoring
from saliency_fast.graph.program import Program
from saliency_fast.ops.dispatch import forced
from tests.model.answers import why
from tests.model.random_networks import KINDS, network
from tests.model.recording import IMAGES, prepared, record
from tests.models import randn

native = pytest.mark.skipif(not winograd_built(), reason="the C++ loops do not run here")
PREPARED = ("_winograd", "_reordered")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def kinds(program: Program) -> str:
    """Its calls by name."""
    names = [step.name for step in program.steps]
    return " ".join(name.lstrip("_") if name in PREPARED else name for name in names)


def checked(model: Any, x: Tensor) -> str:
    """Compares a float64 model's program for scores with the model, in launches of several sizes;
    the calls of that program.
    """
    want = model(x.double().clone()).detach()
    model, x = copy.deepcopy(model).float(), x.float()
    program = fused(record(model, x)).with_channels_last()
    ready = scoring(program)
    with torch.no_grad():
        # What float32 is off by as it is, and the errors of other orders of its sums.
        allowed = 8 * max(relative(program([x.clone()], ()), want), 2**-22)
        for rows in (1, 2, len(x)):
            found = ready([x[:rows].clone()], ())
            assert found.dtype == torch.float32
            assert relative(found, want[:rows]) <= allowed
    return kinds(ready)


@pytest.mark.parametrize("name", [n for n, one in IMAGES.items() if isinstance(one, nn.Module)])
def test_images(name: str) -> None:
    checked(IMAGES[name], randn(3, 2, 13, 18))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    axes=st.sampled_from((1, 2, 2, 3)),
    names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7),
    seed=st.integers(0, 2**16),
)
def test_random_networks(axes: int, names: list[str], seed: int) -> None:
    model, x = network(axes, names, seed)
    with torch.no_grad():
        # Not one that rounding decides: normalised constants.
        if relative(model(x * (1 + 1e-7)), model(x)) < 1e-5:
            checked(model, x)


class Wide(nn.Module):
    """`body(self, x)` of x [R, 2, H, W], with layers of 16 and 32 channels at hand."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.bare = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(2, 16, 5, 2, bias=False)
        self.second, self.third = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.strided, self.depthwise = nn.Conv2d(16, 32, 3, 2), nn.Conv2d(16, 16, 3, groups=16)
        self.norm, self.other, self.wide = (
            nn.BatchNorm2d(16),
            nn.BatchNorm2d(16),
            nn.BatchNorm2d(32),
        )
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def twice_used(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return y.relu() + y


def beside_its_norm(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    return (m.norm(y) + y).relu()


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    z = y.relu()
    y.mul_(2.0)
    return z + y


def seen_by_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.first(x)
    corner = y[:, :, 0]
    return y.relu_().sum(2) + corner


BODIES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "stem": (lambda m, x: F.max_pool2d(m.norm(m.first(x)).relu(), 2), "reordered max_pool2d"),
    "stem of many windows": (
        lambda m, x: F.max_pool2d(m.norm(m.bare(x)).relu(), 3, 2, 1),
        "reordered max_pool2d",
    ),
    "pool rounded up": (
        lambda m, x: F.max_pool2d(m.first(x).relu(), 2, ceil_mode=True),
        "reordered max_pool2d",
    ),
    "pool with holes": (
        lambda m, x: F.max_pool2d(m.first(x).relu(), 2, dilation=2),
        "reordered max_pool2d",
    ),
    "pool of a sum": (
        lambda m, x: F.max_pool2d(m.first(x), 2, 1),
        "reordered max_pool2d",
    ),
    "with places": (
        lambda m, x: F.max_pool2d(m.first(x).relu(), 2, return_indices=True)[0],
        "reordered max_pool2d_with_indices",
    ),
    "two norms": (lambda m, x: m.other(m.norm(m.first(x))).relu(), "reordered rectified"),
    "winograd": (lambda m, x: m.wide(m.second(m.first(x).relu())).relu(), "reordered winograd"),
    "residual": (
        lambda m, x: (m.wide(m.third(m.second(m.first(x)).relu())) + m.second(m.first(x))).relu(),
        "reordered winograd winograd reordered winograd rectified",
    ),
    "relu6": (lambda m, x: F.relu6(m.norm(m.first(x))), "reordered rectified"),
    "leaky": (lambda m, x: F.leaky_relu(m.norm(m.first(x)), 0.2), "reordered rectified"),
    "strided": (lambda m, x: m.wide(m.strided(m.first(x))).relu(), "reordered reordered"),
    "depthwise": (lambda m, x: m.norm(m.depthwise(m.first(x))).relu(), "reordered reordered"),
    "sigmoid": (lambda m, x: m.norm(m.first(x)).sigmoid(), "reordered sigmoid"),
    "twice used": (twice_used, "reordered relu add"),
    "beside its norm": (beside_its_norm, "reordered rectified"),
    "overwritten": (overwritten, "reordered relu mul_ add"),
    "seen by a view": (seen_by_a_view, "reordered __getitem__ relu_ sum add"),
}


@native
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("size", [(20, 21), (7, 6)])
def test_what_goes_along(name: str, size: tuple[int, int]) -> None:
    body, left = BODIES[name]
    torch.manual_seed(1)
    found = checked(prepared(Wide(body)), randn(3, 2, *size))
    if size == (20, 21):
        # Aliases are told apart by other names.
        assert found.replace("__add__", "add").replace("__iadd__", "add") == left


@native
def test_bytes_are_those_of_the_weights() -> None:
    model = prepared(
        Wide(lambda m, x: m.strided(m.first(x)).relu() + m.wide(m.second(m.first(x))).mean())
    )
    program = fused(record(model.float(), randn(2, 2, 24, 24).float())).with_channels_last()
    ready = {
        "_winograd": lambda args: args[-1].nbytes + args[1].nbytes,
        "_reordered": lambda args: math.prod(args[1].shape) * 4,
    }
    steps = [step for step in scoring(program).steps if step.name in PREPARED]
    expected = sum(ready[step.name](step.args) for step in steps)
    assert prepared_bytes(program) == expected > 36 * 16 * 32 * 4


@pytest.mark.parametrize("why_not", ["float64", "contiguous", "in pieces"])
def test_what_is_left_as_it_is(why_not: str) -> None:
    model = prepared(Wide(lambda m, x: m.second(m.first(x).relu())))
    x = randn(2, 2, 24, 24)
    if why_not == "float64":
        program = fused(record(model, x)).with_channels_last()
    else:
        program = fused(record(model.float(), x.float()))
        program = (
            program if why_not == "contiguous" else program.with_channels_last().in_segments(2)
        )
    assert kinds(scoring(program)) == kinds(program)
    assert prepared_bytes(program) == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


OCCLUSION = sf.Occlusion(window=(16, 16), stride=(8, 8))


def made() -> tuple[Net, Tensor]:
    torch.manual_seed(3)
    return prepared(Net()).float(), randn(2, 1, 64, 64).float()


def off(found: Tensor, model: nn.Module, x: Tensor) -> float:
    exact = sf.explain(copy.deepcopy(model).double(), x.double(), target=1, method=OCCLUSION)
    assert isinstance(exact.values, Tensor)
    return relative(found, exact.values)


def test_weights_are_those_of_the_call() -> None:
    model, x = made()
    engine = sf.Engine(model, OCCLUSION)
    assert off(engine(x, 1).values, model, x) < 1e-5
    with torch.no_grad():
        for part in model.parts:
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(-1.5)
    assert off(engine(x, 1).values, model, x) < 1e-5
    with torch.no_grad():
        model.parts[1].running_mean.add_(0.5)
    assert off(engine(x, 1).values, model, x) < 1e-5
    assert engine.plan(x, 1).lean.startswith("recorded"), why(engine)


@native
def test_a_wrong_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scorings._winograd
    monkeypatch.setattr(scorings, "_winograd", lambda *args: 1.5 * right(*args))
    model, x = made()
    engine = sf.Engine(model, OCCLUSION)
    assert off(engine(x, 1).values, model, x) < 1e-5
    assert engine.plan(x, 1).lean == "off"
    assert "scores are off by" in str(engine.plan(x, 1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs of which one for scores was made."""
    found: list[Program] = []

    def noted(program: Program) -> Program:
        found.append(program)
        return scoring(program)

    monkeypatch.setattr(strategies, "scoring", noted)
    return found


def test_gradients_take_the_program_as_it_is(asked: list[Program]) -> None:
    model, x = made()
    sf.explain(model, x, target=1, method=sf.IntegratedGradients(4))
    assert not asked
    sf.explain(model, x, target=1, method=OCCLUSION)
    assert asked


def test_requests_that_share_launches_copy_no_weights(asked: list[Program]) -> None:
    model, x = made()
    with sf.Engine(model, OCCLUSION) as engine:
        found = [engine.submit(x, 1).result(timeout=60).values]
        # To see whether the program holds.
        probed = len(asked)
        assert probed <= 1
        several = engine.explain_many([{"inputs": one, "target": 1} for one in x.split(1)])
        assert len(asked) == probed
        # A call alone does.
        found += [torch.cat([one.values for one in several]), engine(x, 1).values]
        assert len(asked) > probed
    assert all(off(values, model, x) < 1e-5 for values in found)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the one switch: `flags` sets those of TF32 with it, of which PyTorch 2.15 warns on CPUs.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    model, x = made()
    engine = sf.Engine(model, OCCLUSION)
    assert off(engine(x, 1).values, model, x) < 1e-5
    program = fused(record(model, x)).with_channels_last()
    assert "reordered" not in kinds(scoring(program))
    if forced() in (None, "native") and winograd_built():
        assert "winograd" in kinds(scoring(program))
