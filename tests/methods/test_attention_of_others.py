"""Attention methods read attention among the tokens of the explained input, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import NoAttentionError

LENGTH, WIDTH = 6, 8


def attend(query: Tensor, key: Tensor, fused: bool) -> Tensor:
    if fused:
        return nn.functional.scaled_dot_product_attention(query, key, key)
    return (query @ key.mT).softmax(-1) @ key


class Layer(nn.Module):
    """Attention of two heads, and a feed-forward network."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fused = fused

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k = (
            layer(one).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, one in ((self.q, x), (self.k, other))
        )
        x = x + attend(q, k, self.fused).transpose(1, 2).flatten(2)
        return x + self.up(x).tanh()


class Parts(nn.Module):
    """An encoder of the explained tokens, and whatever a case adds to it."""

    def __init__(self, forward: Callable[[Parts, Tensor, Tensor], Tensor], fused: bool) -> None:
        super().__init__()
        self.table, self.own = nn.Embedding(20, WIDTH), forward
        self.layers = nn.ModuleList(Layer(fused) for _ in range(2))
        self.others = nn.ModuleList(Layer(fused) for _ in range(2))
        self.mix, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)
        self.narrow = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def encoded(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, other = (one if one.is_floating_point() else self.table(one) for one in (x, other))
        return self.head(self.own(self, x, other).mean(1))


def _decoder(model: Parts, x: Tensor, other: Tensor) -> Tensor:
    x = model.encoded(x)
    for number, layer in enumerate(model.others):
        # Self-attention, then cross-attention, which is square where lengths agree.
        other = layer(other) if number else layer(layer(other), x)
    return model.others[1](other, x)


def _shifted(model: Parts, x: Tensor, other: Tensor) -> Tensor:
    """A decoder of the same tokens, each a place later."""
    y = torch.cat([other[:, :1], x[:, :-1]], 1)
    x = model.encoded(x)
    for layer in model.others:
        y = layer(layer(y), x)
    return y


def _tower(model: Parts, x: Tensor, other: Tensor) -> Tensor:
    for layer in model.others:
        other = layer(other)
    return model.encoded(x) * other.mean(1, keepdim=True)


def _conditioned(model: Parts, x: Tensor, other: Tensor) -> Tensor:
    """A tower whose tokens know the mean of the explained ones."""
    x = model.encoded(x)
    other = other + x.mean(1, keepdim=True)
    for layer in model.others:
        other = layer(other)
    return other


def _latents(model: Parts, x: Tensor, other: Tensor) -> Tensor:
    """As many latent vectors as there are tokens, which read these by cross-attention first."""
    x = model.encoded(x)
    y = model.others[0](model.table.weight[:LENGTH].expand(len(x), -1, -1), x)
    return model.others[1](y)


CASES: dict[str, Callable[[Parts, Tensor, Tensor], Tensor]] = {
    "alone": lambda model, x, other: model.encoded(x),
    "neighbours mixed before": lambda model, x, other: model.encoded(
        model.narrow(x.mT).mT if x.shape[1] > 4 else x
    ),
    "decoder": _decoder,
    "decoder of the same tokens": _shifted,
    "tower": _tower,
    "conditioned tower": _conditioned,
    "latents": _latents,
}


def _model(case: str, fused: bool) -> Parts:
    torch.manual_seed(0)
    return Parts(CASES[case], fused).eval().double()


def _given(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(20, generator=generator)[:LENGTH] for _ in range(4)])
    if kind == "ids":
        return ids[:2], ids[2:]
    found = torch.randn(2, 2, LENGTH, WIDTH, generator=generator).double()
    return found[0], found[1]


def _rolled(model: Parts, x: Tensor, case: str) -> Tensor:
    """Rollout from the first token through the encoder, by its layers' own projections."""
    x = x if x.is_floating_point() else model.table(x)
    x = model.narrow(x.mT).mT if case.startswith("neighbours") else x
    product = torch.eye(LENGTH).double().expand(len(x), -1, -1)
    for layer in model.layers:
        q, k = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in (layer.q, layer.k))
        scale = q.shape[-1] ** -0.5 if layer.fused else 1.0
        weights = (scale * q @ k.mT).softmax(-1).mean(1)
        product = (weights + torch.eye(LENGTH).double()) / 2 @ product
        x = layer(x)
    return product[:, 0].detach()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["ids", "vectors"])
