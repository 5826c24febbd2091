"""Relevance through whole models: conserved, as Captum has it, named where it cannot go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import (
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
)
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.errors import InputError, ModelError
from saliency_fast.rules.lrp import Epsilon, Flat, ZBox
from saliency_fast.rules.lrp_operators import COMPOSITES, Composite, composite
from tests.models import randn
from tests.naive import relative_l2
from tests.rules.ruled import (
    RELUS,
    SHAPES,
    Functional,
    Residual,
    Row,
    network,
    points,
    ruled,
    scores,
)

EXACT = 1e-10


def lost(model: Any, rules: Any, x: Tensor, target: Any) -> float:
    """The largest difference of summed relevance and score, against the sum of |relevance|."""
    found = ruled(model, rules, x, target).flatten(1)
    gap = (found.sum(1) - scores(model, x, target)).abs()
    return float((gap / found.abs().sum(1)).max())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU], ids=lambda one: one.__name__)
def test_conserved_without_biases(kind: str, act: Any) -> None:
    model, x = network(kind, act, bias=False), points(kind)
    assert lost(model, composite("epsilon", 0.0), x, [0, 3, 1]) < 1e-12


@pytest.mark.parametrize("kind", SHAPES)
def test_an_epsilon_absorbs_as_much_as_it_is_large(kind: str) -> None:
    model, x = network(kind, bias=False), points(kind)
    losses = [lost(model, composite("epsilon", eps), x, 2) for eps in (1e-4, 1e-7, 1e-10)]
    assert losses[0] > 100 * losses[1] > 10000 * losses[2]
    assert losses[2] < 1e-6


@pytest.mark.parametrize("first", [Flat(), ZBox(-9.0, 9.0, 0.0)], ids=["flat", "box"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "tokens"])
def test_rules_of_the_first_layer_conserve(kind: str, first: Any) -> None:
    model, x = network(kind, bias=False), points(kind)
    assert lost(model, Composite(Epsilon(0.0), Epsilon(0.0), first, epsilon=0.0), x, 1) < 1e-12


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("kind", SHAPES)
def test_composites(name: str, kind: str) -> None:
    """Finite numbers, the same whatever else is in the batch; relevance doubles with the score."""
    model, x = network(kind), points(kind)
    rules = composite(name, bounds=(-9.0, 9.0))
    found = ruled(model, rules, x, 1)
    assert found.isfinite().all()
    assert found.abs().sum() > 0
    assert relative_l2(ruled(model, rules, x[1:2], 1), found[1:2]) < EXACT


def test_first_layers_rule_is_for_the_first_alone() -> None:
    """Also behind pixels' own units; in two-input order, and not for what a layer feeds."""
    model, x = network("2-d"), points("2-d")
    named = ruled(model, composite("epsilon", layers=(("0", "flat"),)), x, 1)
    first = Composite(Epsilon(1e-6), Epsilon(1e-6), Flat())
    assert relative_l2(ruled(model, first, x, 1), named) < EXACT

    class Units(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(((x - 0.3) / 2.0).sub_(0.1))

    inner = ruled(model, first, (x - 0.3) / 2.0 - 0.1, 1)
    assert relative_l2(ruled(Units(), first, x, 1), inner) < EXACT


@pytest.mark.parametrize("form", RELUS)
def test_every_form_of_relu(form: str) -> None:
    x = points("residual")
    rules = composite("epsilon_plus_flat")
    expected = ruled(network("residual"), rules, x, 1)
    assert relative_l2(ruled(network("residual", RELUS[form]), rules, x, 1), expected) < EXACT


# --- Captum ---

CAPTUM: dict[str, tuple[Any, Any]] = {
    "gamma": (lambda: GammaRule(), ("gamma", 0.25, 1e-9, "keep", False)),
    "gamma without bias": (lambda: GammaRule(0.5, True), ("gamma", 0.5, 1e-9, "zero", False)),
    "alpha1 beta0": (lambda: Alpha1_Beta0_Rule(), ("z_plus", 1e-9, "keep", False)),
    "alpha1 beta0 without bias": (
        lambda: Alpha1_Beta0_Rule(True),
        ("z_plus", 1e-9, "zero", False),
    ),
    "epsilon": (lambda: EpsilonRule(0.1), ("epsilon", 0.1)),
}


def _image_net() -> Row:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Row(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Dropout(),
            nn.Linear(8, 6),
            nn.Tanh(),
            nn.Linear(6, 4),
        )
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    return model.double().eval()


def _by_captum(model: nn.Module, x: Tensor, rules: dict[str, Any] | None = None) -> Tensor:
    model = copy.deepcopy(model)
    for name, rule in (rules or {}).items():
        model.get_submodule(name).rule = rule
    return captum.attr.LRP(model).attribute(x.clone(), target=[0, 3, 1]).detach()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, 1e-5)])
