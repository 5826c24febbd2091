"""What is fused, what must not be, and that either gives autograd's own gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.graph.passes import fusion
from saliency_fast.graph.passes.fusion import fused
from saliency_fast.model.executors import EagerExecutor, RecordedExecutor
from tests.model.lean_cases import made
from tests.model.recording import record
from tests.model.ways import check, compare, take
from tests.models import randn
from tests.traces import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Block(nn.Module):
    """`body(self, x)` with a convolution, two normalisations and a linear layer at hand."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.wide, self.grouped = nn.Conv2d(9, 4, 3), nn.Conv2d(8, 4, 3, groups=2)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def added_in_place(m: Block, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    y += x
    return F.relu(y, inplace=True)


FUSED = {
    # Body, and the calls that are left of it.
    "norm, relu": (lambda m, x: m.norm(m.conv(x)).relu(), "conv2d rectified"),
    "norm, relu in place": (lambda m, x: m.norm(m.conv(x)).relu_(), "conv2d rectified"),
    "norm of the points, relu": (lambda m, x: m.norm(x).relu(), "rectified"),
    "norm, add, relu": (lambda m, x: (m.norm(m.conv(x)) + x).relu(), "conv2d rectified"),
    "add, norm, relu": (lambda m, x: (x + m.norm(m.conv(x))).relu(), "conv2d rectified"),
    "in place": (added_in_place, "conv2d rectified"),
    "two norms": (
        lambda m, x: (m.norm(m.conv(x)) + m.other(m.down(x))).relu(),
        "conv2d conv2d batch_norm rectified",
    ),
    "add, relu": (lambda m, x: (m.conv(x) + m.down(x)).relu(), "conv2d conv2d rectified"),
    "relu alone": (lambda m, x: m.conv(x).relu(), "conv2d rectified"),
    "relu6": (lambda m, x: torch._C._nn.relu6(m.norm(m.conv(x))), "conv2d rectified"),
    "leaky relu": (lambda m, x: F.leaky_relu(m.norm(m.conv(x)), 0.3), "conv2d rectified"),
    "cat, relu": (lambda m, x: torch.cat([x, m.conv(x)], 1).relu(), "conv2d cat rectified"),
    "twice": (
        lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())).relu(),
        "conv2d rectified conv2d rectified",
    ),
}


def image(size: tuple[int, int] = (6, 5)) -> Tensor:
    """Too small for weights to be folded, unless it is LARGE."""
    return randn(3, 4, *size, seed=2)


LARGE = (18, 17)


