"""Where a slope changes and where values are equal: what autograd of the PyTorch that runs does.

Releases differ: clamp passes gradients at its bounds up to 2.13, and not from 2.14 on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saliency_fast as sf
from saliency_fast.graph import gradients as ties
from saliency_fast.graph.intercept import Calls
from tests.model.ways import check
from tests.models import randn

_nn = torch._C._nn
SHAPE = (3, 4, 9, 10)
ONE = torch.ones((), dtype=torch.float64)
SLOPES = torch.tensor([0.25, 0.5, 2.0, -1.0])


def grid() -> Tensor:
    """Halves from -3.5 to 6.5, every one of them often, with zeros of both signs."""
    x = torch.randint(-7, 14, SHAPE, generator=torch.Generator().manual_seed(3)).double() / 2
    return torch.where(randn(*SHAPE) > 0, x, -x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": lambda x: torch.relu_(x + 0),
    "nn.ReLU in place": lambda x: nn.ReLU(inplace=True)(x + 0),
    "relu6": F.relu6,
    "_nn.relu6": _nn.relu6,
    "_nn.relu6_": lambda x: _nn.relu6_(x + 0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.25),
    "leaky_relu in place": lambda x: F.leaky_relu_(x + 0, 0.25),
    "prelu of one": lambda x: F.prelu(x, SLOPES[:1].to(x.dtype)),
    "prelu": lambda x: F.prelu(x, SLOPES.to(x.dtype)),
    "rrelu": F.rrelu,
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 0.5),
    "selu": F.selu,
    "hardtanh": F.hardtanh,
    "hardtanh, uneven": lambda x: F.hardtanh(x, -3.0, 0.5),
    "hardtanh in place": lambda x: F.hardtanh_(x + 0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.5, -2.0),
    "threshold of zero": lambda x: F.threshold(x, 0.0, 0.0),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1, 0.5),
    "torch.clamp": lambda x: torch.clamp(x, min=0, max=6),
    "clamp to a point": lambda x: x.clamp(1, 1),
    "clamp, crossed": lambda x: x.clamp(1, -1),
    "clamp, min": lambda x: x.clamp(min=0),
    "clamp, max": lambda x: x.clamp(max=0.5),
    "clamp in place": lambda x: (x + 0).clamp_(-1, 0.5),
    "clamp of infinite bounds": lambda x: x.clamp(0, torch.inf),
    "clip": lambda x: x.clip(0, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: torch.clamp_max(x, 1),
    "clamp between tensors": lambda x: x.clamp(0 * ONE.to(x.dtype), ONE.to(x.dtype)),
    "clamp_min of a tensor": lambda x: x.clamp_min(0 * ONE.to(x.dtype)),
    "maximum": lambda x: torch.maximum(x, x.roll(1, -1)),
    "minimum": lambda x: torch.minimum(x, torch.zeros_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "fmin": lambda x: torch.fmin(x, x.flip(1)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "sign": lambda x: x.sign() * x.square(),
    "round": lambda x: x - x.detach().round() + x.floor(),
    "remainder": lambda x: x.remainder(1.5),
    "sqrt of a clamp": lambda x: x.clamp(min=0.5).sqrt(),
    "norm": lambda x: (x * (x > 1)).norm(dim=1),
    "cdist": lambda x: torch.cdist(x, x.round(), 1.0),
    "cosine": lambda x: F.cosine_similarity(x * (x > 1), x, dim=1),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "hinge": lambda x: F.relu(1 - x),
    "mean of a max": lambda x: x.mean((2, 3)) + x.amax((2, 3)),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f"{name} over {axis}": lambda x, call=call, axis=axis: call(x, axis)
        for axis in (1, 2, 3)
        for name, call in {
            "amax": torch.amax,
            "amin": torch.amin,
            "max": lambda x, axis: x.max(axis).values,
            "min": lambda x, axis: x.min(axis).values,
            "median": lambda x, axis: x.median(axis).values,
            "cummax": lambda x, axis: x.cummax(axis).values,
            "mode": lambda x, axis: x.mode(axis).values,
        }.items()
    },
    "max over tokens": lambda x: x.flatten(2).max(2).values,
    "maxout": lambda x: x.unflatten(1, (2, 2)).amax(2),
    "gather of argmax": lambda x: x.flatten(2).gather(2, x.flatten(2).argmax(2, keepdim=True)),
    "stable sort": lambda x: torch.sort(x.flatten(2), dim=2, stable=True).values,
}
WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, side by side": lambda x: F.max_pool2d(x, 2),
    "max_pool2d, dilated": lambda x: F.max_pool2d(x, 2, 1, 1, 2),
    "max_pool2d with places": lambda x: F.max_pool2d(x, 3, return_indices=True)[0],
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1),
    "max_pool3d": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 3, 3), 2, (0, 1, 1)),
    "global": lambda x: F.max_pool2d(x, x.shape[2:]),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
}
CALLS = {**ACTIVATIONS, **REDUCTIONS, **WINDOWS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_as_autograd(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = grid().to(dtype).contiguous(memory_format=layout)
    check(CALLS[name], x, 8 * torch.finfo(dtype).eps)


class Downstream(nn.Module):
    """A call between two convolutions: exact numbers with ties, whatever the layout."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.call = nn.Conv2d(3, 4, 1), call
        self.first.weight.data = torch.randint(-2, 3, (4, 3, 1, 1)).to(torch.get_default_dtype())
        self.first.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.first(x)).flatten(1)
        places = torch.linspace(0.5, 2.0, y.shape[1], dtype=y.dtype)
        return torch.stack([(y * places).sum(1), (y * places.flip(0)).sum(1)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["relu6", "clamp", "clamp, min", "hardtanh", "prelu", "threshold",
                                  "max_pool2d", "adaptive_max_pool2d", "max over 1", "amax over 2",
                                  "maximum", "clamp between tensors"])  # fmt: skip
def test_maps_as_autograd(name: str, dtype: torch.dtype) -> None:
    """Large enough for the lean program; whole numbers, as pictures of few colours have."""
    torch.manual_seed(0)
    model = Downstream(CALLS[name]).to(dtype).eval()
    x = torch.randint(-1, 3, (2, 3, 136, 128)).to(dtype) / 2
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    for lean in (True, False):
        found = sf.explain(model, x, target=1, method=sf.Gradient(), lean=lean)
        gap = float((found.values - expected).norm() / expected.norm())
        assert gap <= 16 * torch.finfo(dtype).eps, (gap, found.provenance.strategy)
        assert not lean or found.provenance.strategy.startswith("recorded"), (
            found.provenance.strategy
        )


@pytest.fixture
def asked_anew() -> Iterator[None]:
    ties.passes.cache_clear()
    yield
    ties.passes.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_it_is_asked_apart_from_what_the_caller_has_switched_on() -> None:
    """Modes, devices and threads of the caller neither see the question nor change the answer."""
    question = torch.clamp, (-1.0, 1.0), (-1.0, 0.0, 1.0)
    threads, usual = threading.active_count(), ties.passes(*question)
    assert usual[1]
    ties.passes.cache_clear()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert ties.passes(*question) == usual
    assert threading.active_count() == threads


@pytest.mark.usefixtures("asked_anew")
def test_asking_takes_no_time() -> None:
    torch.ones(1, requires_grad=True).sum().backward()
    took = []
    for _ in range(5):
        ties.passes.cache_clear()
        start = time.process_time()
        ties.passes(torch.relu, (), (0.0, -0.0))
        took.append(time.process_time() - start)
    assert min(took) < 5e-3


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("answer", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ["clamp", "hardtanh", "threshold", "prelu", "relu", "relu6"])
def test_another_answer_is_followed_or_left_to_autograd(
    name: str, answer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that did otherwise is followed where bits can say so, else autograd serves."""
    monkeypatch.setattr(ties, "_slopes", lambda call, args, points: [answer] * len(points))
    x = grid().requires_grad_()
    point = x.clone()
    with Calls():
        y = CALLS[name](point)
    (found,) = torch.autograd.grad(y.sum(), x)
    served = any(name in y.grad_fn.name() for name in ("_Lean", "_Ramp"))
    (own,) = torch.autograd.grad(CALLS[name](x + 0).sum(), x)
    low, high = {"clamp": (-1, 0.5), "hardtanh": (-1, 1), "threshold": (0.5, 0.5), "prelu": (0, 0),
                 "relu": (0, 0), "relu6": (0, 6)}[name]  # fmt: skip
    at = (x == low) | (x == high)
    assert torch.equal(found[~at], own[~at])
    if served:
        assert answer in (0.0, 1.0)
        assert name == "prelu" or bool((found[at] == answer).all())
    else:
        assert torch.equal(found, own)