def test_captums_defaults(dtype: torch.dtype, bound: float) -> None:
    model, x = _image_net().to(dtype), randn(3, 3, 17, 17).to(dtype)
    found = ruled(model, composite("captum", 1e-9), x, [0, 3, 1])
    assert relative_l2(found, _by_captum(model, x)) < bound
    model, x = network("mlp").to(dtype), points("mlp").to(dtype)
    found = ruled(model, composite("captum", 1e-9), x, [0, 3, 1])
    assert relative_l2(found, _by_captum(model, x)) < bound


@pytest.mark.parametrize("layer", ["0", "1", "4", "9", "11"])
@pytest.mark.parametrize("rule", CAPTUM)
def test_captums_rules(layer: str, rule: str) -> None:
    model, x = _image_net(), randn(3, 3, 17, 17)
    theirs, ours = CAPTUM[rule]
    found = ruled(model, composite("captum", 1e-9, layers=((layer, ours),)), x, [0, 3, 1])
    assert relative_l2(found, _by_captum(model, x, {layer: theirs()})) < EXACT


def test_captums_identity_and_addition() -> None:
    model, x = _image_net(), randn(3, 3, 17, 17)
    found = ruled(model, composite("captum", 1e-9, layers=(("1", "pass"),)), x, [0, 3, 1])
    assert relative_l2(found, _by_captum(model, x, {"1": IdentityRule()})) < EXACT

    class Added(nn.Module):
        """Two branches: Captum's sums go wrong where a skipped tensor is a summand itself."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 4)
            self.act, self.add = nn.ReLU(), Addition_Module()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.add(self.a(x), self.b(x))))

    model, x = Added().double(), points("mlp")
    found = ruled(model, composite("captum", 1e-9), x, [0, 3, 1])
    assert relative_l2(found, _by_captum(model, x)) < EXACT


# --- Attention ---


class Encoder(nn.Module):
    """A transformer of tokens, by PyTorch's own layer or with attention spelt out."""

    def __init__(self, bias: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True, bias=bias
        )
        self.head, self.fused = nn.Linear(8, 4, bias=bias), fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.head(self.layer(x).mean(1))
        layer, y = self.layer, self.layer.norm1(x)
        own = layer.self_attn
        q, k, v = F.linear(y, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        q, k, v = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (q, k, v))
        weights = ((q / 2.0) @ k.transpose(-2, -1)).softmax(-1)
        x = x + own.out_proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        return self.head((x + layer._ff_block(layer.norm2(x))).mean(1))


def _encoder(**options: bool) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Encoder(**options).double().eval()


def test_attention_conserves_with_constant_weights() -> None:
    model, x = _encoder(), randn(3, 5, 8)
    assert lost(model, composite("epsilon", 0.0, softmax="constant"), x, 1) < 1e-10


@pytest.mark.parametrize("softmax", ["taylor", "constant"])
def test_fused_attention_is_attention(softmax: str) -> None:
    x = randn(3, 5, 8)
    rules = composite("epsilon", 1e-6, softmax=softmax)
    found = ruled(_encoder(bias=True), rules, x, 1)
    spelt = ruled(_encoder(bias=True, fused=False), rules, x, 1)
    assert relative_l2(found, spelt) < 1e-9


