"""More models: compiled, recurrent, attending and parametrised layers; arguments and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn

from tests.model.lean_models import CASES, Case, Net, case, seeded
from tests.models import randn


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3)).sin()


class Half(nn.Module):
    """A scripted half, and one that is not."""

    def __init__(self, compiled: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 1), compiled(Scripted().double())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x.mean((2, 3)).repeat(1, 2)[:, :3]


def traced(module: nn.Module) -> Any:
    return torch.jit.trace(module, randn(2, 2, 6, 6))


CASES |= {
    "scripted": Case(lambda: torch.jit.script(seeded(Scripted)), "watched"),
    "half scripted": Case(lambda: seeded(lambda: Half(torch.jit.script)), "watched"),
    "half traced": Case(lambda: seeded(lambda: Half(traced)), "watched"),
}


TOKENS = (randn(3, 5, 8, seed=4),)


class Sequences(nn.Module):
    """Tokens [R, T, 8] through `layer`, of which `pick` takes a tensor [R, T, *]."""

    def __init__(self, layer: nn.Module, pick: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        return self.pick(self.layer, x, *more, **named).mean(1)


def sequences(make: Callable[[], nn.Module], pick: Any, way: str = "program", **more: Any) -> Case:
    return Case(lambda: seeded(lambda: Sequences(make(), pick)), way, TOKENS, **more)


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    rows = rnn.pack_padded_sequence(x, [5] * len(x), batch_first=True)
    return rnn.pad_packed_sequence(layer(rows)[0], batch_first=True)[0]


def encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers > 1 else layer


ROWS = {"args": (torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]),)}
CASES |= {
    "lstm": sequences(lambda: nn.LSTM(8, 4, 2, batch_first=True), lambda m, x: m(x)[0]),
    "lstm's state": sequences(
        lambda: nn.LSTM(8, 4, bidirectional=True, batch_first=True),
        lambda m, x: m(x)[1][0].transpose(0, 1),
    ),
    "gru": sequences(lambda: nn.GRU(8, 4, batch_first=True), lambda m, x: m(x)[0]),
    "gru, packed": sequences(lambda: nn.GRU(8, 4, batch_first=True), packed, "watched"),
    "attention": sequences(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda m, x: m(x, x.flip(1), x, need_weights=False)[0],
    ),
    "attention and its weights": sequences(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda m, x: torch.cat(m(x, x, x), 2),
    ),
    "encoder layer": sequences(lambda: encoder(1), lambda m, x: m(x)),
    "encoder": sequences(lambda: encoder(2), lambda m, x: m(x)),
    "encoder, masked": sequences(
        lambda: encoder(2),
        lambda m, x, hidden: m(x, src_key_padding_mask=hidden),
        "watched",
        **ROWS,
    ),
    "encoder, causal": sequences(
        lambda: encoder(1),
        lambda m, x: m(
            x, nn.Transformer.generate_square_subsequent_mask(5).double(), is_causal=True
        ),
    ),
}
for name, normed in {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": torch.nn.utils.weight_norm,
    "old spectral norm": torch.nn.utils.spectral_norm,
}.items():

    def parametrised(normed: Any = normed) -> nn.Module:
        return nn.Sequential(
            normed(nn.Conv2d(2, 4, 3)), nn.ReLU(), nn.Flatten(), normed(nn.Linear(64, 3))
        )

    CASES[name] = Case(lambda make=parametrised: seeded(make))


# Arguments and results.
@dataclasses.dataclass
class Found:
    logits: Tensor
    words: str = "in words"


IDS, SHARED = torch.tensor([4, 0, 3]), randn(4, 1, 1, seed=8)
case("ids of rows", args=(IDS,))(lambda m, x, ids: m.first(x) * m.table(ids)[:, :, None, None])
case("named", kwargs={"ids": IDS, "add": SHARED, "flip": True, "half": 0.5})(
    lambda m, x, ids, add, flip, half: (
        (m.first(x) + add).flip(2 if flip else 3) * (m.table(ids)[:, :, None, None] + half)
    )
)
case("argument overwritten", kwargs={"add": randn(3, 4, 1, 1, seed=8)})(
    lambda m, x, add: m.first(x) * add.mul_(2.0).exp_()
)
case("two inputs", inputs=(randn(3, 2, 6, 6), randn(3, 4, seed=1)))(
    lambda m, x, t: m.relu(m.norm(m.first(x))) * t[:, :, None, None]
)


def returning(pack: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    class Packed(Net):
        def forward(self, *inputs: Tensor) -> Any:
            return pack(super().forward(*inputs))

    return lambda: seeded(lambda: Packed(lambda m, x: m.relu(m.first(x))))


CASES |= {
    "a tuple": Case(returning(lambda y: (y, [y.sin(), 3])), target=lambda raw: raw[1][0][:, 1]),
    "a dict": Case(returning(lambda y: {"out": y, "note": "n", "more": {"deep": y * 2}})),
    "a dataclass": Case(returning(Found), "watched"),
    "an argument": Case(returning(lambda y: (y, torch.ones(3))), target=lambda raw: raw[0][:, 1]),
}
