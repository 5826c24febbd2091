"""Launches without gradients: lean calls that keep nothing, against float64 and PyTorch's own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import ops
from saliency_fast.graph.autograd import convolutions
from saliency_fast.graph.autograd.convolutions import winograd_pays
from saliency_fast.graph.intercept import lean_call
from saliency_fast.ops.dispatch import forced, native_library
from saliency_fast.zoo import digits_cnn, held_out
from tests.models import randn as wide

native = pytest.mark.skipif(
    native_library() is None
    or forced() not in (None, "native")
    or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the C++ version of winograd does not run here",
)
ONE = [1, 1]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return wide(*shape, seed=seed).float()


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def layer(channels: int, outputs: int, side: int, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(rows, channels, side, side, seed=channels).relu()
    weight = randn(outputs, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    return x.contiguous(memory_format=torch.channels_last), weight, randn(outputs, seed=2)


@native
@pytest.mark.parametrize(
    ("channels", "outputs", "side"),
    [(16, 32, 32), (48, 64, 16), (96, 112, 8), (64, 64, 56), (128, 128, 28), (256, 256, 14)],
)
def test_winograd_errs_little_more_than_a_direct_convolution(
    channels: int, outputs: int, side: int
) -> None:
    x, weight, bias = layer(channels, outputs, side)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = relative(F.conv2d(x, weight, bias, padding=1), want)
    found = relative(ops.winograd(x, weight, bias, ONE), want)
    # F(4x4) at these points; with 0, 1, -1, 2 and -2 it would be 3 to 5 times.
    assert found <= 3.5 * max(direct, torch.finfo(torch.float32).eps)


@native
def test_an_image_does_not_depend_on_its_launch() -> None:
    x, weight, bias = layer(48, 80, 14, rows=11)
    whole = ops.winograd(x, weight, bias, ONE)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 11)):
        assert torch.equal(ops.winograd(x[rows], weight, bias, ONE), whole[rows])


@native
def test_not_a_number_stays_with_the_pixels_that_see_it() -> None:
    x, weight, bias = layer(16, 16, 12)
    x[1, 3, 5, 5] = math.nan
    found = ops.winograd(x, weight, bias, ONE)
    assert found[1, :, 4:7, 4:7].isnan().all()
    assert found[::2].isfinite().all()


@native
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_small_and_large_numbers_are_like_any(scale: float) -> None:
    x, weight, bias = layer(32, 48, 9)
    want = F.conv2d(x.double() * scale, weight.double(), padding=1)
    assert relative(ops.winograd(x * scale, weight, None, ONE), want) < 1e-6
    assert ops.winograd(x * scale, weight, bias, ONE).isfinite().all()


NARROW = """
import sys, torch, saliency_fast.ops as ops
case = torch.load(sys.argv[1])
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
torch.save([ops.winograd(*args) for args in case], sys.argv[2])
"""


@native
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the narrow version is this one"
)
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    cases = [
        (*layer(channels, outputs, side), [p, p])
        for channels, outputs, side, p in ((16, 80, 9, 1), (48, 112, 5, 0), (32, 16, 1, 2))
    ]
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    torch.save(cases, given)
    variables = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", NARROW, str(given), str(found)]
    subprocess.run(command, env=variables, check=True)
    for args, narrow in zip(cases, torch.load(found), strict=True):
        assert torch.equal(narrow, ops.winograd(*args))


@native
@pytest.mark.parametrize(
    ("shape", "weight", "options", "served"),
    [
        ((2, 16, 8, 8), (32, 16, 3, 3), {}, True),
        ((2, 256, 14, 14), (256, 256, 3, 3), {}, True),
        ((2, 512, 7, 7), (512, 512, 3, 3), {}, False),
        ((2, 16, 5, 5), (32, 16, 3, 3), {}, False),
        ((2, 24, 8, 8), (32, 24, 3, 3), {}, False),
        ((2, 16, 8, 8), (32, 16, 5, 5), {}, False),
        ((2, 16, 8, 8), (32, 16, 3, 3), {"stride": [2, 2]}, False),
        ((2, 16, 8, 8), (32, 16, 3, 3), {"dilation": [2, 2]}, False),
        ((2, 32, 8, 8), (32, 16, 3, 3), {"groups": 2}, False),
    ],
)
def test_shapes_that_pay(
    shape: tuple[int, ...], weight: tuple[int, ...], options: dict[str, object], served: bool
) -> None:
    given = {"stride": ONE, "padding": ONE, "dilation": ONE, "groups": 1, **options}
    for rows in (shape[0], 1):
        x = torch.empty((rows, *shape[1:]))
        assert winograd_pays(x, torch.empty(weight), None, *given.values()) is served


@native
def test_only_calls_without_gradients_are_taken_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(*args: object) -> Tensor:
        seen.append(1)
        return ops.OPS["winograd"](*args)

    monkeypatch.setattr(convolutions.ops, "winograd", noted)
    x, weight, bias = layer(16, 32, 8)
    lean_call(torch.conv2d, ((2 * x.requires_grad_()), weight, bias, 1, 1), {})
    assert not seen
    with torch.no_grad():
        found = lean_call(torch.conv2d, (x, weight, bias, 1, 1), {})
    assert seen == [1]
    assert relative(found, F.conv2d(x.double(), weight.double(), bias.double(), padding=1)) < 1e-6


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (torch.relu, ()),
        (torch.relu_, ()),
        (torch._C._nn.relu6, ()),
        (torch._C._nn.relu6_, ()),
        (torch._C._nn.leaky_relu, (0.2,)),
        (torch._C._nn.leaky_relu_, (0.2,)),
        (torch.max_pool2d, (3, 2, 1)),
        (torch.max_pool2d, (2,)),
    ],
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_calls_that_keep_nothing_give_pytorchs_bits(
    call: object, args: tuple[object, ...], form: torch.memory_format
) -> None:
    x = (8 * randn(3, 16, 9, 7)).contiguous(memory_format=form)
    x[0, 0, 0, 0] = math.nan
    with torch.no_grad():
        got = lean_call(call, (x.clone(), *args), {})  # type: ignore[arg-type]
        want = call(x.clone(), *args)  # type: ignore[operator]
    assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))
    assert got.stride() == want.stride()


def test_scores_of_the_digits_network_are_right_to_rounding() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:2], samples.labels[:2]
    occlusion = sf.Occlusion(window=(16, 16), stride=(16, 16))
    found = sf.explain(model, x, target=target, method=occlusion).values
    exact = sf.explain(model.double(), x.double(), target=target, method=occlusion).values
    # A difference of scores: errors are those of the scores.
    with torch.no_grad():
        scores = model(x.double()).abs().max().item()
    assert (found.double() - exact).abs().max().item() < 1e-5 * scores


def test_a_changed_weight_is_seen_at_the_next_call() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten()
    ).eval()
    engine = sf.Engine(model, sf.Occlusion(window=(8, 8), stride=(8, 8)))
    x = randn(2, 16, 32, 32)
    before = engine(x, 0).values
    with torch.no_grad():
        model[2].weight.mul_(-2)
        model[2].bias.mul_(-2)
    torch.testing.assert_close(engine(x, 0).values, -2 * before, rtol=1e-4, atol=1e-5)
