"""Masks: agreement with PyTorch's own gradients, layouts, memory, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from saliency_fast import ops
from saliency_fast.ops.dispatch import forced, native_library
from saliency_fast.ops.masks import DTYPES

native = pytest.mark.skipif(
    native_library() is None or forced() not in (None, "native"),
    reason="the C++ CPU ops are not built or SALIENCY_FAST_BACKEND forces another backend",
)
RECTIFIERS = [
    (nn.ReLU(), 0.0, math.inf),
    (nn.LeakyReLU(0.01), 0.01, math.inf),
    (nn.LeakyReLU(-0.5), -0.5, math.inf),
    (nn.ReLU6(), 0.0, 6.0),
]


def numbers(shape: tuple[int, ...], *, last: bool = False) -> Tensor:
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    return x.contiguous(memory_format=layout) if last and layout else x


def test_a_mask_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, 6.0, 5.0, math.nan, -math.inf, 1.0, 3.0, -2.0])
    y, mask = ops.relu_mask(x, None, None, None, 0.0, 6.0)
    assert y.nan_to_num(9.0).tolist() == [0, 0, 2, 6, 5, 9, 0, 1, 3, 0]
    assert mask.tolist() == [0b10110100, 0b1]
    assert not y.signbit().any()


@pytest.mark.parametrize(("module", "slope", "upper"), RECTIFIERS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_gradients_equal_those_of_autograd(module, slope: float, upper: float, last: bool) -> None:
    x = numbers((2, 6, 7, 9), last=last)
    x[0, 0, 0, :3] = torch.tensor([math.inf, -math.inf, 0.0])
    x.requires_grad_()
    want = module(x)
    grad = torch.randn_like(want)
    (wanted,) = torch.autograd.grad(want, x, grad)
    y, mask = ops.relu_mask(x.detach(), None, None, None, slope, upper)
    found, second = ops.relu_mask_backward(grad, mask, None, slope, "standard", True, last)
    assert torch.equal(y, want)
    assert torch.equal(found, wanted)
    assert found.stride() == x.stride()
    assert second.shape == (0,)


@pytest.mark.parametrize("last", [False, True])
def test_a_block_equals_batch_norm_sum_and_rectifier(last: bool) -> None:
    x, residual = numbers((3, 5, 8, 3), last=last).double(), numbers((3, 5, 8, 3)).double() / 2
    norm = nn.BatchNorm2d(5).double().eval()
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.running_mean)
    nn.init.normal_(norm.weight)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    shift = (norm.bias - norm.running_mean * scale).detach()
    x.requires_grad_()
    residual.requires_grad_()
    want = (norm(x) + residual).relu()
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (x, residual), grad)
    y, mask = ops.relu_mask(x.detach(), scale, shift, residual.detach(), 0.0, math.inf)
    found = ops.relu_mask_backward(grad, mask, scale, 0.0, "standard", True, last)
    torch.testing.assert_close(y, want)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_rules_of_gradients() -> None:
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, math.nan, math.inf])
    mask = ops.pack_mask(torch.tensor([True, True, False, False, False, False]))
    rules = {
        rule: ops.relu_mask_backward(grad, mask, None, 0.0, rule, False, False)[0]
        for rule in ("standard", "guided", "deconv")
    }
    assert rules["standard"].tolist() == [1, -1, 0, 0, 0, 0]
    assert rules["guided"].tolist() == [1, 0, 0, 0, 0, 0]
    assert rules["deconv"].nan_to_num(9.0, posinf=8.0).tolist() == [1, 0, 1, 0, 9, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (2, 5, 3), (2, 5, 3, 7), (2, 5, 3, 2, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_layouts_are_kept_and_masks_follow_memory(dtype, shape, last: bool) -> None:
    x = numbers(shape, last=last).to(dtype)
    y, mask = ops.relu_mask(x, None, None, None, 0.0, math.inf)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    ordered = torch.as_strided(x, (x.numel(),), (1,))
    assert torch.equal(mask, ops.pack_mask(ordered > 0))
    assert torch.equal(mask, ops.pack_mask(x > 0))
    changed = x.clone(memory_format=torch.preserve_format)
    assert torch.equal(ops.relu_mask_(changed, None, None, None, 0.0, math.inf), mask)
    assert torch.equal(changed, y)


def test_other_strides_are_copied_once() -> None:
    x = numbers((4, 6, 5)).mT
    y, mask = ops.relu_mask(x, None, None, x, 0.0, math.inf)
    assert y.is_contiguous()
    assert torch.equal(y, (x + x).relu())
    assert torch.equal(mask, ops.pack_mask(x.contiguous() > 0))


def test_views_at_odd_addresses_and_a_residual_that_is_x() -> None:
    flat = numbers((1 + 2 * 8 * 16,))
    x = flat[1:].view(2, 8, 16)
    want = ops.relu_mask.reference(x, None, None, x, 0.0, math.inf)
    mask = ops.relu_mask_(x, None, None, x, 0.0, math.inf)
    assert torch.equal(x, want[0])
    assert torch.equal(mask, want[1])
    bits = ops.pack_mask((flat > 0)[1:])
    assert torch.equal(bits, ops.pack_mask.reference((flat > 0)[1:]))


@native
@pytest.mark.parametrize("last", [False, True])
def test_memory_is_that_of_the_results(last: bool) -> None:
    x, scale = numbers((2, 64, 56, 56), last=last), torch.ones(64)
    residual = x.clone(memory_format=torch.preserve_format)
    mask = ops.pack_mask(x > 0)

    def allocated(function) -> int:
        activity = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            kept = function()
        assert kept is not None
        (event,) = (e for e in profile.key_averages() if e.key.startswith("saliency_fast::"))
        return event.cpu_memory_usage

    def in_place() -> Tensor:
        return ops.relu_mask_(x, scale, scale, residual, 0.0, math.inf)

    def backward() -> tuple[Tensor, Tensor]:
        return ops.relu_mask_backward(x, mask, scale, 0.0, "guided", False, last)

    assert allocated(in_place) == mask.nbytes
    assert allocated(backward) == x.nbytes


_X, _C, _MASK = torch.randn(2, 3, 5), torch.ones(3), torch.zeros(4, dtype=torch.uint8)
_NONE = (None, None, None)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("relu_mask", (_X, *_NONE, 0.1, 6.0), "slope must be 0 where upper is finite: got slope"),
        ("relu_mask", (_X, *_NONE, math.nan, math.inf), "slope must be finite"),
        ("relu_mask", (_X, *_NONE, 0.0, 0.0), "upper greater than 0"),
        ("relu_mask", (_X, _C, None, None, 0.0, 6.0), "scale and shift come together"),
        ("relu_mask", (_X, _C[:2], _C, None, 0.0, 6.0), r"scale must be [\[(]3.*got [\[(]2"),
        ("relu_mask", (_X, _C, _C.double(), None, 0.0, 6.0), "shift must be"),
        ("relu_mask", (_X, None, None, _X[:1], 0.0, 6.0), "residual must be"),
        ("relu_mask", (_C, _C, _C, None, 0.0, 6.0), "2 dimensions or more"),
        ("relu_mask", (_X.int(), *_NONE, 0.0, 6.0), "x must"),
        ("relu_mask_", (_X.mT, *_NONE, 0.0, 6.0), "contiguous or channels_last.*got strides"),
        ("relu_mask_", (_X, *_NONE, 0.1, 6.0), "slope must be 0 where upper is finite"),
        (
            "relu_mask_backward",
            (_X, _MASK, None, 0.0, "smooth", False, False),
            "one of standard, guided, deconv: got 'smooth'",
        ),
        (
            "relu_mask_backward",
            (_X, _MASK[:3], None, 0.0, "guided", False, False),
            r"mask must be uint8 \[4\]",
        ),
        (
            "relu_mask_backward",
            (_X, _MASK, None, 0.0, "guided", False, True),
            "channels_last needs 4 or 5 dimensions",
        ),
        ("pack_mask", (_X.long(),), "flags must be bool or floating point"),
    ],
)
def test_errors_say_what_was_wrong(name: str, args, says: str) -> None:
    for function in (ops.OPS[name], ops.OPS[name].reference):
        with pytest.raises((ValueError, RuntimeError), match=says):
            function(*args)
