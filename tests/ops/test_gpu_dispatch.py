"""Which version of an op a GPU runs, and what becomes of failures there; GPUs are stand-ins."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saliency_fast.errors import BackendError, InputError
from saliency_fast.ops import OPS, Op, backends, cuda, dispatch, registry

CUDA_OPS = [op for op in OPS.values() if op.cuda]
CACHED = (dispatch.cuda_refusal, dispatch.on_device, dispatch.kernels)


@pytest.fixture
def gpus(monkeypatch):
    """Makes GPUs whose library answers with these CUDA errors, and a Triton where `triton`."""
    current = [0]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    def make(*codes: int, triton: bool = True, forced: str = "") -> None:
        library = SimpleNamespace(saliency_fast_device_status=lambda: codes[current[0]])
        monkeypatch.setattr(dispatch, "cuda_library", lambda: library)
        monkeypatch.setattr(dispatch, "_has_triton", lambda: triton)
        monkeypatch.setattr(dispatch, "CUDA_LIBRARY", Path(__file__))
        monkeypatch.setenv(dispatch.VARIABLE, forced)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device", on)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(codes))
        for one in CACHED:
            one.cache_clear()

    yield make
    for one in CACHED:
        one.cache_clear()


@pytest.mark.parametrize(
    ("code", "why"),
    [(209, "no code"), (98, "no code"), (35, "newer than the driver"), (222, "newer than")],
)
def test_triton_serves_a_gpu_on_which_the_library_does_not_run(gpus, code: int, why: str):
    gpus(0, code)
    assert dispatch.on_device(0, has_cuda=True) == "cuda"
    with pytest.warns(UserWarning, match=f"cuda:1: .*{why}.* The triton ops run instead"):
        assert dispatch.on_device(1, has_cuda=True) == "triton"
    assert dispatch.on_device(1, has_cuda=False) == "triton"
    assert backends()["cuda"] == "cuda and triton kernels"
    assert backends()["cuda ops"].startswith("built; not on cuda:1: the library")


def test_backends_name_what_the_current_gpu_runs(gpus):
    gpus(35)
    with pytest.warns(UserWarning, match="cuda:0"):
        assert backends()["cuda"] == "triton and triton kernels"
    gpus(0)
    assert backends()["cuda ops"] == "built"


def test_without_triton_the_reference_serves(gpus):
    gpus(209, triton=False)
    with pytest.warns(UserWarning, match="The reference ops run instead"):
        assert dispatch.on_device(0, has_cuda=True) == "reference"


def test_a_forced_library_that_does_not_run_raises(gpus):
    gpus(209, forced="cuda")
    with pytest.raises(BackendError, match=r"do not run on cuda:0: .*SALIENCY_FAST_BACKEND"):
        dispatch.on_device(0, has_cuda=True)


def test_other_errors_of_a_gpu_are_no_reason_for_another_version(gpus):
    gpus(700)
    with pytest.raises(BackendError, match="CUDA error 700"):
        dispatch.on_device(0, has_cuda=True)


def test_each_gpu_calls_its_own_version(gpus, monkeypatch):
    gpus(0, 209)
    called = []
    monkeypatch.setattr(registry, "_launcher", lambda *which: lambda *_: called.append(which))
    for index in (0, 1):
        x = SimpleNamespace(device=SimpleNamespace(index=index))
        warns = pytest.warns(UserWarning, match="cuda:1") if index else contextlib.nullcontext()
        with warns:
            OPS["pack_mask"].on_gpu(x)
        OPS["line_points"].on_gpu(x)
    assert called == [
        ("pack_mask", "cuda"), ("line_points", "triton"),
        ("pack_mask", "triton"), ("line_points", "triton"),
    ]  # fmt: skip


class CompilationError(Exception):
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (CompilationError("at 1:0"), BackendError),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), BackendError),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), BackendError),
        (subprocess.CalledProcessError(1, "gcc"), BackendError),
        (BackendError("noise_points failed on cuda:0 with CUDA error 209"), BackendError),
        (ValueError("slope must be finite"), ValueError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError),
        (RuntimeError("Triton Error [CUDA]: previous error during capture"), RuntimeError),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.AcceleratorError),
    ],
    ids=lambda value: str(value)[:30],
)
def test_kernels_that_fail_are_backend_errors(gpus, monkeypatch, error, raised):
    gpus(0)

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(registry, "_launcher", lambda *_: broken)
    x = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(raised) as caught:
        OPS["line_points"].on_gpu(x)
    assert isinstance(caught.value, BackendError) == (raised is BackendError)
    if caught.value is not error:
        assert caught.value.__cause__ is error
        assert "line_points (triton) failed on cuda:0" in str(caught.value)


@pytest.mark.parametrize("op", CUDA_OPS, ids=lambda op: op.name)
def test_tensors_of_two_devices_are_refused_before_a_launch(op: Op, monkeypatch):
    def launched() -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(cuda, "library", launched)
    for sample in op.samples():
        tensors = [i for i, one in enumerate(sample.args) if isinstance(one, torch.Tensor)]
        if not sample.args[0].numel():
            continue
        for other in tensors[1:]:
            args = list(sample.args)
            # The mask of a rule that reads none is not passed on.
            if "deconv" in args and other == 1:
                continue
            args[other] = args[other].to("meta")
            with pytest.raises(InputError, match=r"tensors on one device: got cpu and meta"):
                op.launcher("cuda")(*args)


@pytest.mark.parametrize(("code", "raised"), [(700, BackendError), (901, RuntimeError)])
def test_captures_that_fail_are_not_taken_for_kernels_that_fail(monkeypatch, code, raised):
    library = SimpleNamespace(saliency_fast_pack_mask_u8=lambda *_: code)
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with pytest.raises(raised, match=f"CUDA error {code}") as caught:
        cuda.pack_mask(torch.ones(9, dtype=torch.bool))
    assert type(caught.value) is raised
