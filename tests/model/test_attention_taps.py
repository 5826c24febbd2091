"""Taps on attention: probabilities of fused and written-out attention, and what is none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast.errors import ModelError, NoAttentionError
from saliency_fast.model.attention import AttentionTaps, probabilities
from tests import naive_attention
from tests.models import randn
from tests.transformer_models import KINDS, eager_attention, tiny

# Rounding of float64 sums; transformers' own softmax is float32 in some models.
FLOAT64, SOFTMAX32 = 1e-12, 1e-6


def near(found: Tensor, expected: Tensor, tolerance: float = FLOAT64) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_taps_equal_what_transformers_return(kind: str, form: str) -> None:
    model, inputs = tiny(kind, form)
    expected, plain = eager_attention(model, inputs), model(**inputs)[0]
    raw, taps = AttentionTaps().run(lambda: model(**inputs))
    assert len(taps) == len(expected) == 3
    for found, one in zip(taps, expected, strict=True):
        near(found, one, SOFTMAX32)
    near(raw[0], plain, SOFTMAX32)
    grads = torch.autograd.grad(raw[0].square().sum(), taps)
    assert all(float(one.abs().sum()) > 0 for one in grads)
    assert all(one.grad is None for one in model.parameters())


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "dropout is off": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_fused_attention_step_by_step(options: dict[str, object], mask: str | None) -> None:
    if mask and options.get("is_causal"):
        pytest.skip("PyTorch takes one of both")
    query, key, value = (randn(2, 3, 4, 5, seed=n) for n in range(3))
    keep = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[0, :, 1] = False
    given = {None: None, "bool": keep, "float": randn(4, 4, seed=9)}[mask]
    raw, (found,) = AttentionTaps().run(
        lambda: functional.scaled_dot_product_attention(query, key, value, given, **options)
    )
    weights, output = naive_attention.attention(
        query, key, value, given, bool(options.get("is_causal")), options.get("scale")
    )
    near(found, weights)
    near(raw, output)
    if "dropout_p" not in options:
        near(raw, functional.scaled_dot_product_attention(query, key, value, given, **options))


def test_grouped_queries() -> None:
    query, key, value = randn(2, 4, 5, 3), randn(2, 2, 5, 3, seed=1), randn(2, 2, 5, 3, seed=2)
    raw, (found,) = AttentionTaps().run(
        lambda: functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    )
    weights, output = naive_attention.attention(query, key, value)
    near(found, weights)
    near(raw, output)


def test_rows_that_see_nothing_have_gradients() -> None:
    query = randn(1, 1, 2, 3).requires_grad_()
    mask = torch.tensor([[True, True], [False, False]])
    weights, _ = probabilities(query, query, query, mask)
    weights[0, 0, 0, 0].backward()
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())


class Multihead(nn.Module):
    """nn.MultiheadAttention, in all its forms."""

    def __init__(self, *, first: bool, weights: bool, **options: object) -> None:
        super().__init__()
        self.first, self.weights = first, weights
        self.layer = nn.MultiheadAttention(8, 4, batch_first=first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        y, _ = self.layer(x, x, x, need_weights=self.weights)
        return y if self.first else y.transpose(0, 1)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "fast path"])
def test_multihead_attention(first: bool, weights: bool, frozen: bool) -> None:
    model = Multihead(first=first, weights=weights).double().eval().requires_grad_(not frozen)
    x = randn(3, 5, 8)
    layer = model.layer
    turned = x if first else x.transpose(0, 1)
    _, expected = layer(turned, turned, turned, average_attn_weights=False)
    raw, (found,) = AttentionTaps().run(lambda: model(x))
    near(found, expected)
    near(raw, model(x))
    (grad,) = torch.autograd.grad(raw.square().sum(), found)
    assert float(grad.abs().sum()) > 0


def test_encoder_layers_leave_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    model.requires_grad_(False)
    x, padding = randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    raw, taps = AttentionTaps().run(lambda: model(x, src_key_padding_mask=padding))
    assert [list(one.shape) for one in taps] == [[2, 2, 6, 6]] * 2
    assert not bool(taps[0][1, :, :, 4:].any())
    near(raw[0], model(x, src_key_padding_mask=padding)[0], 1e-10)


class Written(nn.Module):
    """Attention written out by hand, over [B, heads, T, T] or [B * heads, T, T]."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], flat: bool) -> None:
        super().__init__()
        self.product, self.flat = product, flat
        self.maps = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.maps(x).view(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.flat:
            q, k, v = (one.reshape(batch * 2, tokens, 4) for one in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        self.seen = weights.detach()
        y = self.product(self.drop(weights), v)
        return y.reshape(batch, 2, tokens, 4).transpose(1, 2).flatten(2).mean(1)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "@": (lambda a, v: a @ v, False),
    "matmul": (torch.matmul, False),
    "matmul, named": (lambda a, v: torch.matmul(input=a, other=v), False),
    "scaled": (lambda a, v: (a * 0.5).clone() @ v, False),
    "einsum": (lambda a, v: torch.einsum("bhij,bhjd->bhid", a, v), False),
    "einsum, values first": (lambda a, v: torch.einsum("bhjd, bhij -> bhid", v, a), False),
    "@ flat": (lambda a, v: a @ v, True),
    "bmm": (torch.bmm, True),
    "einsum flat": (lambda a, v: torch.einsum("nij,njd->nid", a, v), True),
    "cast": (lambda a, v: a.to(v.dtype).contiguous() @ v, False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_attention_written_by_hand(name: str) -> None:
    model = Written(*PRODUCTS[name]).double().eval()
    x = randn(3, 5, 8)
    raw, (found,) = AttentionTaps().run(lambda: model(x))
    near(found, model.seen.view(3, 2, 5, 5) * (0.5 if name == "scaled" else 1))
    near(raw, model(x))
    (grad,) = torch.autograd.grad(raw.square().sum(), found)
    # The tap is what the output comes from: moving it moves the output as its gradient says.
    assert float(grad.abs().sum()) > 0


class Classifier(nn.Module):
    """Softmaxes of classes, prototypes and experts, over axes as square as attention's."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end
        self.layer = nn.Linear(5, 5)
        self.prototypes = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        share = self.layer(x).softmax(-1)
        if self.end == "classes":
            return share
        if self.end == "prototypes":
            return share @ self.prototypes
        if self.end == "experts":
            return torch.einsum("btk,kd->btd", share, self.prototypes)
        return self.prototypes @ share


@pytest.mark.parametrize("end", ["classes", "prototypes", "experts", "right"])
def test_other_softmaxes_are_no_attention(end: str) -> None:
    model = Classifier(end).eval()
    with pytest.raises(NoAttentionError, match="scaled_dot_product_attention"):
        AttentionTaps().run(lambda: model(torch.randn(3, 5, 5)))


def test_pooling_by_attention_is_passed_over() -> None:
    query, keys = randn(2, 3, 1, 4), randn(2, 3, 6, 4, seed=1)

    def model(x: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(x, x, x)
        return functional.scaled_dot_product_attention(query, y, y)

    _, taps = AttentionTaps().run(lambda: model(keys))
    assert [list(one.shape) for one in taps] == [[2, 3, 6, 6]]
    with pytest.raises(NoAttentionError, match=r"met only \[2, 3, 1, 6\]"):
        AttentionTaps().run(lambda: functional.scaled_dot_product_attention(query, keys, keys))


def test_windows_are_an_error() -> None:
    def windowed(x: Tensor) -> Tensor:
        cut = x.view(2, 4, 2, 1, 8).flatten(0, 1).transpose(1, 2)
        y = functional.scaled_dot_product_attention(cut, cut, cut)
        return y.reshape(2, -1)

    with pytest.raises(ModelError, match="windows"):
        AttentionTaps().run(lambda: windowed(randn(2, 8, 8)))


def test_attention_without_probabilities_is_an_error() -> None:
    x = torch.randn(2, 3, 4, 8)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with pytest.raises(NoAttentionError, match="keeps no attention probabilities"):
        AttentionTaps().run(lambda: flash(x, x, x))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_an_error() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    x = torch.randn(2, 3, 4, 8)
    with pytest.raises(NoAttentionError, match="FlexAttention"):
        AttentionTaps().run(lambda: flex_attention(x, x, x))


def test_compiled_models_are_read_as_they_are() -> None:
    model = Written(torch.matmul, False).double().eval()
    compiled, x = torch.compile(model, backend="eager"), randn(2, 5, 8)
    compiled(x)
    _, (found,) = AttentionTaps().run(lambda: compiled(x))
    near(found, model.seen.view(2, 2, 5, 5))


def test_without_gradients_probabilities_are_there() -> None:
    model, x = Written(torch.matmul, True).double().eval(), randn(2, 5, 8)
    with torch.no_grad():
        _, (found,) = AttentionTaps().run(lambda: model(x))
    near(found.detach(), model.seen.view(2, 2, 5, 5))


def test_gradients_at_taps_are_finite_differences() -> None:
    value, scores = randn(1, 1, 3, 2), randn(1, 1, 3, 3, seed=3)

    def answer(change: Tensor | float = 0.0) -> Tensor:
        weights = scores.softmax(-1) + change
        return (weights @ value).tanh().sum()

    raw, (found,) = AttentionTaps().run(lambda: (scores.softmax(-1) @ value).tanh().sum()[None])
    (grad,) = torch.autograd.grad(raw.sum(), found)
    for place in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[place] = 1e-6
        change = (answer(step.view(1, 1, 3, 3)) - answer(-step.view(1, 1, 3, 3))) / 2e-6
        assert math.isclose(float(grad.flatten()[place]), float(change), abs_tol=1e-9)


def test_errors_of_the_model_pass_through() -> None:
    def broken() -> Tensor:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        AttentionTaps().run(broken)
    assert torch.overrides._get_current_function_mode() is None