@pytest.mark.parametrize("name", FUSED)
def test_neighbours_are_fused(name: str) -> None:
    body, left = FUSED[name]
    model = made(Block, body)
    program = fused(record(model, image()))
    assert [step.name for step in program.steps] == left.split()
    taken = check(model, image())
    rectified = left.count("rectified")
    bits = rectified * (taken["program"].outputs[0].numel() // 8)
    # And the scales of the normalisations.
    assert bits <= taken["program"].kept <= bits + 8 * 4 * 2


FOLDED = {
    "norm": (lambda m, x: m.norm(m.conv(x)), "folded_convolution"),
    "norm, relu": (lambda m, x: m.norm(m.conv(x)).relu(), "folded_convolution rectified"),
    "in place": (added_in_place, "folded_convolution rectified"),
    "two norms": (
        lambda m, x: (m.norm(m.conv(x)) + m.other(m.down(x))).relu(),
        "folded_convolution folded_convolution rectified",
    ),
    "two in a row": (lambda m, x: m.other(m.norm(m.conv(x))), "folded_convolution batch_norm"),
    "cat, convolution": (
        lambda m, x: m.wide(torch.cat([m.conv(x).sin(), x, m.down(x)[:, :1]], 1)),
        "conv2d sin conv2d __getitem__ partial_convolution partial_convolution partial_convolution",
    ),
    "cat, convolution, norm": (
        lambda m, x: m.norm(m.wide(torch.cat((x, x.sin(), x[:, 1:2]), dim=1))).relu(),
        "sin __getitem__ partial_convolution partial_convolution partial_convolution rectified",
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_layers_are_folded(name: str) -> None:
    body, left = FOLDED[name]
    model = made(Block, body)
    names = [step.name for step in fused(record(model, image(LARGE))).steps]
    assert names == left.split()
    check(model, image(LARGE))


def view_in_between(m: Block, x: Tensor) -> Any:
    y = m.conv(x)
    first = y[:, 0]
    y += m.down(x)
    total = first.sum(1)
    return y.relu(), total


def base_overwritten(m: Block, x: Tensor) -> Tensor:
    y = m.conv(x)
    normed = m.norm(y)
    y.mul_(0.5)
    return (normed + m.down(x)).relu() + y


def residual_overwritten(m: Block, x: Tensor) -> Tensor:
    other = m.down(x)
    total = m.conv(x) + other
    other.zero_()
    return total.relu() + other


def residual_overwritten_by_view(m: Block, x: Tensor) -> Tensor:
    other = m.down(x)
    total = m.norm(m.conv(x)) + other
    other[:, 0].mul_(3.0)
    return total.relu() + other


def points_overwritten(m: Block, x: Tensor) -> Tensor:
    normed = m.norm(x)
    x.mul_(2.0)
    return normed.relu() + x


def detached(m: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.norm(m.conv(x)).relu()
    return y * x + (m.norm(m.conv(x)).detach() + x).relu() + m.norm(x.detach() + x).relu()


def detached_norm(m: Block, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        z = m.norm(y)
    return z * x + z


def detached_convolution(m: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv(x)
    return m.norm(y) * x


def part_overwritten(m: Block, x: Tensor) -> Tensor:
    parts = [m.conv(x), m.down(x), x[:, :1] * 2]
    joined = torch.cat(parts, 1)
    parts[1].mul_(0.5)
    parts[2][:, :, 0] = 0.0
    return m.wide(joined) + parts[1][:, :, 2:, 2:]


def cat_used_again(m: Block, x: Tensor) -> Any:
    joined = torch.cat([x, x.sin(), x[:, :1]], 1)
    return m.wide(joined), joined


def training_norm(m: Block, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.batch_norm(y, None, None, training=True).relu()


def kept_view(m: Block, x: Tensor) -> Any:
    y = m.conv(x)
    return y.relu(), y.flatten(1).sum(1)


def overwritten_slices(m: Block, x: Tensor) -> Any:
    y = m.conv(x)
    y[:, :2].relu_()
    F.leaky_relu(y[:, 2], 0.3, inplace=True)
    y[:, 3] = 0.5
    y[:, :, 0] = x[:, :, 1]
    return y.relu_()


TRAPS = {
    "of itself": lambda m, x: (lambda b: (b + b).relu())(m.norm(m.conv(x))),
    "used twice": lambda m, x: (lambda b: (b + x).relu() * b)(m.norm(m.conv(x))),
    "sum used twice": lambda m, x: (lambda s: s.relu() + s)(m.norm(m.conv(x)) + x),
    "base used again": lambda m, x: (lambda y: m.norm(y).relu() + y)(m.conv(x)),
    "returned": lambda m, x: (lambda y: (y, m.norm(y).relu()))(m.conv(x)),
    "all returned": lambda m, x: (lambda y: (y, y.relu()))(m.norm(m.conv(x))),
    "broadcast": lambda m, x: (m.norm(m.conv(x)) + m.down(x)[:, :1]).relu(),
    "of rows": lambda m, x: (m.norm(m.conv(x)) + m.down(x).mean(0)).relu(),
    "scaled": lambda m, x: torch.add(m.norm(m.conv(x)), x, alpha=0.5).relu(),
    "of a number": lambda m, x: (m.norm(m.conv(x)) + 0.5).relu(),
    "of a weight": lambda m, x: (m.norm(m.conv(x)) + m.down.weight[0]).relu(),
    "by name": lambda m, x: torch.relu(input=torch.add(m.norm(m.conv(x)), other=x)),
    "slope by name": lambda m, x: torch._C._nn.leaky_relu(m.conv(x), negative_slope=0.4),
    "same norm": lambda m, x: m.norm(m.norm(m.conv(x)).relu() + m.norm(x)).relu(),
    "view in between": view_in_between,
    "kept view": kept_view,
    "base overwritten": base_overwritten,
    "residual overwritten": residual_overwritten,
    "residual overwritten by a view": residual_overwritten_by_view,
    "points overwritten": points_overwritten,
    "detached": detached,
    "detached norm": detached_norm,
    "detached convolution": detached_convolution,
    "norm of weights": lambda m, x: m.norm(m.down.weight).mean(0) * x,
    "norm of a convolution used again": lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
    "norm of a view": lambda m, x: (
        m.norm(m.conv(x)[:, :, 1:]).relu() + m.norm(m.conv(x).flip(2))[:, :, 1:]
    ),
    "convolution by the points' own": lambda m, x: m.norm(
        F.conv2d(x, m.conv.weight * x.mean(), padding=1)
    ).relu(),
    "norm by the points' own": lambda m, x: F.batch_norm(
        m.conv(x), m.norm.running_mean, m.norm.running_var, x.mean((0, 2, 3))
    ).relu(),
    "part overwritten": part_overwritten,
    "cat used again": cat_used_again,
    "cat of one twice": lambda m, x: m.wide(torch.cat([x, x, x[:, :1]], 1)),
    "cat of weights": lambda m, x: m.wide(
        torch.cat([x, torch.ones_like(x) * m.down.bias[:, None, None], x[:, :1]], 1)
    ),
    "cat in groups": lambda m, x: m.grouped(torch.cat([x, x.sin()], 1)),
    "cat of lines": lambda m, x: m.conv(torch.cat([x, x.sin()], 2)),
    "padded cat": lambda m, x: F.conv2d(
        torch.cat([x, x.sin()], 1), m.grouped.weight.repeat(1, 2, 1, 1), None, 2, 2
    ),
    "norm in training": training_norm,
    "overwritten slices": overwritten_slices,
    "chunks": lambda m, x: torch.cat([one.relu() for one in m.conv(x).split(1, 1)], 1),
    "permuted": lambda m, x: m.norm(m.conv(x).mT).relu() + m.conv(x).relu().mT,
    "expanded": lambda m, x: (m.norm(x[:, :, :1].expand_as(x)) + x).relu(),
    "in three types": lambda m, x: (m.conv(x).float().relu().double() + x).relu(),
}


@pytest.mark.parametrize("size", [(6, 5), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, size: tuple[int, int]) -> None:
    """The program itself must be right; that a probe would refuse it is the second net."""
    tolerance = 1e-6 if name == "in three types" else 1e-12
    check(made(Block, TRAPS[name]), image(size), tolerance)


def test_a_dropped_residual_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison that the tests above rest on, with a fused path broken on purpose."""
    real = fusion.rectified

    def dropped(x: Tensor, norm: Any, residual: Any, *rest: Any) -> Tensor:
        return real(x, norm, None, *rest)

    model = made(Block, added_in_place)
    expected = take(EagerExecutor(model), image())
    compare(take(RecordedExecutor(fused(record(model, image()))), image()), expected, 1e-12)
    monkeypatch.setattr(fusion, "rectified", dropped)
    found = take(RecordedExecutor(fused(record(model, image()))), image())
    with pytest.raises(AssertionError, match="off by"):
        compare(found, expected, 1e-12)
    # In the gradient too.
    with pytest.raises(AssertionError, match="gradient: off by"):
        compare(replace(found, outputs=expected.outputs), expected, 1e-12)
