"""On a GPU: every sample through the dispatcher and through each fast version by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from checking import assert_close_to_reference, every_sample, poisoned, results

from saliency_fast.ops import OPS, Op, Sample, dispatch

if not torch.cuda.is_available():
    pytest.skip("torch.cuda.is_available() is False: no GPU here", allow_module_level=True)

SAMPLES = [one for one in every_sample() if one.values[0].triton]


def skip_without_library() -> None:
    if not dispatch.CUDA_LIBRARY.exists():
        pytest.skip("the CUDA ops are not built here (FORCE_CUDA=1)")
    if refusal := dispatch.cuda_refusal(torch.cuda.current_device()):
        pytest.skip(f"the CUDA ops do not run on this GPU: {refusal}")


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_dispatched(op: Op, sample: Sample):
    with poisoned():
        got = results(op, sample, op.overload, "cuda")
    assert all(tensor.is_cuda for tensor in got)
    assert_close_to_reference(op, sample, got)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_each_backend(op: Op, sample: Sample, backend: str):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if backend == "cuda" and not op.cuda:
        pytest.skip(f"{op.name} has no CUDA C++ version")
    if backend == "cuda":
        skip_without_library()
    with poisoned():
        got = results(op, sample, op.launcher(backend), "cuda")
    assert_close_to_reference(op, sample, got)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_points_beyond_32_bit_offsets(backend: str):
    """The last of the rows begins past element 2**31; it equals the same row made alone."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of GPU memory is free")
    if backend == "cuda":
        skip_without_library()
    launcher = OPS["noise_points"].launcher(backend)
    x = torch.randn(1, 2**22, device="cuda")
    sigma = torch.ones(1, device="cuda", dtype=torch.float64)
    seed = torch.tensor([5], device="cuda")
    sample = torch.arange(2**9 + 2, device="cuda")
    item = torch.zeros_like(sample)
    many = launcher(x, sigma, seed, item, sample, False, 0)
    alone = launcher(x, sigma, seed, item[-1:], sample[-1:], False, 0)
    assert torch.equal(many[-1:], alone)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_masks_beyond_32_bit_offsets(backend: str):
    """The last example begins past element 2**31; it equals the same example alone."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("less than 8 GiB of GPU memory is free")
    if backend == "cuda":
        skip_without_library()
    launcher = OPS["relu_mask_"].launcher(backend)
    x = torch.zeros(17, 8, 2**24, device="cuda", dtype=torch.bfloat16)
    x[-1].normal_()
    scale, shift = torch.randn(2, 8, device="cuda").bfloat16()
    alone = x[-1:].clone()
    wanted = launcher(alone, scale, shift, None, 0.0, 6.0)
    mask = launcher(x, scale, shift, None, 0.0, 6.0)
    assert torch.equal(x[-1:], alone)
    assert torch.equal(mask[-len(wanted) :], wanted)
