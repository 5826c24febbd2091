"""Rules of relevance propagation, one layer at a time, against loops over single weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.rules.intercept import RulesExecutor
from saliency_fast.rules.lrp import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    ZBox,
    ZPlus,
    read_rule,
)
from saliency_fast.rules.lrp_operators import Composite
from tests.models import randn
from tests.naive import relative_l2
from tests.rules import naive_rules

EXACT = 1e-11
LOW, HIGH = -3.5, 4.0

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "linear of tokens": (lambda: nn.Linear(4, 3), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), (2, 4, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2, padding="same"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2), (2, 3, 2, 3)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 4)),
    "transposed 2-d": (lambda: nn.ConvTranspose2d(4, 2, 2, groups=2), (4, 3, 2)),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(2, 2, 2, padding=1), (2, 3, 3, 3)),
    "conv merged with its norm": (
        lambda: _normed(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)),
        (2, 3, 4),
    ),
    "transposed merged": (
        lambda: _normed(nn.ConvTranspose1d(2, 3, 2), nn.BatchNorm1d(3, affine=False)),
        (2, 4),
    ),
    "linear merged": (lambda: _normed(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)), (4,)),
}
RULES: dict[str, tuple[Any, naive_rules.Rule]] = {
    "epsilon": (Epsilon(0.3), partial(naive_rules.epsilon_rule, eps=0.3)),
    "gamma": (Gamma(0.4, 0.01), partial(naive_rules.gamma_rule, gamma=0.4, eps=0.01)),
    "z_plus": (ZPlus(0.01), partial(naive_rules.alpha_beta_rule, alpha=1.0, eps=0.01)),
    "alpha_beta": (
        AlphaBeta(2, 1, 0.01),
        partial(naive_rules.alpha_beta_rule, alpha=2.0, eps=0.01),
    ),
    "flat": (Flat(), naive_rules.flat_rule),
    "z_box": (
        ZBox(LOW, HIGH, 0.01),
        partial(naive_rules.box_rule, low=torch.tensor(LOW), high=torch.tensor(HIGH), eps=0.01),
    ),
}


def _normed(layer: nn.Module, norm: Any) -> nn.Module:
    norm.running_mean.copy_(torch.linspace(-1, 1, 3))
    norm.running_var.copy_(torch.linspace(0.5, 2, 3))
    if norm.affine:
        norm.weight.data.copy_(torch.tensor([1.5, -0.7, 0.4]))
        norm.bias.data.copy_(torch.tensor([0.2, -0.3, 0.1]))
    return nn.Sequential(layer, norm)


def shared(
    layer: Any, rule: Any, x: Tensor, relevance: Tensor | None = None, **fields: Any
) -> tuple[Tensor, Tensor]:
    """Relevance of x and of the layer's outputs, all of them where none is given."""
    composite = Composite(rule, rule, **fields)
    leaf = x.clone().requires_grad_()
    raw = RulesExecutor(layer, composite)([leaf.view_as(leaf)], (), {})
    relevance = randn(*raw.shape, seed=7) if relevance is None else relevance
    return torch.autograd.grad(raw, leaf, relevance)[0], relevance


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make().double().eval()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("positive", [True, False])
def test_against_loops(name: str, rule: str, positive: bool) -> None:
    make, shape = LAYERS[name]
    layer, (fast, slow) = _made(make), RULES[rule]
    x = randn(2, *shape)
    x = x.abs() if positive else x
    found, relevance = shared(layer, fast, x)
    weight, bias = naive_rules.matrix(layer, shape)
    for number in range(2):
        expected = slow(weight, bias, x[number].flatten(), relevance[number].flatten())
        assert relative_l2(found[number].flatten(), expected) < EXACT


def test_the_comparison_fails_where_it_should() -> None:
    layer = _made(lambda: nn.Linear(6, 5))
    x = randn(1, 6)
    found, relevance = shared(layer, Epsilon(0.3), x)
    weight, bias = naive_rules.matrix(layer, (6,))
    expected = naive_rules.epsilon_rule(weight, bias, x[0], relevance[0], 0.31)
    assert relative_l2(found[0], expected) > 1e-3


def test_box_with_bounds_per_channel() -> None:
    layer = _made(lambda: nn.Conv1d(2, 3, 3, padding=1))
    x, low, high = randn(1, 2, 5), (-4.0, -3.0), (3.0, 5.0)
    found, relevance = shared(layer, ZBox(low, high, 0.0), x)
    weight, bias = naive_rules.matrix(layer, (2, 5))
    wide = [torch.tensor(one, dtype=x.dtype).repeat_interleave(5) for one in (low, high)]
    expected = naive_rules.box_rule(weight, bias, x.flatten(), relevance.flatten(), *wide, 0.0)
    assert relative_l2(found.flatten(), expected) < EXACT
    with pytest.raises(InputError, match="got 3, the first layer takes 2 channels"):
        shared(layer, ZBox((0.0, 0.0, 0.0), 1.0), x)


