"""Tiles against plain autograd of the whole model, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.errors import BudgetError, InputError
from saliency_fast.graph.intercept import NotLeanError
from saliency_fast.graph.passes.fusion import with_rectifiers
from saliency_fast.graph.receptive_field import Window
from saliency_fast.graph.recorder import Recorder
from saliency_fast.graph.tiling import Stem, Tiled, inside, local_stem, tile_bytes, tile_sizes
from tests.model.recording import (
    IMAGES,
    KERNEL,
    Model,
    Patches,
    Segmenter,
    Volume,
    blind,
    drawn,
    prepared,
    record,
    seq,
)
from tests.traces import one_thread

Box = tuple[tuple[int, int], ...]
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def gradient(run: Model, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The output, and the input gradient of a random sum of it."""
    leaf = x.clone().requires_grad_()
    y = run(leaf * 1)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return y.detach(), torch.autograd.grad((y * weights).sum(), leaf)[0]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= TOLERANCE * expected.norm()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def route(stem: Stem, tile: Sequence[int], region: Box | None = None) -> Model:
    tiled = Tiled(stem, tuple(tile), region)
    return lambda x: tiled((x,), (), {})


def same(model: Model, x: Tensor, *tiles: Sequence[int], fuse: bool = False) -> Stem:
    """Checks output and gradient by tiles, and returns the stem."""
    program = record(model, x)
    stem = local_stem(with_rectifiers(program) if fuse else program)
    y, grad = gradient(model, x)
    for tile in tiles:
        found, own = gradient(route(stem, tile), x)
        close(found, y)
        close(own, grad)
    return stem


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, fuse: bool) -> None:
    rows = 1 if fuse else 3
    same(IMAGES[name], drawn(rows, 2, 13, 18), (4, 7), (9, 18), (40, 40), fuse=fuse)


@pytest.mark.parametrize(
    "up",
    [
        nn.ConvTranspose3d(4, 4, 2, 2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(None, 2, "trilinear"),
    ],
    ids=["transposed", "nearest", "trilinear"],
)
def test_volumes(up: nn.Module) -> None:
    net = prepared(Volume(up))
    x = drawn(1, 1, 6, 9, 11)
    stem = same(net, x, (2, 9, 4), (4, 4, 11), (6, 9, 11), fuse=True)
    assert stem.rest.steps == ()
    assert stem.unit == (2, 2, 2)
    one_class = same(lambda x: net(x)[:, 1].sum((1, 2, 3)), x, (3, 5, 11))
    assert len(one_class.rest.steps) == 2


def test_sequences() -> None:
    net = seq(
        *(nn.Conv1d(2, 4, 5, 2, 1), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2, 1)),
        *(nn.ConvTranspose1d(4, 3, 3, 2), nn.Upsample(scale_factor=3, mode="linear")),
        *(nn.Flatten(), nn.LazyLinear(2)),
    )
    net(drawn(1, 2, 31))
    same(net, drawn(2, 2, 31), *((size,) for size in (*range(1, 12), 15, 16, 30, 31, 32)))


def test_every_tile_size() -> None:
    net = seq(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(2, 1, 2))
    x = drawn(1, 1, 9, 11)
    same(net, x, *((a, b) for a in range(1, 10, 2) for b in range(1, 12, 2)))


def test_channels_innermost_in_memory() -> None:
    net = IMAGES["residual"]
    x = drawn(2, 2, 13, 18)
    stem = local_stem(replace(record(net, x), channels_last=True))
    y, grad = gradient(net, x)
    found, own = gradient(route(stem, (5, 18)), x)
    close(found, y)
    close(own, grad)


REGIONS: dict[str, Box] = {
    "corner": ((0, 4), (0, 5)),
    "far corner": ((12, 13), (15, 18)),
    "edge": ((5, 9), (0, 3)),
    "middle": ((4, 9), (6, 11)),
    "one place": ((6, 7), (8, 9)),
    "all": ((0, 13), (0, 18)),
}


@pytest.mark.parametrize("name", ["stages", "gated", "both", "bilinear", "branches", "ceil"])
@pytest.mark.parametrize("region", REGIONS)
def test_regions(name: str, region: str) -> None:
    x, box = drawn(2, 2, 13, 18), REGIONS[region]
    y, grad = gradient(IMAGES[name], x)
    expected = torch.zeros_like(grad)
    expected[inside(box)] = grad[inside(box)]
    stem = local_stem(record(IMAGES[name], x))
    for tile in ((5, 6), (40, 40)):
        found, own = gradient(route(stem, tile, box), x)
        close(found, y)
        close(own, expected)


