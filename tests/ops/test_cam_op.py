"""The op `cam` against PyTorch's einsum and interpolation in float64, and what is refused."""

from __future__ import annotations

import pytest
import torch
from checking import relative_l2
from torch.nn import functional as F

from saliency_fast import ops
from saliency_fast.ops.dispatch import forced, native_library

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
VERSIONS = {"dispatched": ops.cam, "reference": ops.cam.reference}
each_version = pytest.mark.parametrize("version", VERSIONS)
native = pytest.mark.skipif(
    native_library() is None or forced() not in (None, "native"),
    reason="the C++ CPU ops are not built or SALIENCY_FAST_BACKEND forces another backend",
)


@each_version
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    ("small", "size"),
    [
        ((9,), (160,)),
        ((12,), (5,)),
        ((7, 7), (224, 224)),
        ((14, 9), (14, 31)),
        ((3, 4, 5), (8, 4, 13)),
        ((6, 5, 4), (3, 9, 2)),
    ],
    ids=str,
)
def test_maps_are_those_of_interpolate(version: str, small, size, everywhere: bool, rectify: bool):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 37, *small, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 37, *(small if everywhere else ()), generator=generator).double()
    sums = "bc...,bc...->b..." if everywhere else "bc...,bc->b..."
    total = torch.einsum(sums, activations, weights)
    total = total.clamp(min=0) if rectify else total
    want = F.interpolate(total[:, None], size, mode=MODES[len(size)], align_corners=False)[:, 0]
    found = VERSIONS[version](activations, weights, size, rectify)
    # PyTorch's places are off by a rounding of numbers up to 12; sums have 37 terms.
    assert (found - want).abs().max() <= 1e-12 * want.abs().max()
    single = VERSIONS[version](activations.float(), weights.float(), size, rectify)
    assert single.dtype == torch.float32
    assert relative_l2(single, want) < 1e-6


@each_version
def test_a_map_of_the_same_size_is_the_weighted_sum(version: str) -> None:
    activations, weights = torch.randn(3, 5, 6, 7), torch.randn(3, 5)
    found = VERSIONS[version](activations, weights, (6, 7), False)
    want = (activations.double() * weights[:, :, None, None].double()).sum(1).float()
    assert torch.equal(found, want)


@each_version
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_half_types_are_float32(version: str, dtype: torch.dtype) -> None:
    activations, weights = torch.randn(2, 9, 4, 5).to(dtype), torch.randn(2, 9)
    found = VERSIONS[version](activations, weights, (8, 15), True)
    want = VERSIONS[version](activations.double(), weights.double(), (8, 15), True)
    assert found.dtype == torch.float32
    assert relative_l2(found, want) < 1e-6


def test_the_rectifier_comes_before_the_resize() -> None:
    activations = torch.tensor([[[-1.0, 3.0]]])
    found = ops.cam(activations, torch.ones(1, 1), [4], True)
    assert found.tolist() == [[0.0, 0.75, 2.25, 3.0]]


def test_not_a_number_stays() -> None:
    activations = torch.tensor([[[torch.nan, 1.0, 2.0, 3.0]]])
    found = ops.cam(activations, torch.ones(1, 1), [8], True)
    assert found.isnan().tolist() == [[True, True, True] + [False] * 5]


def test_no_examples_make_no_maps() -> None:
    assert ops.cam(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3), [8, 9], True).shape == (0, 8, 9)


_A = torch.zeros(2, 3, 4, 5)


@native
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((_A[..., 0, 0], _A[..., 0, 0], [], True), "1 to 3 spatial axes"),
        ((_A, _A[:, :2, 0, 0], [8, 8], True), r"weights must be \[B, C\] or like activations"),
        ((_A, _A[..., 0], [8, 8], True), "weights must be"),
        ((_A, _A, [8], True), "size must have a positive number for each of 2 axes"),
        ((_A, _A, [8, 0], True), "size must have"),
        ((_A[..., :0], _A[..., :0], [8, 8], True), "activations must have elements"),
        ((_A.long(), _A, [8, 8], True), "activations must be float32, float64 or a half type"),
    ],
)
def test_errors_say_what_was_wrong(args, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        ops.cam(*args)
