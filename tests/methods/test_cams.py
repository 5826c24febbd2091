"""Class activation maps against their papers and Captum, on networks of every kind."""

from __future__ import annotations

import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import GuidedGradCam, LayerGradCam
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods import METHODS
from saliency_fast.methods.cam import GradCAM
from tests.methods import naive_cams as naive
from tests.model.spatial_models import (
    LAYERS,
    VGG,
    ConvLSTM,
    DenseNet,
    Encoder,
    ResNet,
    Swin,
    UNet3d,
    ViT,
)
from tests.models import Multimodal, make, randn
from tests.naive import relative_l2

EXACT = 1e-10
TARGETS: dict[type[nn.Module], Any] = {UNet3d: (1, 2, 3, 4)}


def maps_of(kind: type[nn.Module], output: Tensor, x: Tensor) -> Tensor:
    """What a network's layer gives for one example, as maps [C, *s]."""
    if kind is ViT:
        patches = tuple(n // 4 for n in x.shape[1:])
        return output[1:].T.reshape(-1, *patches)
    if kind in (Encoder, Swin):
        return output.movedim(-1, 0)
    return output


def expected(name: str, kind: type[nn.Module], x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """(map at the layer, its ReLU resized to the input) of one example."""
    model = make(kind)
    layer = model.get_submodule(LAYERS[kind][1])
    index = target if isinstance(target, tuple) else (target,)

    def score(output: Tensor) -> Tensor:
        return output[(slice(None), *index)]

    a, g = (maps_of(kind, one, x) for one in naive.tapped(model, layer, score, x))
    cam = naive.CAMS.get(name)
    found = naive.score_cam(model, score, x, a) if cam is None else cam(a, g)
    size = tuple(found.shape) if kind is Encoder else tuple(x.shape[1:])
    resized = naive.resized(found.relu(), size)
    return found, resized[:, None] if kind is Encoder else resized[None]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", naive.CAMS)
def test_against_the_papers(name: str, kind: type[nn.Module]) -> None:
    x, target = randn(3, *LAYERS[kind][0]), TARGETS.get(kind, 2)
    found = sf.explain(make(kind), x, target=target, method=name)
    signed = sf.explain(make(kind), x, target=target, method=METHODS[name](relu=False))
    for row, one in enumerate(x):
        layer, resized = expected(name, kind, one, target)
        assert relative_l2(found.values[row], resized) < EXACT
        assert relative_l2(signed.extras["layer"][row], layer) < EXACT
        torch.testing.assert_close(found.extras["layer"][row], layer.relu())
    space = (9, 1) if kind is Encoder else (1, *x.shape[2:])
    assert found.values.shape == (3, *space)


@pytest.mark.parametrize("kind", [VGG, UNet3d, ViT, ConvLSTM, Swin])
def test_score_cam(kind: type[nn.Module]) -> None:
    x, target = randn(2, *LAYERS[kind][0]), TARGETS.get(kind, 2)
    found = sf.explain(make(kind), x, target=target, method="score_cam", points_per_launch=3)
    for row, one in enumerate(x):
        layer, resized = expected("score_cam", kind, one, target)
        torch.testing.assert_close(found.extras["layer"][row], layer.relu())
        assert relative_l2(found.values[row], resized) < EXACT


@pytest.mark.parametrize("kind", [ResNet, VGG, DenseNet, UNet3d, ConvLSTM])
@pytest.mark.parametrize("relu", [False, True])
def test_grad_cam_against_captum(kind: type[nn.Module], relu: bool) -> None:
    model, x, target = make(kind), randn(3, *LAYERS[kind][0]), TARGETS.get(kind, 2)
    layer = model.get_submodule(LAYERS[kind][1])
    theirs = LayerGradCam(model, layer).attribute(x, target, relu_attributions=relu)
    found = sf.explain(model, x, target=target, method=GradCAM(relu=relu))
    torch.testing.assert_close(found.extras["layer"], theirs[:, 0].detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tokens_of_every_rank(rank: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViT(rank).double().eval()
    x = randn(2, 3, *(8, 12, 12)[-rank:])
    found = sf.explain(model, x, target=1, method="grad_cam")
    a, g = naive.tapped(model, model.blocks[1].norm1, lambda out: out[:, 1], x[0])
    a, g = (one[1:].T.reshape(-1, *(n // 4 for n in x.shape[2:])) for one in (a, g))
    resized = naive.resized(naive.grad_cam(a, g).relu(), tuple(x.shape[2:]))
    assert relative_l2(found.values[0, 0], resized) < EXACT


@pytest.mark.parametrize("name", [*naive.CAMS, "score_cam", "guided_grad_cam"])
def test_many_targets_and_launches(name: str) -> None:
    """K maps from shared passes are those of K calls, however points share launches."""
    model, x = make(VGG), randn(3, 3, 12, 16)
    many = sf.explain(model, x, target=torch.tensor([[0, 1, 4]] * 3), method=name)
    few = sf.explain(
        model, x, target=torch.tensor([[0, 1, 4]] * 3), method=name, points_per_launch=2
    )
    assert many.values.shape == (3, 3, 3 if name == "guided_grad_cam" else 1, 12, 16)
    torch.testing.assert_close(many.values, few.values, rtol=1e-10, atol=1e-12)
    for k, target in enumerate((0, 1, 4)):
        one = sf.explain(model, x, target=target, method=name)
        torch.testing.assert_close(many.values[:, k], one.values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(many.extras["layer"][:, k], one.extras["layer"])


@pytest.mark.parametrize("name", [*naive.CAMS, "score_cam", "guided_grad_cam"])
def test_a_map_does_not_depend_on_its_batch(name: str) -> None:
    model, x = make(VGG), randn(4, 3, 12, 16)
    engine = sf.Engine(model, name)
    alone, together = engine(x[2:3], "predicted"), engine(x, "predicted")
    torch.testing.assert_close(together.values[2:3], alone.values, rtol=1e-10, atol=1e-12)
    assert int(together.classes[2]) == int(alone.classes[0])
    (streamed,) = engine.stream(x, "predicted")
    assert torch.equal(streamed.values, together.values)


def test_layers_are_scaled_and_averaged() -> None:
    model, x = make(VGG), randn(3, 3, 12, 16)
    layers = ("features.1", "features.4")
    both = sf.explain(model, x, target=1, method=GradCAM(layers))
    total = torch.zeros_like(both.values)
    for number, layer in enumerate(layers):
        one = sf.explain(model, x, target=1, method=GradCAM(layer))
        torch.testing.assert_close(both.extras[f"layer_{number}"], one.extras["layer"])
        total += one.values / one.values.amax((1, 2, 3), keepdim=True) / 2
    assert relative_l2(both.values, total) < EXACT


def test_layers_by_name_object_and_list() -> None:
    model, x = make(VGG), randn(2, 3, 12, 16)
    named = sf.explain(model, x, target=1, method=GradCAM("features.1")).values
    for at in ("features.1", model.features[1], [model.features[1]]):
        found = sf.explain(model, x, target=1, method="grad_cam", at=at)
        torch.testing.assert_close(found.values, named)
    both = sf.explain(model, x, target=1, method=GradCAM(["features.1", "features.4"])).values
    at = ["features.1", model.features[4]]
    torch.testing.assert_close(
        sf.explain(model, x, target=1, method="grad_cam", at=at).values, both
    )


def test_compiled_models() -> None:
    x = randn(2, 3, 12, 16)
    plain = sf.explain(make(VGG), x, target=1, method="grad_cam").values
    compiled = torch.compile(make(VGG), backend="eager")
    assert relative_l2(sf.explain(compiled, x, target=1, method="grad_cam").values, plain) < EXACT


def test_layers_that_the_score_does_not_see() -> None:
    """Behind the last attention only a class token is looked at."""
    model, x = make(ViT), randn(2, 3, 12, 16)
    with pytest.warns(UserWarning, match="do not depend on any position of the layer LayerNorm"):
        sf.explain(model, x, target=1, method=GradCAM("norm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.explain(model, x, target=1, method="grad_cam")
        sf.explain(model, x, target=1, method="eigen_cam", at="norm")


def test_records(tmp_path: Path) -> None:
    model, x = make(VGG), randn(2, 3, 12, 16)
    method = GradCAM(["features.1", "features.4"], relu=False)
    path = sf.explain(model, x, target=1, method=method).save(tmp_path / "cam.safetensors")
    assert list(sf.load(path).extras) == ["layer_0", "layer_1"]
    assert sf.replay(path, model, x).agrees


def test_threads_share_a_model() -> None:
    model, x = make(ResNet), randn(2, 3, 12, 16)
    engine = sf.Engine(model, "grad_cam")
    alone = [engine(x, target).values for target in range(5)]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda target: engine(x, target).values, range(5)))
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


def test_float32() -> None:
    x = randn(2, 3, 12, 16)
    for name in naive.CAMS:
        exact = sf.explain(make(ResNet), x, target=1, method=name)
        found = sf.explain(make(ResNet).float(), x.float(), target=1, method=name)
        assert found.values.dtype == torch.float32
        assert relative_l2(found.values, exact.values) < 1e-4


def test_dead_channels_weigh_nothing() -> None:
    """A channel that is zero everywhere divides by its sum, and is an empty mask."""
    model, x = make(VGG), randn(2, 3, 12, 16)
    model.features[3].bias.data[2] = -100.0
    for name in [*naive.CAMS, "score_cam"]:
        assert sf.explain(model, x, target=1, method=name).values.isfinite().all()


@pytest.mark.parametrize("name", [*naive.CAMS, "score_cam", "guided_grad_cam"])
def test_nothing_is_left_behind(name: str) -> None:
    model, x = make(ResNet).train(), randn(2, 3, 12, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = sf.explain(model, x, target=1, method=name)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not x.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not found.values.requires_grad
    assert not found.extras["layer"].requires_grad
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_input_without_space_is_an_argument() -> None:
    model, image, table = make(Multimodal), randn(2, 3, 12, 12), randn(2, 7)
    with pytest.raises(InputError, match=r"as many spatial axes.*forward_args"):
        sf.explain(model, (image, table), target=1, method="grad_cam")
    found = sf.explain(model, image, target=1, method="grad_cam", forward_args=(table,))
    assert found.values.shape == (2, 1, 12, 12)


def test_several_inputs_of_one_space() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make(VGG)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.net(a + b)

    model, a, b = Pair(), randn(2, 3, 12, 16), randn(2, 3, 12, 16, seed=1)
    for name in ("grad_cam", "score_cam"):
        found = sf.explain(model, (a, b), target=1, method=name)
        assert torch.equal(*found.values)
    alone = sf.explain(model.net, a + b, target=1, method="grad_cam").values
    pair = sf.explain(model, (a, b), target=1, method="grad_cam").values
    torch.testing.assert_close(pair[0], alone)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layer": nn.ReLU()}, InputTypeError, "pass modules to the call, as at="),
        ({"layer": ()}, InputTypeError, "layer must be a name"),
        ({"relu": 1}, InputTypeError, "relu must be True or False"),
        ({"grid": 14}, InputTypeError, r"grid must be a tuple such as \(14, 14\)"),
        ({"grid": (0, 2)}, InputError, "grid must be at least 1"),
        ({"special": 0.5}, InputTypeError, "special must be a whole number"),
    ],
)
def test_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradCAM(**fields)


def test_layers_with_other_rows() -> None:
    """Frames folded into the batch are not examples."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make(VGG)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    x, model = randn(2, 4, 3, 12, 16), Frames()
    found = sf.explain(model, x, target=1, method=GradCAM("net.features.4"))
    assert found.layout == ("BTCHW",)
    kept: list[Tensor] = []
    handle = model.net.features[4].register_forward_hook(lambda *about: kept.append(about[2]))
    score = model(x)[:, 1].sum()
    handle.remove()
    (slopes,) = torch.autograd.grad(score, kept)
    seen, slopes = (one.unflatten(0, (2, 4)).transpose(1, 2) for one in (kept[0], slopes))
    drawn = (slopes.mean((2, 3, 4), keepdim=True) * seen).sum(1, keepdim=True).relu()
    drawn = functional.interpolate(drawn, (4, 12, 16), mode="trilinear").transpose(1, 2)
    torch.testing.assert_close(found.values, drawn, rtol=0, atol=1e-12)
    assert found.map().shape == (2, 4, 12, 16)
    assert found.overlay(x).shape == (2, 4, 12, 16, 3)

    class Apart(Frames):
        """Frames before examples."""

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, -1)).mean(0)

    with pytest.raises(InputError, match="each with its steps one after the other"):
        sf.explain(Apart(), x, target=1, method=GradCAM("net.features.4"))
    with pytest.raises(InputError, match="no layer with spatial output"):
        sf.explain(Frames(), x, target=1, method="grad_cam")


def test_layers_that_cannot_be() -> None:
    model, x = make(VGG), randn(2, 3, 12, 16)
    with pytest.raises(InputError, match="did you mean 'features"):
        sf.explain(model, x, target=1, method=GradCAM("featurs.1"))
    with pytest.raises(InputError, match=r"Linear has no spatial output: got \[1, 5\]"):
        sf.explain(model, x, target=1, method=GradCAM("classifier.2"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:captum")
@pytest.mark.parametrize("kind", [VGG, ResNet, UNet3d])
def test_guided_grad_cam(kind: type[nn.Module]) -> None:
    """GradCAM times guided backpropagation, and Captum's, resized in the same way."""
    model, x, target = make(kind), randn(2, *LAYERS[kind][0]), TARGETS.get(kind, 2)
    found = sf.explain(model, x, target=target, method="guided_grad_cam", points_per_launch=1)
    cam = sf.explain(model, x, target=target, method="grad_cam")
    guided = sf.explain(model, x, target=target, method="guided_backprop")
    torch.testing.assert_close(found.values, cam.values * guided.values)
    layer, mode = model.get_submodule(LAYERS[kind][1]), naive.MODES[x.dim() - 2]
    theirs = GuidedGradCam(model, layer).attribute(x, target, interpolate_mode=mode)
    assert relative_l2(found.values, theirs.detach()) < EXACT