@pytest.mark.parametrize("case", CASES)
def test_rollout_is_the_encoders(case: str, kind: str, fused: bool) -> None:
    model, (x, other) = _model(case, fused), _given(kind)
    method = sf.AttentionRollout(query=0)
    found = sf.explain(model, x, target=1, method=method, forward_args=(other,)).values
    expected = _rolled(model, x, case)
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_weighed_by_gradients(case: str) -> None:
    model, (x, other) = _model(case, True), _given("vectors")
    found = sf.explain(
        model, x, target=1, method=sf.GradientAttention(query=0), forward_args=(other,)
    ).values
    kept: list[Tensor] = []

    def attended(query: Tensor, key: Tensor, fused: bool) -> Tensor:
        weights = (query.shape[-1] ** -0.5 * query @ key.mT).softmax(-1)
        if weights.requires_grad:
            weights.retain_grad()
        kept.append(weights)
        return weights @ key

    before = globals()["attend"]
    globals()["attend"] = attended
    try:
        model(x, other)[:, 1].sum().backward()
    finally:
        globals()["attend"] = before
    # The tower runs before the encoder.
    own = kept[2:4] if case == "tower" else kept[:2]
    row = torch.zeros(2, LENGTH).double()
    row[:, 0] = 1
    for one in reversed(own):
        weighed = (one.grad * one).clamp_min(0).mean(1).detach()
        row = row + (row[:, None] @ weighed)[:, 0]
    assert float((found - row).norm()) <= 1e-9 * float(row.norm())


REFUSED: dict[str, Callable[[Parts, Tensor, Tensor], Tensor]] = {
    "another tower": lambda model, x, other: model.encoded(other) * x.mean(1, keepdim=True),
    "tokens mixed before": lambda model, x, other: model.encoded(model.mix(x.flip(1))[0].cumsum(1)),
    "queries of others": lambda model, x, other: model.layers[0](other, x),
    "keys of others": lambda model, x, other: model.layers[0](x, other),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["ids", "vectors"])
@pytest.mark.parametrize("method", ["attention_weights", "attention_rollout"])
def test_none_among_these_tokens(method: str, kind: str, case: str) -> None:
    torch.manual_seed(0)
    model, (x, other) = Parts(REFUSED[case], True).eval().double(), _given(kind)
    layout = "BTC" if kind == "vectors" else None
    with pytest.raises(NoAttentionError, match="among the tokens of the explained input"):
        sf.explain(model, x, target=1, method=method, forward_args=(other,), layout=layout)


class Pictures(nn.Module):
    """A vision transformer beside the tower of a text of as many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.class_token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(WIDTH))
        self.table = nn.Embedding(20, WIDTH)
        self.image, self.text = Layer(True), Layer(True)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(x), 1, -1), tokens], 1)
        text = self.text(self.table(ids)).mean(1)
        return (self.image(tokens)[:, 0] * text).sum(1, keepdim=True)


@pytest.mark.parametrize("length", [4, 5, 7])
def test_the_text_beside_a_picture(length: int) -> None:
    torch.manual_seed(0)
    model, x = Pictures().eval().double(), torch.rand(2, 3, 8, 8).double()
    ids = torch.randint(0, 20, (2, length))
    method: Any = sf.AttentionWeights(query=0)
    found = sf.explain(model, x, target=0, method=method, forward_args=(ids,)).values
    single_row = nn.Sequential(model.cut, nn.Flatten(2))
    tokens = torch.cat([model.class_token.expand(2, 1, -1), single_row(x).mT], 1)
    q, k = (
        layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
        for layer in (model.image.q, model.image.k)
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
    expected = nn.functional.interpolate(
        weights.view(2, 1, 2, 2), (8, 8), mode="bilinear", align_corners=False
    )
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
