"""Pools: agreement with PyTorch's own, indices and gradients included, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checking import results
from torch import Tensor
from torch.nn import functional as F

from saliency_fast import ops
from saliency_fast.ops import OPS, Sample
from saliency_fast.ops.dispatch import forced, native_library

POOLS = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
VERSIONS = {
    "dispatched": (ops.maxpool_index, ops.maxpool_index_backward),
    "reference": (ops.maxpool_index.reference, ops.maxpool_index_backward.reference),
}
each_version = pytest.mark.parametrize("version", VERSIONS)
native = pytest.mark.skipif(
    native_library() is None or forced() not in (None, "native"),
    reason="the C++ CPU ops are not built or SALIENCY_FAST_BACKEND forces another backend",
)


def _samples() -> list[Any]:
    """Samples that PyTorch takes too: not without examples, and each window with an element."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [s for s in ops.maxpool_index.samples() if min(s.args[0].shape[2:]) > 1]
        return [pytest.param(s, id=s.note.replace(" ", "_")) for s in found if len(s.args[0])]


SAMPLES = _samples()


def flat_places(index: Tensor, size: tuple[int, ...], window: tuple[Any, ...]) -> Tensor:
    """The places in the input that a byte names, as `return_indices` counts them."""
    kernel, stride, padding, dilation = window[:4]
    left, flat, step = index.long(), torch.zeros(index.shape, dtype=torch.int64), 1
    for axis in reversed(range(len(size))):
        place = left % kernel[axis]
        left = left // kernel[axis]
        start = torch.arange(index.shape[2 + axis]) * stride[axis] - padding[axis]
        start = start.view(-1, *(1,) * (len(size) - 1 - axis))
        flat += (start + place * dilation[axis]) * step
        step *= size[axis]
    return flat


@each_version
@pytest.mark.parametrize("sample", SAMPLES)
def test_values_and_places_are_those_of_pytorch(version: str, sample: Sample) -> None:
    x, *window = sample.args
    values, index = VERSIONS[version][0](x, *window)
    wanted, places = POOLS[x.dim()](x, *window, return_indices=True)
    assert torch.equal(values.isnan(), wanted.isnan())
    assert torch.equal(values.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(flat_places(index, x.shape[2:], window), places)


@each_version
@pytest.mark.parametrize("sample", SAMPLES)
def test_gradients_equal_those_of_autograd_in_float64(version: str, sample: Sample) -> None:
    x, *window = sample.args
    x = x.double().requires_grad_()
    wanted = POOLS[x.dim()](x, *window)
    grad = torch.randn_like(wanted)
    (want,) = torch.autograd.grad(wanted, x, grad)
    _, index = VERSIONS[version][0](x.detach(), *window)
    found = VERSIONS[version][1](grad, index, list(x.shape[2:]), *window[:4])
    assert (found - want).abs().max() <= 1e-14 * grad.abs().max() * index.numel() ** 0.5


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 8), (2, 2), (6, 1)])
def test_results_lie_as_their_input_does(form: torch.memory_format, size: tuple[int, int]) -> None:
    # A result of one element is contiguous either way; its strides still say which.
    x = torch.empty(2, 5, *size, memory_format=form).normal_()
    window = ((2, size[1] - size[1] % 2 or 1), (2, 2), (0, 0), (1, 1))
    values, index = ops.maxpool_index(x, *window, False)
    found = ops.maxpool_index_backward(values.contiguous(), index, list(size), *window)
    shape = values.shape
    assert values.stride() == torch.empty(shape, memory_format=form).stride()
    assert index.stride() == values.stride()
    assert found.stride() == x.stride()


def test_a_gradient_that_is_no_number_goes_to_its_element_alone() -> None:
    x = torch.tensor([[[1.0, 5.0, 2.0, 4.0, 3.0]]])
    _, index = ops.maxpool_index(x, [3], [1], [1], [1], False)
    grad = torch.tensor([[[1.0, torch.nan, 2.0, 4.0, 8.0]]])
    found = ops.maxpool_index_backward(grad, index, [5], [3], [1], [1], [1])
    assert index.tolist() == [[[2, 1, 0, 1, 0]]]
    assert found.isnan().tolist() == [[[False, True, False, False, False]]]
    assert found.nan_to_num(0.0).tolist() == [[[0.0, 0.0, 0.0, 12.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_overlapping_windows_of_half_types_are_rounded_once(
    dtype: torch.dtype, form: torch.memory_format
) -> None:
    x = torch.zeros(1, 3, 9, 9).contiguous(memory_format=form).to(dtype)
    x[:, :, 4, 4] = 1
    window = ([5, 5], [1, 1], [2, 2], [1, 1])
    _, index = ops.maxpool_index(x, *window, False)
    grad = torch.rand(index.shape).to(dtype)
    found = ops.maxpool_index_backward(grad, index, [9, 9], *window)
    want = grad[:, :, 2:7, 2:7].float().sum((2, 3)).to(dtype)
    assert torch.equal(found[:, :, 4, 4], want)


def test_bytes_that_name_no_place_are_left_out() -> None:
    index = torch.tensor([[[0, 7, 255]]], dtype=torch.uint8)
    found = ops.maxpool_index_backward(torch.ones(1, 1, 3), index, [6], [2], [2], [0], [1])
    assert found.tolist() == [[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_bands_of_a_large_result(dtype: torch.dtype, last: bool, monkeypatch) -> None:
    """A result of several bands, which begin in the middle of a row."""
    x = torch.randn(1, 17, 61, 703).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    window = ((3, 3), (2, 2), (1, 1), (1, 1))
    values, index = ops.maxpool_index(x, *window, False)
    sample = Sample((torch.randn_like(values), index, [61, 703], *window))
    op = OPS["maxpool_index_backward"]
    (found,), (want,) = (results(op, sample, version) for version in (op, op.reference))
    assert torch.equal(found, want)


_X, _ONE = torch.zeros(1, 2, 8, 8), [1, 1]


@each_version
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((_X, [17, 16], _ONE, [0, 0], _ONE, False), "a window may have 256 elements"),
        ((_X, [2**40, 2**40], _ONE, [0, 0], _ONE, False), "a window may have 256 elements"),
        ((_X, [9, 9], _ONE, [0, 0], _ONE, False), "no window of"),
        ((_X, [2, 2], _ONE, [2, 0], _ONE, False), "at most half a window"),
        ((_X, [2, 2], [0, 1], [0, 0], _ONE, False), "must be positive"),
        ((_X, [2, 2], _ONE, [-1, 0], _ONE, False), "must be positive"),
        ((_X, [2], [1], [0], [1], False), "a number for each"),
    ],
)
def test_windows_that_fit_nothing_are_refused(version: str, arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VERSIONS[version][0](*arguments)


@each_version
@pytest.mark.parametrize(
    ("grad", "index", "says"),
    [
        (_X, _X, "index must be uint8"),
        (_X[:, :1], _X.byte(), "grad must be like index"),
        (_X, _X.byte(), "grad must be a pool of"),
    ],
)
def test_gradients_that_fit_no_pool_are_refused(
    version: str, grad: Tensor, index: Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        VERSIONS[version][1](grad, index, [8, 8], [2, 2], [2, 2], [0, 0], _ONE)
