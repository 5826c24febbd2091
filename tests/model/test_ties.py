"""Ties: where values are equal that a pool or a rectifier compares, maps are as PyTorch decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.engine import independence
from saliency_fast.graph.autograd import LEAN
from saliency_fast.model.ties import Ties
from tests.configured import configure

STEPS = 4
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _trained(model: nn.Module) -> nn.Module:
    """The model with statistics that are not the initial ones, in evaluation mode."""
    for one in model.modules():
        if isinstance(one, NORMS):
            nn.init.normal_(one.running_mean, 0.0, 0.1)
            nn.init.uniform_(one.running_var, 0.5, 1.5)
            nn.init.normal_(one.bias, 0.0, 0.2)
    return model.eval()


def _vgg(axes: int, channels: int, norm: bool) -> nn.Module:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
    average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    layers: list[nn.Module] = []
    for width in (16, 32, 48):
        layers += [convolution(channels, width, 3, padding=1)]
        layers += [NORMS[axes - 1](width)] if norm else []
        layers += [nn.ReLU(inplace=True), pool(2)]
        channels = width
    return _trained(nn.Sequential(*layers, average(1), nn.Flatten(), nn.Linear(channels, 5)))


class _Stem(nn.Module):
    """A residual network's beginning: overlapping windows in padding, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 7, 2, 3, bias=False)
        self.norm, self.last = nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.inner, self.head = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        y = F.max_pool2d(F.relu(self.last(self.inner(y)) + y), 3, 2, ceil_mode=True)
        found: Tensor = self.head(y.mean((2, 3)))
        return found


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = F.relu(self.norm(self.down(x)))
        below = F.relu(self.inner(F.max_pool2d(skipped, 2)))
        joined = F.relu(self.last(torch.cat([self.up(below), skipped], 1)))
        found: Tensor = self.head(F.max_pool2d(joined, 2)).mean((2, 3))
        return found


class _Points(nn.Module):
    """A point cloud's features, of which the largest count."""

    def __init__(self, largest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.outer, self.largest, self.head = nn.Conv1d(32, 64, 1), largest, nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.largest(self.outer(self.inner(x))))
        return found


class _Zoomed(nn.Module):
    """Interpolation rounds equal values apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.inner(x)), scale_factor=2.0, mode="bilinear")
        found: Tensor = self.head(F.max_pool2d(y, 3, 2, 1).mean((2, 3)))
        return found


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (lambda: _vgg(2, 3, False), (3, 40, 40)),
    "images, norms": (lambda: _vgg(2, 3, True), (3, 33, 40)),
    "residual": (lambda: _trained(_Stem()), (3, 45, 45)),
    "encoder and decoder": (lambda: _trained(_UNet()), (1, 32, 32)),
    "spectrograms": (lambda: _vgg(2, 1, True), (1, 40, 64)),
    "series": (lambda: _vgg(1, 2, True), (2, 400)),
    "volumes": (lambda: _vgg(3, 1, True), (1, 14, 14, 14)),
    "clouds, amax": (lambda: _trained(_Points(lambda y: y.amax(2))), (3, 300)),
    "clouds, max": (lambda: _trained(_Points(lambda y: y.max(2).values)), (3, 300)),
    "clouds, pool": (
        lambda: _trained(_Points(lambda y: F.adaptive_max_pool1d(y, 1).flatten(1))),
        (3, 300),
    ),
    "zoomed": (lambda: _Zoomed(), (3, 24, 24)),
}


def _flat(shape: tuple[int, ...], kind: str) -> Tensor:
    """[1, *shape]: boxes of one colour, saturated boxes, a picture in black, or nothing."""
    x = torch.zeros(1, *shape, dtype=torch.float64)
    if kind == "zeros":
        return x
    draw = torch.Generator().manual_seed(3)
    if kind == "border":
        inside = (..., *[slice(size // 3, size // 3 * 2) for size in shape[1:]])
        x[inside] = torch.rand(x[inside].shape, generator=draw, dtype=torch.float64)
        return x
    for _ in range(5):
        colour = torch.rand(shape[0], generator=draw, dtype=torch.float64)
        starts = [int(torch.randint(0, size // 2, (), generator=draw)) for size in shape[1:]]
        spans = zip(starts, shape[1:], strict=True)
        box = (0, slice(None), *[slice(start, start + size // 2) for start, size in spans])
        values = colour if kind == "colours" else colour.round()
        x[box] = values.view(-1, *(1,) * (len(shape) - 1))
    return x


def _by_hand(model: nn.Module, x: Tensor, target: int, alphas: list[float]) -> Tensor:
    """The mean of autograd's gradients of the model called with one point alone, times x."""
    total = torch.zeros_like(x)
    for alpha in alphas:
        # As the caller lays the example.
        point = torch.empty_like(x).copy_(alpha * x).requires_grad_(True)
        total += torch.autograd.grad(model(point)[0, target], point)[0]
    return total / len(alphas) * x


