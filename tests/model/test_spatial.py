"""The last spatial layer of networks of every kind, and layers' outputs read as maps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.graph.outputs import tensors_of
from saliency_fast.model.layers import channel_axis, last_spatial
from saliency_fast.model.layout import Axes, Space, patch_grid, read_layout
from tests.model.spatial_models import LAYERS, ResNet, ViT
from tests.models import Audio, Image, Tabular, Tokens, Video, make, randn


def plain_run(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[..., Any]:
    """A run as `last_spatial` takes it, of all outputs."""

    def run(number: int, change: Callable[[Tensor], Tensor] | None) -> tuple[Any, Tensor]:
        raw = forward((x if change is None else change(x)).clone())
        flat = torch.cat([one.flatten(1) for one in tensors_of(raw)], 1)
        # Weighted: probabilities sum to one whatever the input.
        return raw, flat @ torch.arange(1.0, 1.0 + flat.shape[1], dtype=flat.dtype)

    return run


def found_name(model: nn.Module, *shape: int) -> str:
    root = getattr(model, "_orig_mod", model)
    module, _ = last_spatial(model, plain_run(root, randn(2, *shape)), 1)
    return {one: name for name, one in root.named_modules()}[module]


@pytest.mark.parametrize("kind", LAYERS)
def test_networks(kind: type[nn.Module]) -> None:
    shape, name = LAYERS[kind]
    assert found_name(make(kind), *shape) == name


@pytest.mark.parametrize(
    ("kind", "shape", "name"),
    [
        (Audio, (2, 32), "1"),
        (Image, (3, 12, 12), "5"),
        (Video, (2, 5, 7, 6), "1"),
        (Tokens, (6, 8), "norm"),
    ],
)
def test_plain_sequences(kind: type[nn.Module], shape: tuple[int, ...], name: str) -> None:
    assert found_name(make(kind), *shape) == name


def test_compiled_models() -> None:
    assert found_name(torch.compile(make(ResNet), backend="eager"), 3, 12, 16) == "layer1"


def test_a_class_token_sees_nothing_behind_the_found_layer() -> None:
    """At the last norm only the class token has a gradient; at the found layer all have."""
    model, held = make(ViT), {}

    def keep(name: str) -> object:
        return lambda module, args, output: held.setdefault(name, output)

    for name in ("blocks.1.norm1", "norm"):
        model.get_submodule(name).register_forward_hook(keep(name))
    model(randn(2, 3, 12, 16))[:, 1].sum().backward(inputs=list(held.values()))
    assert (held["blocks.1.norm1"].grad.abs().sum(2) > 0).all()
    assert not held["norm"].grad[:, 1:].any()


def test_errors_tell_what_was_found() -> None:
    model = make(Tabular)
    with pytest.raises(InputError, match=r"no layer with spatial output.*1 \[2, 16\], 2 \[2, 5\]"):
        found_name(model, 7)
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module: got function"):
        last_spatial(lambda x: x, lambda *_: (None, torch.zeros(1)), 1)


def test_layers_that_run_more_than_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(x)).mean((2, 3)))

    with pytest.raises(InputError, match=r"fc \[2, 5\]; conv run more than once; pass"):
        found_name(make(Twice), 3, 8, 8)


def test_hooks_leave_in_any_event() -> None:
    model = make(ResNet)
    with pytest.raises(KeyboardInterrupt):
        last_spatial(model, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), 1)
    found_name(model, 3, 12, 16)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_threads_share_a_model() -> None:
    """Calls in other threads, while the model is watched, are not taken for one's own."""
    model, x = make(ResNet), randn(2, 3, 12, 16)

    def run(x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: [model(x) for _ in range(3)])
        other.start()
        found = model(x)
        other.join()
        return found

    assert last_spatial(model, plain_run(run, x), 1)[0] is model.layer1


def test_channel_axis() -> None:
    assert channel_axis(nn.Conv2d(3, 8, 1), (2, 8, 5, 8)) == 1
    assert channel_axis(nn.LayerNorm(8), (2, 8, 5, 8)) == -1
    assert channel_axis(nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU()), (2, 8, 5)) == 1
    assert channel_axis(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Linear(4, 6)), (2, 6, 5, 5)) == 1
    assert channel_axis(nn.LSTM(3, 7), (2, 5, 7)) == -1
    assert channel_axis(nn.GELU(), (2, 5, 7), default=-1) == -1