def test_batch_normalisation_on_its_own_is_an_affine_layer() -> None:
    """Behind no layer with weights, or where it is not to be merged."""
    norm = _normed(nn.Identity(), nn.BatchNorm1d(3)).double().eval()
    x = randn(2, 3, 4)
    scale, shift = naive_rules.matrix(norm, (3, 4))
    for fields in ({}, {"norms": "epsilon"}):
        found, relevance = shared(norm, ZPlus(), x, epsilon=0.1, **fields)
        for number in range(2):
            given = x[number].flatten(), relevance[number].flatten()
            expected = naive_rules.epsilon_rule(scale, shift, *given, 0.1)
            assert relative_l2(found[number].flatten(), expected) < EXACT
    pair = _made(LAYERS["conv merged with its norm"][0])
    x = randn(2, 2, 3, 4)
    merged, apart = (
        shared(pair, Epsilon(0.01), x, epsilon=0.01, norms=norms)[0]
        for norms in ("merge", "epsilon")
    )
    middle, relevance = shared(pair[1], Epsilon(0.01), pair[0](x).detach(), epsilon=0.01)
    assert relative_l2(apart, shared(pair[0], Epsilon(0.01), x, middle)[0]) < EXACT
    assert relative_l2(merged, apart) > 1e-3


NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "layer": (lambda: nn.LayerNorm((3, 4)), 1),
    "layer, no weights": (lambda: nn.LayerNorm((3, 4), elementwise_affine=False), 1),
    "group": (lambda: nn.GroupNorm(3, 6), 3),
    "instance": (lambda: nn.InstanceNorm1d(6, affine=True), 6),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_affine_with_their_deviation_as_a_number(name: str) -> None:
    make, groups = NORMS[name]
    norm, x = _made(make), randn(2, 3, 4) if "layer" in name else randn(2, 6, 4)
    for one in norm.parameters():
        one.data.uniform_(-1.0, 2.0, generator=torch.Generator().manual_seed(1))
    found, relevance = shared(norm, Pass(), x, epsilon=0.1)
    for number in range(2):
        size = x[number].numel() // groups
        given, weight = x[number].reshape(groups, size), torch.ones_like(x[number])
        bias = torch.zeros_like(weight)
        if "no weights" not in name:
            wide = norm.weight.shape if "layer" in name else (-1, 1)
            weight, bias = weight * norm.weight.view(wide), bias + norm.bias.view(wide)
        for group in range(groups):
            rate = 1 / (given[group].var(unbiased=False) + norm.eps).sqrt()
            centred = torch.eye(size, dtype=x.dtype) - 1 / size
            own, shift, out = (
                one.detach().reshape(groups, size)[group]
                for one in (weight, bias, relevance[number])
            )
            matrix = own[:, None] * rate * centred
            expected = naive_rules.epsilon_rule(matrix, shift, given[group], out, 0.1)
            assert relative_l2(found[number].reshape(groups, size)[group], expected) < EXACT


def _dense(call: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, eps: float) -> Tensor:
    weight, bias = naive_rules.matrix(lambda one: call(one), x.shape[1:])
    return torch.stack(
        [
            naive_rules.epsilon_rule(weight, bias, one.flatten(), r.flatten(), eps).view(one.shape)
            for one, r in zip(x, relevance, strict=True)
        ]
    )


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum((2, 3)),
    "mean": lambda x: x.mean(-1),
    "average pool": lambda x: F.avg_pool2d(x, 2, 1, 1),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "bilinear": lambda x: F.interpolate(x, size=(7, 6), mode="bilinear"),
    "cumulative sum": lambda x: x.cumsum(2),
    "product with numbers": lambda x: torch.linspace(1, 2, 12, dtype=x.dtype).view(3, 4) @ x,
    "einsum with numbers": lambda x: torch.einsum(
        "bchw,hk->bckw", x, torch.linspace(1, 2, 8, dtype=x.dtype).view(4, 2)
    ),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda x: x.transpose(1, 2).flatten(1)[:, 3:].unsqueeze(1),
    "pad and concatenate": lambda x: torch.cat(
        [F.pad(x, (1, 2)), x.repeat(1, 1, 1, 2)[..., :7]], 1
    ),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "written in place": lambda x: _written(x),
    "stack, split": lambda x: torch.stack([*x.chunk(2, -1), x[..., :2]]).mT.movedim(0, 1),
    "largest": lambda x: x.amax((2, 3)),
    "where": lambda x: torch.where(x > 0, x, 0.0).masked_fill(x > 1, 0.0),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "max pool": lambda x: F.max_pool2d(x, 2, 1),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
}


def _written(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, :2]
    return y


@pytest.mark.parametrize("name", LINEAR)
def test_sums_share_by_the_epsilon_rule(name: str) -> None:
    x = randn(2, 3, 4, 4)
    found, relevance = shared(LINEAR[name], Pass(), x, epsilon=0.2)
    assert relative_l2(found, _dense(LINEAR[name], x, relevance, 0.2)) < EXACT


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_numbers_moves_relevance(name: str) -> None:
    x = randn(2, 3, 4, 4)
    found, relevance = shared(MOVES[name], Pass(), x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(MOVES[name](leaf.view_as(leaf)), leaf, relevance)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda: Epsilon(-1.0), InputError, "epsilon must be a finite number of 0 or more"),
        (lambda: Epsilon("1"), InputTypeError, "epsilon must be a number"),
        (lambda: Gamma(float("nan")), InputError, "gamma must be a finite number"),
        (lambda: Gamma(bias="none"), InputError, "bias must be one of rule, keep, zero"),
        (lambda: AlphaBeta(2, 0), InputError, "alpha - beta must be 1"),
        (lambda: ZBox("a", 1.0), InputTypeError, "low must be a number"),
        (lambda: read_rule("z"), InputError, "a rule must be one of epsilon, gamma"),
        (lambda: read_rule(("epsilon", 1, 2)), InputError, "takes the parameters epsilon"),
        (lambda: read_rule("z_box"), InputError, "takes the parameters low, high"),
        (lambda: Composite(norms="x"), InputError, "norms must be one of merge, epsilon"),
    ],
)
def test_bad_rules(rule: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule()
