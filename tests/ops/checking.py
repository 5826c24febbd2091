"""How a fast version of an op is judged: outputs and changed arguments against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_fast.ops import OPS, Op, Sample


@dataclass(frozen=True)
class Tolerance:
    """Largest relative L2 error, and largest single error as a share of the largest magnitude.

    Both in units of the compared dtype's last place (eps); 0 asks for equal bits.
    """

    relative: float
    largest: float


EXACT = Tolerance(0, 0)
FEW_ROUNDINGS = Tolerance(2, 4)
NOISE = Tolerance(16, 64)
"""Normals may be 1e-6 (8 eps) off in float32 and 1e-14 (45 eps) in float64, times sigma."""
SUMS = Tolerance(1024, 4096)
"""float64 sums of thousands of numbers, in any order; also of numbers rounded otherwise."""

TOLERANCES: dict[str, tuple[Tolerance, ...]] = {
    "random_bits": (EXACT,),
    "line_points": (FEW_ROUNDINGS,),
    "noise_points": (NOISE,),
    "random_line_points": (NOISE,),
    "window_points": (EXACT,),
    "segment_points": (EXACT,),
    "rank_points": (EXACT,),
    "mask_points": (FEW_ROUNDINGS,),
    "accumulate": (FEW_ROUNDINGS,),
    # Deviations from a mean cancel, and their squares grow: several roundings per row.
    "accumulate_moments": (Tolerance(8, 16), Tolerance(16, 64), EXACT),
    "accumulate_random_lines": (NOISE,),
    # A sum and, for each axis, three roundings.
    "cam": (FEW_ROUNDINGS,),
    "finish": (FEW_ROUNDINGS, SUMS),
    "magnitude_percentile": (EXACT,),
    "relu_mask": (EXACT, EXACT),
    "relu_mask_": (EXACT, EXACT),
    "relu_mask_backward": (EXACT, EXACT),
    "pack_mask": (EXACT,),
    # The sum rounds once; deviations from a mean cancel.
    "add_layer_norm": (EXACT, Tolerance(8, 32), FEW_ROUNDINGS, Tolerance(8, 32)),
    "add_layer_norm_backward": (Tolerance(8, 32), Tolerance(8, 32)),
    # Near the error of a direct convolution, in sums of up to a thousand products.
    "winograd": (Tolerance(16, 64),),
    "winograd_weights": (FEW_ROUNDINGS,),
    "maxpool_index": (EXACT, EXACT),
    # Every version adds an element's gradients in the same order.
    "maxpool_index_backward": (EXACT,),
}


def relative_l2(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements, in float64; NaN where `got` is not finite."""
    error = (got.double().cpu() - want.double().cpu()).norm().item()
    scale = want.double().norm().item()
    return error / scale if scale else error


def copied(sample: Sample, device: str | torch.device = "cpu") -> tuple[Any, ...]:
    """The sample's arguments as fresh tensors on `device`, strides kept."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value) if value.numel() else copy

    return tuple(fresh(value) for value in sample.args)


def mutated(op: Op) -> list[int]:
    """Positions of the arguments that the op changes in place, from its schema."""
    arguments = op.overload._schema.arguments
    return [
        i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    ]


def results(
    op: Op, sample: Sample, function: Callable[..., Any], device: str | torch.device = "cpu"
) -> list[Tensor]:
    """What `function` makes of the sample: its outputs, then the arguments it changed."""
    args = copied(sample, device)
    out = function(*args)
    returned = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    return returned + [args[i] for i in mutated(op)]


def assert_close_to_reference(op: Op, sample: Sample, got: Sequence[Tensor]) -> None:
    """Compares `got`, as `results` lists it, with the op's reference, dtype by dtype."""
    want = results(op, sample, op.reference)
    assert len(got) == len(want), f"{op.name} gave {len(got)} results, its reference {len(want)}"
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        where = f"{op.name}({sample.note}) result {number}"
        assert a.shape == b.shape, f"{where}: shape {tuple(a.shape)}, reference {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{where}: {a.dtype}, reference {b.dtype}"
        if op.name == "overlay":
            assert_levels(a, b, where)
        else:
            inputs = [v for v in sample.args if isinstance(v, Tensor) and v.is_floating_point()]
            assert_close(a, b, TOLERANCES[op.name][number], where, inputs)


def assert_levels(got: Tensor, want: Tensor, where: str) -> None:
    """Pictures may differ by one level, and only in one byte of a thousand."""
    error = (got.cpu().int() - want.int()).abs()
    assert error.numel() == 0 or error.max() <= 1, f"{where}: {error.max()} levels off"
    assert (error > 0).sum() <= max(1, error.numel() // 1000), f"{where}: too many bytes differ"


def assert_close(
    got: Tensor, want: Tensor, tolerance: Tolerance, where: str, inputs: Sequence[Tensor] = ()
) -> None:
    """Relative L2 and largest error within `tolerance`; a missed element never passes, and NaN
    only where EXACT finds it on both sides.

    Errors are measured against the larger of `want` and `inputs`: sums may cancel.
    """
    if tolerance == EXACT:
        got = got.cpu()
        same = (got == want) | ((got != got) & (want != want))
        assert same.all(), f"{where}: must be equal bit for bit"
        return
    if want.numel() == 0:
        return
    eps = torch.finfo(want.dtype).eps
    magnitude = max([want.abs().max().item(), *(v.abs().max().item() for v in inputs if v.numel())])
    error = (got.double().cpu() - want.double()).abs()
    largest = error.max().item()
    allowed = tolerance.largest * eps * magnitude
    assert largest <= allowed, f"{where}: largest error {largest:.3g}, allowed {allowed:.3g}"
    # One element's norm is its magnitude; of many, cancelled ones no longer matter.
    norm = max(want.double().norm().item(), magnitude)
    relative = error.norm().item() / norm if norm else error.norm().item()
    assert relative <= tolerance.relative * eps, (
        f"{where}: relative L2 error {relative:.3g}, allowed {tolerance.relative * eps:.3g}"
    )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills memory that PyTorch allocates, in Python or C++, with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def every_sample() -> list[Any]:
    """Every op with every sample of it, as pytest parameters; drawn from one fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            pytest.param(op, sample, id=f"{op.name}-{sample.note.replace(' ', '_')}")
            for op in OPS.values()
            for sample in op.samples()
        ]