@pytest.mark.parametrize("special", [0, 1, 2, 5])
def test_special_tokens_are_stripped(special: int) -> None:
    tokens = 196 + special
    space, model = Space((2, 3, 224, 224), Axes("BCHW")), nn.Conv2d(3, 6, 16, 16)
    layout = read_layout(nn.LayerNorm(6), (2, tokens, 6), space, model=model)
    assert (layout.grid, layout.shape) == ((14, 14), (1, 224, 224))
    output = randn(2, tokens, 6)
    places = output[:, special:].view(2, 14, 14, 6)
    assert torch.equal(layout.maps(output), places.permute(0, 3, 1, 2))


def test_patches_of_the_model_tell_the_grid() -> None:
    """Patches that overlap, are padded or leave a rest, in one to three axes."""
    norm = nn.LayerNorm(6)
    for patches, tokens, letters, space, grid in (
        (nn.Conv3d(3, 6, (2, 16, 16), (2, 16, 16)), 1568, "BCTHW", (16, 224, 224), (8, 14, 14)),
        (nn.Conv1d(3, 6, 4, 4), 4, "BCT", (12,), (3,)),
        (nn.Conv2d(3, 6, 16, 16), 14 * 12 + 1, "BCHW", (225, 200), (14, 12)),
        (nn.Conv2d(3, 6, 16, 10), 5 * 2 + 2, "BCHW", (64, 32), (5, 2)),
        (nn.Conv2d(3, 6, 7, 4, padding=3), 8 * 6, "BCHW", (32, 24), (8, 6)),
    ):
        model, x = nn.ModuleList([nn.Conv1d(1, 1, 3), patches, norm]), (2, 3, *space)
        made = patches.float()(torch.zeros(1, 3, *space))
        assert patch_grid(model, space) == tuple(made.shape[2:]) == grid
        layout = read_layout(norm, (2, tokens, 6), Space(x, Axes(letters)), model=model)
        assert layout.grid == grid
        assert layout.index == tuple(range(tokens - math.prod(grid), tokens))
        with pytest.raises(InputError, match=r"cannot be told from the model: pass grid="):
            read_layout(norm, (2, tokens, 6), Space(x, Axes(letters)))


def test_grid_and_special_by_hand() -> None:
    norm, output, space = nn.LayerNorm(6), randn(2, 13, 6), Space((2, 3, 50, 50), Axes("BCHW"))
    layout = read_layout(norm, (2, 13, 6), space, grid=(3, 4), special=-1)
    assert torch.equal(layout.maps(output)[:, :, 1, 2], output[:, 6])
    layout = read_layout(norm, (2, 13, 6), space, grid=(2, 5))
    assert torch.equal(layout.maps(output)[:, :, 0, 0], output[:, 3])


def test_features_of_a_sequence_may_come_last() -> None:
    layout = read_layout(nn.LayerNorm(8), (2, 9, 8), Space((2, 9, 5), Axes("BTF")))
    assert (layout.grid, layout.shape) == ((9,), (9, 1))


def test_channels_last_images() -> None:
    space = Space((2, 3, 12, 16), Axes("BCHW"))
    layout = read_layout(nn.LayerNorm(8), (2, 3, 4, 8), space)
    assert layout.last
    assert layout.grid == (3, 4)


@pytest.mark.parametrize(
    ("layer", "shape", "x", "message"),
    [
        (
            nn.Linear(4, 5),
            (2, 5),
            (2, 3, 8, 8),
            r"layer Linear has no spatial output: got \[2, 5\]",
        ),
        (nn.ReLU(), (2, 5, 1, 1), (2, 3, 8, 8), r"no spatial output: got \[2, 5, 1, 1\]"),
        (nn.LayerNorm(6), (2, 13, 6), (2, 3, 50, 60), "cannot be told from the model"),
        (nn.LayerNorm(6), (2, 1568, 6), (2, 3, 16, 224, 224), "cannot be told from the model"),
        (nn.LayerNorm(6), (2, 4, 6), (2, 3, 12), "cannot be told from the model"),
        (nn.Conv1d(3, 6, 1), (2, 6, 9), (2, 3, 8, 8), "as many spatial axes"),
    ],
)
def test_outputs_without_a_map(
    layer: nn.Module, shape: tuple[int, ...], x: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_layout(layer, shape, Space(x, Axes({3: "BCT", 4: "BCHW", 5: "BCTHW"}[len(x)])))


def test_grids_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"grid does not fit layer LayerNorm: got \[4, 4\]"):
        read_layout(nn.LayerNorm(6), (2, 13, 6), Space((2, 3, 50, 60), Axes("BCHW")), grid=(4, 4))
    space = Space((2, 3, 8, 8), Axes("BCHW"))
    with pytest.raises(InputError, match="grid and special are for tokens"):
        read_layout(nn.Conv2d(3, 6, 1), (2, 6, 5, 5), space, grid=(5, 5))