def test_attention_by_hand() -> None:
    """Two products and a softmax, one number after another (Achtibat, 2024)."""
    q, k, v = (randn(3, 2, seed=seed) for seed in range(3))
    relevance = randn(3, 2, seed=9)
    x = torch.stack([q, k, v])[None]

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.unbind(1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    leaf = x.clone().requires_grad_()
    rules = composite("epsilon", 0.0)
    mode = rules.mode()
    raw = mode.run(attend, [leaf.view_as(leaf)], (), {})
    (found,) = torch.autograd.grad(raw, leaf, relevance[None])
    z = q @ k.T / 2**0.5
    s = z.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    out = s @ v
    of_s, of_v, of_q, of_k = (torch.zeros_like(one) for one in (s, v, q, k))
    for i in range(3):
        for c in range(2):
            for j in range(i + 1):
                share = s[i, j] * v[j, c] / out[i, c] * relevance[i, c] / 2
                of_s[i, j] += share
                of_v[j, c] += share
    for i in range(3):
        for j in range(i + 1):
            of_z = z[i, j] * (of_s[i, j] - s[i, j] * of_s[i].sum())
            for c in range(2):
                share = q[i, c] * k[j, c] / 2**0.5 / z[i, j] * of_z / 2
                of_q[i, c] += share
                of_k[j, c] += share
    assert relative_l2(found[0], torch.stack([of_q, of_k, of_v])) < EXACT


# --- What two tensors make, and what has no rule ---

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gate": lambda x: x * x.sigmoid().mean(1, keepdim=True),
    "negative": lambda x: -x,
    "difference": lambda x: x - 0.3 * x.flip(1),
    "quotient": lambda x: x / x.norm(dim=1, keepdim=True),
    "normalised": lambda x: F.normalize(x, dim=1),
    "own variance": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1).sqrt(),
    "root mean square": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    "outer": lambda x: torch.einsum("bi,bj->bij", x, x).flatten(1),
    "cosine": lambda x: F.cosine_similarity(x[:, :3], x[:, 3:6], dim=1)[:, None],
    "in place": lambda x: x.clone().mul_(x.tanh()).add_(x).div_(2.0).neg_(),
    "powers": lambda x: x**2 + 2**x - 1 / x.exp(),
    "layer norm": lambda x: F.layer_norm(x, (7,)),
    "group norm": lambda x: F.group_norm(x[:, :6, None], 2).flatten(1),
    "rms norm": lambda x: F.rms_norm(x, (7,)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_conserve(name: str) -> None:
    width = PRODUCTS[name](points("mlp")).shape[1]
    model = Row(Functional(PRODUCTS[name]), nn.Linear(width, 4, bias=False)).double()
    x = points("mlp")
    assert lost(model, composite("epsilon", 0.0), x, 1) < 1e-9


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * grad


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda x: torch.fft.rfft(x).abs(), "fft_rfft"),
        (lambda x: x.logsumexp(1, keepdim=True).expand(-1, 4), "logsumexp"),
        (lambda x: nn.LSTM(7, 4).double()(x[:, None])[0][:, 0], "lstm"),
        (lambda x: F.batch_norm(x, None, None, training=True), "frozen statistics"),
        (_Doubled.apply, "_Doubled"),
    ],
)
def test_what_has_no_rule_is_named(body: Any, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        ruled(Functional(body), composite("epsilon"), points("mlp"), 1)


def test_layers_by_name() -> None:
    model, x = network("residual"), points("residual")
    plain = composite("epsilon")
    flat = composite("epsilon", layers=(("stem", "flat"), ("second", ("gamma", 0.5))))
    assert relative_l2(ruled(model, flat, x, 1), ruled(model, plain, x, 1)) > 0.01
    both = nn.Sequential(model)
    inside = composite("epsilon", layers=(("0", "flat"),))
    assert relative_l2(ruled(both, inside, x, 1), ruled(both, plain, x, 1)) > 0.01
    for name, message in (("secnd", "did you mean 'second'"), ("act", "has no weights")):
        with pytest.raises(InputError, match=message):
            ruled(model, composite("epsilon", layers=((name, "flat"),)), x, 1)
    with pytest.raises(InputError, match="composite must be one of epsilon, z_plus"):
        composite("epsilon_minus")
    with pytest.raises(InputError, match="needs bounds"):
        composite("epsilon_gamma_box")


def test_a_model_is_not_changed() -> None:
    model = Residual(nn.ReLU, True).double().eval()
    before = copy.deepcopy(model.state_dict())
    ruled(model, composite("epsilon_gamma_box", bounds=(-9.0, 9.0)), points("residual"), 1)
    for name, one in model.state_dict().items():
        assert torch.equal(one, before[name])
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
