"""What the first layers of a model tell of its inputs, and where those lie in its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.engine.bind import bind, layouts_of
from saliency_fast.model.follow import Lattice


def told(model: Any, *inputs: Tensor) -> tuple[str | None, ...]:
    return layouts_of(model, bind(inputs, None, (), None), None).letters


class Enter(nn.Module):
    """A layer behind a function of the input."""

    def __init__(self, enter: Callable[..., Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.enter, self.layer = enter, layer

    def forward(self, *x: Tensor) -> Any:
        return self.layer(self.enter(*x))


def padded(x: Tensor) -> Tensor:
    return functional.interpolate(functional.pad(x, (1, 1, 2, 2)), scale_factor=2)


def normal(x: Tensor) -> Tensor:
    return (x - x.mean((2, 3), keepdim=True)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)


def patches(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    cut = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return cut.flatten(1, 2).flatten(2)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x.abs().sum(-1) > 0).sum(1).cpu()
        kind = nn.utils.rnn.pack_padded_sequence
        return self.net(kind(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1]


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state[0] if isinstance(state, tuple) else state


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


def encoder(*, first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


C1, C2, C3, G2 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Conv2d(1, 4, 3)
# Sizes coincide wherever they can, so that nothing can be told by them.
CASES: dict[str, tuple[nn.Module, tuple[int, ...], str | None]] = {
    "convolution": (C1, (3, 3), "BCT"),
    "transposed": (Enter(lambda x: x.mT, C1), (3, 3), "BTC"),
    "permuted": (Enter(lambda x: x.permute(0, 2, 1).contiguous(), C1), (3, 3), "BTC"),
    "picture": (C2, (3, 3, 3), "BCHW"),
    "normalised": (Enter(normal, C2), (3, 3, 3), "BCHW"),
    "padded": (Enter(padded, C2), (3, 3, 3), "BCHW"),
    "channels last": (Enter(lambda x: x.permute(0, 3, 1, 2), C2), (3, 3, 3), "BHWC"),
    "channels between": (Enter(lambda x: x.transpose(1, 2), C2), (3, 3, 3), "BHCW"),
    "no channels": (Enter(lambda x: x[:, None], G2), (3, 3), "BHW"),
    "repeated": (Enter(lambda x: x[:, None].expand(-1, 3, -1, -1), C2), (3, 3), "BHW"),
    "one channel": (G2, (1, 3, 3), "BCHW"),
    "whole windows": (Enter(lambda x: x[:, None], nn.Conv2d(1, 4, (2, 3))), (3, 3), "BTC"),
    "frames": (Enter(lambda x: x.flatten(0, 1), C2), (3, 3, 3, 3), "BTCHW"),
    "frames turned": (Enter(lambda x: x.transpose(1, 2), C3), (3, 3, 3, 3), "BDCHW"),
    "volume": (C3, (3, 3, 3, 3), "BCDHW"),
    "wave": (Enter(lambda x: x[:, None], nn.Conv1d(1, 4, 3)), (9,), "BT"),
    "lstm": (nn.LSTM(3, 4, batch_first=True), (3, 3), "BTF"),
    "gru": (nn.GRU(3, 4, batch_first=True), (3, 3), "BTF"),
    "time first": (Enter(lambda x: x.transpose(0, 1), nn.RNN(3, 4)), (3, 3), "BTF"),
    "features first": (Enter(lambda x: x.mT, nn.LSTM(3, 4, batch_first=True)), (3, 3), "BFT"),
    "behind a linear layer": (
        Enter(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.GRU(3, 4, batch_first=True)),
        (3, 3),
        "BTF",
    ),
    "mixed, then turned": (Enter(lambda x: nn.Linear(3, 3)(x).mT, C1), (3, 3), "BTC"),
    "packed": (Packed(), (3, 3), "BTF"),
    "lstm cells": (Cells(nn.LSTMCell(3, 4)), (3, 3), "BTF"),
    "gru cells": (Cells(nn.GRUCell(3, 4)), (3, 3), "BTF"),
    "encoder": (Enter(nn.Linear(3, 4), encoder()), (3, 3), "BTF"),
    "encoder, time first": (
        Enter(lambda x: nn.Linear(3, 4)(x).transpose(0, 1), encoder(first=False)),
        (3, 3),
        "BTF",
    ),
    "attention by hand": (ByHand(), (3, 3), "BTF"),
    "patches": (
        Enter(lambda x: nn.Linear(12, 4)(patches(x)), encoder()),
        (3, 4, 6),
        "BCHW",
    ),
    # A mixer of steps, or attention over variables, looks the same as one of features.
    "attention over what was moved": (
        Enter(lambda x: nn.Linear(3, 4)(x.mT), encoder()),
        (3, 3),
        None,
    ),
    "frames as channels": (
        Enter(lambda x: x.flatten(1, 2), nn.Conv2d(9, 4, 3)),
        (3, 3, 3, 3),
        None,
    ),
    "one series at a time": (
        Enter(lambda x: x.flatten(0, 1)[:, None], nn.Conv1d(1, 4, 3)),
        (3, 3),
        None,
    ),
    "all at once": (nn.Sequential(nn.Flatten(), nn.Linear(9, 4)), (3, 3), None),
    "a linear layer": (nn.Sequential(nn.Linear(3, 4), nn.Flatten()), (3, 3), None),
    "a product of all": (Enter(lambda x: x @ x.mT, C1), (3, 3), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_layer_that_tells(name: str) -> None:
    model, shape, letters = CASES[name]
    assert told(model.eval(), torch.randn(2, *shape)) == (letters,)
    assert told(lambda x: model(x), torch.randn(2, *shape)) == (letters,)


def test_several_inputs_are_followed_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.series = C2, nn.GRU(3, 4, batch_first=True)

        def forward(self, image: Tensor, series: Tensor, table: Tensor) -> Tensor:
            seen = self.image(image.movedim(-1, 1)).flatten(1).sum(1)
            return seen + self.series(series)[0].flatten(1).sum(1) + table.sum(1)

    inputs = torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3), torch.randn(2, 5)
    assert told(Two(), *inputs) == ("BHWC", "BTF", None)
    added = Enter(lambda a, b: a + b.movedim(-1, 1), C2)
    assert told(added, torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)) == ("BCHW", "BHWC")


def test_the_model_stops_where_all_is_told_and_stays_as_it_was() -> None:
    ran: list[str] = []
    model = nn.Sequential(C2, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).train()
    model[1].register_forward_hook(lambda *_: ran.append("norm"))
    state = torch.get_rng_state()
    assert told(model, torch.randn(2, 3, 3, 3, generator=torch.Generator())) == ("BCHW",)
    assert not ran
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


class Tokens(nn.Module):
    """A transformer whose patches overlap and lie in columns, among special tokens."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, 3)
        self.before = nn.Parameter(torch.randn(1, before, 8))
        self.behind = nn.Parameter(torch.randn(1, behind, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens, ends = self.cut(x).transpose(2, 3).flatten(2).mT, (len(x), -1, -1)
        parts = self.before.expand(ends), tokens, self.behind.expand(ends)
        return self.head(self.encoder(torch.cat(parts, 1)).mean(1))


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 4)])
def test_tokens_lie_where_their_patches_do(before: int, behind: int) -> None:
    """10 x 19 pixels in patches of 4 every 3: 3 x 6 of them, with any tokens around."""
    torch.manual_seed(0)
    model, x = Tokens(before, behind).double().eval(), torch.randn(2, 3, 10, 19).double()
    layouts = layouts_of(model, bind(x, None, (), None), None)
    inside = layouts.inside((model.encoder.norm1,), False)
    count = 18 + before + behind
    index = [before + column * 3 + row for row in range(3) for column in range(6)]
    assert inside.sequence(count, (2, 3), 0) == Lattice((3, 6), tuple(index))
    found = sf.explain(model, x, target=1, method=sf.GradCAM("encoder.norm1", relu=False))
    kept: list[Tensor] = []
    handle = model.encoder.norm1.register_forward_hook(lambda *about: kept.append(about[2]))
    score = model(x)[:, 1].sum()
    handle.remove()
    (slopes,) = torch.autograd.grad(score, kept)
    seen, slopes = (one[:, index].mT.unflatten(2, (3, 6)) for one in (kept[0], slopes))
    drawn = (slopes.mean((2, 3), keepdim=True) * seen).sum(1, keepdim=True)
    torch.testing.assert_close(found.extras["layer"][:, None], drawn, rtol=0, atol=1e-12)
    drawn = functional.interpolate(drawn, (10, 19), mode="bilinear")
    torch.testing.assert_close(found.values, drawn, rtol=0, atol=1e-12)
