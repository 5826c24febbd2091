"""The way back through convolutions to few channels, and the layout in which pools hand back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from saliency_fast.graph.autograd import LEAN, convolutions

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZES = list(itertools.product((1, 3), (1, 2, 3), (0, 1), (1, 2)))


def _back(channels: int, width: int, axes: int, last: bool, sizes: tuple[int, ...]) -> None:
    """A lean transpose beside autograd's in float64."""
    kernel, stride, padding, dilation = sizes
    torch.manual_seed(0)
    weight = torch.randn(width, channels, *[kernel] * axes)
    x = torch.randn(2, channels, *[7] * axes, dtype=torch.float64, requires_grad=True)
    apply = functional.conv2d if axes == 2 else functional.conv3d
    y = apply(x, weight.double(), None, stride, padding, dilation)
    grad = torch.randn(y.shape)
    (expected,) = torch.autograd.grad(y, x, grad.double())
    given = grad.contiguous(memory_format=FORMATS[axes + 2]) if last else grad
    options = ([stride] * axes, [padding] * axes, [dilation] * axes, False, 1)
    found = convolutions._transpose(given, weight, x.shape[2:], *options)
    assert found.shape == x.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("channels", "width"), [(1, 8), (1, 32), (2, 64), (3, 96), (4, 96)])
def test_transposes_to_few_channels(channels: int, width: int, axes: int, last: bool) -> None:
    for sizes in SIZES:
        if sizes[2] <= sizes[3] * (sizes[0] - 1):
            _back(channels, width, axes, last, sizes)


def test_what_is_unfolded_is_never_larger_than_what_is_given() -> None:
    grad, ones = torch.randn(1, 32, 8, 8), ([1, 1], [1, 1], [0, 0])
    assert convolutions._to_few(grad, torch.randn(32, 1, 5, 5), *ones, 1)
    assert not convolutions._to_few(grad, torch.randn(32, 1, 7, 7), *ones, 1)
    assert not convolutions._to_few(grad, torch.randn(32, 4, 1, 1), *ones, 1)
    assert not convolutions._to_few(grad, torch.randn(32, 1, 5, 5), *ones, 32)
    assert not convolutions._to_few(grad.double(), torch.randn(32, 1, 5, 5), *ones, 1)


def test_small_single_volumes_are_not_unfolded() -> None:
    weight, few = torch.randn(4, 1, 7, 7, 7), torch.Size((8, 8, 8))
    assert not convolutions._by_backward(torch.randn(1, 4, 8, 8, 8), weight, few, 1)
    assert convolutions._by_backward(torch.randn(2, 4, 8, 8, 8), weight, few, 1)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", [(25, 22), (1, 16), (3, 18), (16, 1)])
def test_wide_kernels(kernel: tuple[int, int], channels: int, rows: int) -> None:
    """With channels innermost oneDNN has no fast transpose to few of them by a wide kernel."""
    torch.manual_seed(0)
    for stride, padding in itertools.product((1, 2), (0, 1)):
        weight = torch.randn(8, channels, *kernel)
        x = torch.randn(rows, channels, 40, 31, dtype=torch.float64, requires_grad=True)
        y = functional.conv2d(x, weight.double(), None, stride, padding)
        grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
        (expected,) = torch.autograd.grad(y, x, grad.double())
        options = ([stride] * 2, [padding] * 2, [1, 1], False, 1)
        found = convolutions._transpose(grad, weight, x.shape[2:], *options)
        assert found.shape == x.shape
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    served = convolutions._by_backward(grad, weight, x.shape[2:], 1)
    assert served == (channels <= 4 and kernel[1] >= 16)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", ["avg_pool", "adaptive_avg_pool", "adaptive_max_pool"])
def test_pools_hand_back_in_the_layout_of_their_input(name: str, axes: int) -> None:
    lean = LEAN[getattr(torch._C._nn, f"{name}{axes}d")]
    torch.manual_seed(0)
    for last in (False, True):
        x = torch.randn(2, 3, *[6] * axes)
        x = x.contiguous(memory_format=FORMATS[axes + 2]) if last else x
        found = lean(x.requires_grad_(), [2] * axes)
        y = found[0] if isinstance(found, tuple) else found
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.stride() == x.stride()