def _gap(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


MIDDLES = [(k + 0.5) / STEPS for k in range(STEPS)]
METHODS = {
    "midpoint": (sf.IntegratedGradients(steps=STEPS, rule="midpoint"), MIDDLES),
    # From the baseline itself on, where all is flat.
    "left": (sf.IntegratedGradients(steps=STEPS, rule="left"), [k / STEPS for k in range(STEPS)]),
    "input": (sf.InputXGradient(), [1.0]),
}


@pytest.mark.filterwarnings("ignore:saliency_fast. up to .* hangs on ties")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("kind", ["colours", "saturated", "border"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_at_ties_are_autograds(name: str, kind: str, last: bool) -> None:
    make, shape = MODELS[name]
    if last and len(shape) != 3:
        pytest.skip("only images have that layout here")
    torch.manual_seed(0)
    model, x = make().double().eval(), _flat(shape, kind)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for method, alphas in METHODS.values():
        right = _by_hand(model, x, 1, alphas)
        for lean in (True, False):
            found = sf.explain(model, x, target=1, method=method, lean=lean)
            assert _gap(found.values, right) < 1e-9, (method, lean, found.provenance.strategy)


def test_the_built_in_digits_are_autograds() -> None:
    scenes = zoo.held_out()
    model, x = zoo.digits_cnn().double(), scenes.images[:4].double()
    target, method = scenes.labels[:4], METHODS["midpoint"][0]
    found = sf.explain(model, x, target=target, method=method)
    assert "recorded" in found.provenance.strategy
    for number in range(4):
        own = x[number : number + 1]
        right = _by_hand(model, own, int(target[number]), MIDDLES)
        assert _gap(found.values[number : number + 1], right) < 1e-9


def _by_way(dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    model, x = _vgg(2, 3, True).to(dtype), torch.rand(1, 3, 40, 40, dtype=dtype)
    return sf.explain(model, x, target=1, method=METHODS["midpoint"][0]).provenance.strategy


def test_float64_takes_no_way_that_rounds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, lean_from=0)
    assert _by_way(torch.float64).startswith("recorded")
    ulp = 2.0**-52

    def rounded(x: Tensor, *others: Any) -> Tensor:
        return torch.batch_norm(x, *others) * (1 + ulp)

    monkeypatch.setitem(LEAN, torch.batch_norm, rounded)
    assert _by_way(torch.float64) == "off"
    assert _by_way(torch.float32).startswith("recorded")


def test_rows_go_alone_where_rounding_decides() -> None:
    """PyTorch's float64 convolutions round channels-last rows otherwise in a batch than alone."""
    torch.manual_seed(134)
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
    layers = (stem, nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model, rows = model.double().eval(), list[int]()
    x = _flat((3, 45, 45), "colours").contiguous(memory_format=torch.channels_last)
    method, alphas = METHODS["midpoint"]
    hook = stem.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = sf.explain(model, x, target=1, method=method, lean=False)
    hook.remove()
    assert set(rows[-STEPS:]) == {1}
    assert found.provenance.notes["rounded_ties"] > 0.01
    assert "ties within rounding" in str(told[-1].message)
    assert _gap(found.values, _by_hand(model, x, 1, alphas)) < 1e-9


SHARES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # Of windows [1, 2], [3, 3] and so on, the share with two maxima.
    "windows": (lambda y: F.max_pool1d(y, 2), 0.5),
    "windows with indices": (lambda y: F.max_pool1d(y, 2, return_indices=True)[0], 0.5),
    "images": (lambda y: F.max_pool2d(y.unflatten(2, (1, -1)), (1, 2)).flatten(2), 0.5),
    "volumes": (lambda y: F.max_pool3d(y.unflatten(2, (1, 1, -1)), (1, 1, 2)).flatten(2), 0.5),
    "padding": (lambda y: F.max_pool1d(y, 2, 2, padding=1), 0.0),
    "dilation": (lambda y: F.max_pool1d(y, 2, 1, dilation=2), 0.0),
    "adaptive": (lambda y: F.adaptive_max_pool1d(y, 4), 0.5),
    "amax": (lambda y: y.unflatten(2, (-1, 2)).amax(-1), 0.5),
    "max": (lambda y: y.unflatten(2, (-1, 2)).max(-1).values, 0.5),
    "torch.max": (lambda y: torch.max(y.unflatten(2, (-1, 2)), -1)[0], 0.5),
}
ROW = (1.0, 2.0, 3.0, 3.0, 5.0, 4.0, 6.0, 6.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SHARES)
def test_shares_of_ties(name: str, dtype: torch.dtype) -> None:
    pool, share = SHARES[name]
    x = torch.tensor(ROW).to(dtype).view(1, 1, -1)
    for bits, rounded in ((0, 0.0), (1, share / 2)):
        given = x.clone()
        # One unit in the last place apart: a tie by rounding.
        given[0, 0, 3] += bits * 2 * torch.finfo(dtype).eps
        given.requires_grad_()
        ties = Ties(pool)
        ties((given * 1,), (), {}).sum().backward()
        assert ties.shares() == (share, rounded)


def test_zeros_of_a_rectifier_pass_no_gradient() -> None:
    ties = Ties(lambda y: F.max_pool1d(torch.relu(y), 2))
    x = torch.tensor([-1.0, -1.0, 2.0, 3.0]).view(1, 1, -1).requires_grad_()
    ties((x * 1,), (), {}).sum().backward()
    assert ties.shares() == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attributions_tell_what_ties_decide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, method = _vgg(2, 3, True).to(dtype), sf.IntegratedGradients(steps=128)
    x = torch.cat([_flat((3, 40, 40), "colours"), torch.rand(1, 3, 40, 40)]).to(dtype)
    found = sf.explain(model, x, target=1, method=method)
    assert found.tie_share is not None
    flat, noisy = found.tie_share.tolist()
    assert flat > 0.1
    assert noisy == 0.0
    assert f"ties decide {flat:.0%}" in repr(found)
    assert "ties" not in repr(sf.explain(model, x[1:], target=1, method=method))


def test_how_many_examples_are_looked_at_in_float32() -> None:
    torch.manual_seed(0)
    model, x = _vgg(2, 3, True).float(), _flat((3, 40, 40), "colours").float().expand(3, -1, -1, -1)
    for number, (steps, later) in enumerate(((4, None), (32, 1), (64, 1), (128, 3))):
        engine = sf.Engine(model, sf.IntegratedGradients(steps=steps))
        first = max(later or 0, int(number == 0)) or None
        for looked in (first, later):
            share = engine(x, target=1).tie_share
            assert (None if share is None else int((~share.isnan()).sum())) == looked, steps


def test_models_without_maxima_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    x, looks = torch.full((2, 3, 6, 6), 0.5), list[object]()
    shares = independence._tie_shares
    monkeypatch.setattr(
        independence, "_tie_shares", lambda *given: looks.append(given) or shares(*given)
    )
    engine = sf.Engine(model, sf.IntegratedGradients(steps=64))
    for expected in ([0.0, 0.0], [0.0, 0.0]):
        share = engine(x, target=1).tie_share
        assert share is not None
        assert share.nan_to_num().tolist() == expected
    assert len(looks) == 1


def test_tie_shares_are_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _vgg(2, 3, True).double(), _flat((3, 40, 40), "colours")
    found = sf.explain(model, x, target=1, method=METHODS["midpoint"][0])
    read = sf.load(found.save(tmp_path / "record.safetensors"))
    assert found.tie_share is not None
    assert read.tie_share is not None
    assert torch.equal(read.tie_share, found.tie_share)