def test_region_spares_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = seq(nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(2, 1, 3, 1, 1)), drawn(1, 1, 40, 40)
    stem, seen = local_stem(record(net, x)), []
    run = Stem.run

    def noted(self: Stem, crop: Tensor, *args: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(tuple(crop.shape[2:]))
        return run(self, crop, *args)

    monkeypatch.setattr(Stem, "run", noted)
    gradient(route(stem, (8, 8), ((17, 19), (9, 12))), x)
    # Outputs 15 to 20 and 7 to 13 lie in four tiles, of which only what they see is computed.
    assert len(seen) == 4
    assert max(a * b for a, b in seen) <= 9 * 10


LAYERS = st.tuples(
    st.sampled_from(["conv", "max", "average", "transposed", "nearest", "linear", "norm", "act"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
)


def layer(kind: str, k: int, s: int, p: int, d: int, c: int) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(c, c, k, s, p, d, groups=1 + s % 2 * (c - 1))
    if kind == "max":
        return nn.MaxPool2d(k, s, min(p, k // 2), d, ceil_mode=bool(k % 2))
    if kind == "average":
        return nn.AvgPool2d(k, s, min(p, k // 2), ceil_mode=bool(d % 2))
    if kind == "transposed":
        return nn.ConvTranspose2d(c, c, k, s, min(p, d * (k - 1)), min(p, s - 1), c, True, d)
    if kind == "nearest":
        return nn.Upsample(scale_factor=s)
    if kind == "linear":
        return nn.Upsample(scale_factor=s, mode="bilinear")
    return nn.BatchNorm2d(c) if kind == "norm" else (nn.ReLU(True), nn.GELU(), nn.Tanh())[s - 1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    drawn_layers=st.lists(LAYERS, min_size=1, max_size=5),
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    tile=st.tuples(st.integers(2, 13), st.integers(2, 13)),
    corner=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    skips=st.booleans(),
)
def test_random_stacks(
    drawn_layers: list[Any], size: tuple[int, int], tile: Any, corner: Any, skips: bool
) -> None:
    torch.manual_seed(len(drawn_layers))
    x, parts = drawn(1, 2, *size), []
    y = x
    for kind, *options in drawn_layers:
        one = prepared(layer(kind, *options, 2))
        try:
            following = one(y)
        except RuntimeError:
            continue
        if following.shape[2] * following.shape[3] <= 900:
            parts.append(one)
            y = following.detach()

    def model(x: Tensor) -> Tensor:
        y = x * 1
        for part in parts:
            z = part(y)
            y = z + y if skips and z.shape == y.shape and not isinstance(part, nn.ReLU) else z
        return y

    stem = same(model, x, tile)
    box = tuple((int(at * n), n) for at, n in zip(corner, size, strict=True))
    grad, own = gradient(model, x)[1], gradient(route(stem, tile, box), x)[1]
    difference = own[inside(box)] - grad[inside(box)]
    assert difference.norm() <= TOLERANCE * grad.norm()
    assert own.count_nonzero() == own[inside(box)].count_nonzero()


@pytest.mark.parametrize("spread", [False, True])
def test_windows_see_what_reaches_them(spread: bool) -> None:
    """Both directions of every small window, against every pair of places."""
    for s, k, d, p in [(1, 3, 1, 1), (2, 3, 1, 0), (3, 1, 1, 0), (2, 2, 3, 2), (4, 2, 1, 1)]:
        window = Window(s, p, d * (k - 1), spread=spread)
        near, far = (0, 1) if spread else (1, 0)
        pairs = [(o * s - p + d * j, o) for o in range(-20, 21) for j in range(k)]
        links = {(pair[near], pair[far]) for pair in pairs}  # (output, input)
        for place in range(-3, 4):
            a, b = window.sees((place, place + 2))
            assert all(a <= i < b for o, i in links if place <= o < place + 2)
            a, b = window.reaches((place, place + 2))
            assert all(a <= o < b for o, i in links if place <= i < place + 2)


def test_stems_stop_where_calls_see_everything() -> None:
    x = drawn(2, 2, 13, 18)
    calls = {
        name: [step.name for step, *_ in same(model, x, (5, 6)).steps]
        for name, model in {
            "patches": prepared(Patches()),
            "instance": seq(
                nn.Conv2d(2, 3, 3), nn.ReLU(), nn.InstanceNorm2d(3), nn.Conv2d(3, 1, 3)
            ),
            "reflected": seq(
                nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
            ),
            "blind": blind,
        }.items()
    }
    assert calls == {
        "patches": ["conv2d"],
        "instance": ["conv2d", "relu"],
        "reflected": ["conv2d"],
        "blind": ["conv2d"],
    }


@pytest.mark.parametrize(
    "model",
    [
        seq(nn.InstanceNorm2d(2), nn.Conv2d(2, 2, 3)),
        seq(nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3)),
        seq(nn.Flatten(), nn.Linear(108, 2)),
        seq(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(2, 2, 3)),
        seq(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        seq(nn.Upsample(scale_factor=1.5)),
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x.flip(2),
        lambda x: x.softmax(2),
    ],
)
def test_models_without_a_stem(model: Model) -> None:
    with pytest.raises(NotLeanError, match="does not begin with local calls"):
        local_stem(record(model, drawn(1, 2, 6, 9)))


def overlapping(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL)
    y[:, :2].mul_(2)
    return y


def overwritten(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL)
    return y * x.mul_(x.mean()).mean()


@pytest.mark.parametrize(
    ("model", "reason"), [(overlapping, "by one view"), (overwritten, "overwrites its input")]
)
def test_overwritten_memory_is_refused(model: Model, reason: str) -> None:
    with pytest.raises(NotLeanError, match=reason):
        local_stem(record(model, drawn(1, 2, 6, 9)))


def test_one_input_alone() -> None:
    x = drawn(1, 2, 6, 9)
    recorder = Recorder((x, x.clone()), ())
    with recorder:
        y = F.relu(x)
    with pytest.raises(NotLeanError, match="single input"):
        local_stem(recorder.program(y))


def test_errors_name_tile_region_and_size() -> None:
    stem = local_stem(record(IMAGES["jumps"], drawn(1, 2, 13, 18)))
    for tile in ((4,), (0, 4)):
        with pytest.raises(InputError, match=r"tile must .* the input has \[13, 18\]"):
            Tiled(stem, tile)
    for region in (((0, 4),), ((0, 14), (0, 4)), ((3, 3), (0, 4))):
        with pytest.raises(InputError, match=r"region must .* the input has \[13, 18\]"):
            Tiled(stem, (4, 4), region)
    with pytest.raises(InputError, match=r"points must .* expected \[13, 18\]"):
        route(stem, (4, 4))(drawn(1, 2, 13, 19))


def peak(run: Model, x: Tensor) -> int:
    leaf = x.clone().requires_grad_()
    with MemoryMeter() as meter:
        y = run(leaf)
        torch.autograd.grad(y, leaf, torch.ones_like(y))
    return meter.peak


def test_peak_memory_is_the_planned_one() -> None:
    net, x = Segmenter().eval(), torch.randn(1, 3, 96, 128)
    stem = local_stem(record(net, x))
    # The cut, its gradient and the input's.
    whole = 4 * (2 * math.prod((2, 96, 128)) + x.numel())
    plain = peak(net, x)
    for tile, share in (((96, 128), 1.0), ((16, 128), 0.3), ((32, 32), 0.2), ((16, 24), 0.15)):
        found = peak(route(stem, tile), x)
        assert found < share * plain
        assert 0.8 < found / (whole + tile_bytes(stem, tile)) < 1.01


def test_tiles_fit_a_budget() -> None:
    stem = local_stem(record(Segmenter().eval(), torch.randn(1, 3, 96, 128)))
    everything = tile_bytes(stem, (96, 128))
    assert tile_sizes(stem, everything) == (96, 128)
    sizes = [tile_sizes(stem, everything // part) for part in (2, 4, 8, 16, 32)]
    for tile, part in zip(sizes, (2, 4, 8, 16, 32), strict=True):
        assert tile_bytes(stem, tile) <= everything // part
        assert all(own % 2 == 0 for own in tile)
    assert sizes[0][1] == sizes[1][1] == 128
    assert [math.prod(tile) for tile in sizes] == sorted(map(math.prod, sizes), reverse=True)
    with pytest.raises(BudgetError, match=r"got 1,000 bytes, the smallest, \[2, 2\], takes"):
        tile_sizes(stem, 1000)
