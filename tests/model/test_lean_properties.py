"""Random networks: every way of the lean engine gives the gradients of autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.graph.passes.fusion import fused, with_rectifiers
from saliency_fast.model.executors import RecordedExecutor
from tests import naive
from tests.model.answers import always_lean, by_hand, score_of, way_of, why
from tests.model.random_networks import KINDS, network
from tests.model.recording import Model, record

TOLERANCE = 1e-10
METHODS = (sf.IntegratedGradients(steps=4), sf.SmoothGrad(samples=3, seed=2))
drawn = given(
    axes=st.sampled_from((1, 2, 2, 3)),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7),
    seed=st.integers(0, 2**16),
)


@pytest.fixture(autouse=True)
def _lean():
    with always_lean():
        yield


def gradient(model: Model, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf * 1)[:, 1].sum(), leaf)[0]


def drawn_network(axes: int, kinds: list[str], seed: int) -> tuple[nn.Module, Tensor]:
    """Not one whose gradient rounding decides: normalised constants, and what cancels out."""
    model, x = network(axes, kinds, seed)
    here = gradient(model, x)
    assume(naive.relative_l2(gradient(model, x * (1 + 1e-14)), here) <= TOLERANCE / 100)
    return model, x


@settings(max_examples=400, deadline=None, derandomize=True)
@drawn
def test_gradients(axes: int, kinds: list[str], seed: int) -> None:
    model, x = drawn_network(axes, kinds, seed)
    engine = sf.Engine(model, sf.Gradient(), hashes=False)
    found, expected = engine(x, 1).values, gradient(model, x)
    # The engine would fall back where a program is wrong, and the map be right all the same.
    assert way_of(engine) == "program", why(engine)
    assert next(iter(engine._location.cache.values())).reason is None, why(engine)
    assert naive.relative_l2(found, expected) <= TOLERANCE


@settings(max_examples=150, deadline=None, derandomize=True)
@drawn
def test_prefixes(axes: int, kinds: list[str], seed: int) -> None:
    """Sums behind an affine beginning."""
    model, x = drawn_network(axes, kinds, seed)
    for method in METHODS:
        engine = sf.Engine(model, method, hashes=False)
        found = engine(x, 1).values
        assert way_of(engine) == "program", why(engine)
        plain = sf.Engine(model, method, hashes=False, lean=False)
        expected = plain(x, 1).values
        assume(naive.relative_l2(plain(x * (1 + 1e-14), 1).values, expected) <= TOLERANCE / 100)
        assert naive.relative_l2(found, expected) <= TOLERANCE


@settings(max_examples=150, deadline=None, derandomize=True)
@drawn
def test_pieces(axes: int, kinds: list[str], seed: int) -> None:
    """Programs as they are and fused, of which parts are computed again on the way back."""
    model, x = drawn_network(axes, kinds, seed)
    whole, expected = record(model, x), gradient(model, x)
    for program in (fused(whole), whole, with_rectifiers(whole).with_channels_last()):
        if program.channels_last and whole.aliased:
            continue
        for count in (2, 4):
            executor = RecordedExecutor(program.in_segments(count))
            found = gradient(lambda points, executor=executor: executor((points,), (), {}), x)
            assert naive.relative_l2(found, expected) <= TOLERANCE


@settings(max_examples=40, deadline=None, derandomize=True)
@drawn
def test_by_hand(axes: int, kinds: list[str], seed: int) -> None:
    """Against the naive loop, which shares nothing with the engine."""
    model, x = drawn_network(axes, kinds, seed)
    method = sf.IntegratedGradients(steps=3, rule="midpoint")
    found = sf.Engine(model, method, hashes=False)(x[:1], 1).values
    (expected,) = by_hand(model, score_of(1), (x[:1],), method)
    assert naive.relative_l2(found, expected) <= TOLERANCE
