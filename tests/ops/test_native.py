"""The C++ CPU ops: every sample against the reference, and what only native code can get wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from checking import (
    assert_close_to_reference,
    copied,
    every_sample,
    mutated,
    poisoned,
    relative_l2,
    results,
)

from saliency_fast import ops
from saliency_fast.ops import OPS, Op, Sample, philox
from saliency_fast.ops.dispatch import VARIABLE, forced, native_library

pytestmark = pytest.mark.skipif(
    native_library() is None or forced() not in (None, "native"),
    reason="the C++ CPU ops are not built or SALIENCY_FAST_BACKEND forces another backend",
)
SAMPLES = every_sample()
ON_GPUS = ("add_layer_norm", "add_layer_norm_backward")
"""Ops of passes that only GPUs take, which CPUs compute by the reference."""
ACCUMULATORS = ("accumulate", "accumulate_moments", "accumulate_random_lines")


@pytest.fixture
def _poison():
    with poisoned():
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _large() -> dict[str, Sample]:
    """One call per op that is large enough for several tiles and threads."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, lines = normal(3, 2, 20_011), normal(4, 2, 20_011)
    sigma, seed = torch.tensor([0.5, 0.0, 2.0]).double(), torch.tensor([1, -5, 2**50])
    item, sample = torch.tensor([0, 0, 2, 1, 2, 0, 1]), torch.tensor([0, 1, 4, 2**31, 5, 7, 3])
    slot, weight, grads = (
        torch.tensor([1, 0, 1, 1, 0, 2, 2]),
        normal(7).double(),
        normal(7, *x.shape[1:]),
    )
    random = (x, lines, sigma, seed, item, sample, 6)
    image = torch.randint(0, 256, (3, 40_022, 3), dtype=torch.uint8, generator=generator)
    colors = torch.randint(0, 256, (256, 3), dtype=torch.uint8, generator=generator)
    calls = {
        "random_bits": (seed, seed, 50_003, 5, 1),
        "line_points": (x, lines[:3], item, torch.linspace(0, 1, 7).double()),
        "noise_points": (x, sigma, seed, item, sample, True, 6),
        "random_line_points": random,
        "accumulate": (normal(3, 2, 20_011), grads, slot, weight, "sum"),
        "accumulate_moments": (x.clone(), x.abs(), torch.zeros(3).double() + 1, grads, slot),
        "accumulate_random_lines": (normal(3, 2, 20_011), grads, slot, weight, *random),
        "finish": (x, lines[:3], lines[:1], "l2"),
        "magnitude_percentile": (x, 98.0),
        "overlay": (image, x.flatten(1), torch.tensor([1.0, 2.0, 3.0]), colors, True, 0.7),
    }
    calls |= _large_norms(generator)
    calls |= _large_masks(generator) | _large_pools(generator) | _large_parts(x, item, generator)
    return {name: Sample(args) for name, args in calls.items()}


def _large_masks(generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    x = torch.randn(3, 12, 41, 43, generator=generator)
    last = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 12, generator=generator)
    flags = torch.rand(x.shape, generator=generator) < 0.5
    mask = ops.pack_mask.reference(flags)
    return {
        "relu_mask": (x, scale, shift, x.flip(0), 0.01, math.inf),
        "relu_mask_": (last, scale, shift, last.flip(0), 0.0, 1.5),
        "relu_mask_backward": (x, mask, scale, 0.0, "guided", True, False),
        "pack_mask": (flags,),
    }


def _large_norms(generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    x, added, grad = torch.randn(3, 4, 197, 768, generator=generator)
    weight, bias = torch.randn(2, 768, generator=generator)
    about = (weight, bias, 1e-6, torch.float16)
    total, y, mean, scale = ops.add_layer_norm.reference(x, added.half(), *about)
    kept = (total, mean, scale, weight, torch.float16)
    return {
        "add_layer_norm": (x, added.half(), *about),
        "add_layer_norm_backward": (grad.to(y.dtype), x, *kept),
    }


def _large_pools(generator: torch.Generator) -> dict[str, tuple[Any, ...]]:
    """Volumes, forward contiguous and backward channels last, in several bands of a result."""
    x = torch.randn(2, 40, 21, 22, 23, generator=generator)
    window = ((3, 2, 3), (2, 2, 1), (1, 0, 1), (1, 2, 1))
    last = x.contiguous(memory_format=torch.channels_last_3d)
    grad, index = ops.maxpool_index.reference(last.bfloat16(), *window, False)
    return {
        "maxpool_index": (x, *window, True),
        "maxpool_index_backward": (grad, index, [21, 22, 23], *window),
    }


def _large_parts(
    x: torch.Tensor, item: torch.Tensor, generator: torch.Generator
) -> dict[str, tuple[Any, ...]]:
    """Windows that begin and end within lines and tiles; what numbers both channels alike."""
    start = torch.tensor([[0, 0], [1, 4095], [0, 5000], [-3, 19_000], [0, 9], [1, 1], [0, 4096]])
    stop = start + torch.tensor([[2, 3], [1, 2], [2, 9000], [9, 9999], [0, 9], [1, 20_000], [1, 1]])
    segment = torch.randint(0, 50, (3, 20_011), generator=generator)
    present = torch.rand(6, 50, generator=generator) < 0.5
    place = torch.tensor([5, 0, 1, 1, 3, 2, 4])
    mask = torch.rand(6, 20_011, generator=generator)
    rank = mask[:3].argsort(1).int()
    activations, weights = torch.randn(2, 3, 70, 13, 11, 17, generator=generator)
    return {
        "window_points": (x, -x[:1], item, start, stop),
        "segment_points": (x, -x, segment, present, item, place),
        "mask_points": (x, -x[:1], mask, item, place),
        "rank_points": (x, -x, rank, item, torch.tensor([0, 1, 9000, 20_010, 20_011, 2**40, -5])),
        "cam": (activations, weights[..., 0, 0, 0], [35, 40, 31], True),
        "winograd": (
            torch.randn(9, 48, 30, 33, generator=generator),
            torch.randn(112, 48, 3, 3, generator=generator) / 20,
            None,
            (1, 1),
        ),
        "winograd_weights": (torch.randn(112, 48, 3, 3, generator=generator),),
    }


LARGE = _large()


def finite(sample: Sample) -> bool:
    """Whether `opcheck` can compare its results: to it NaN differs from NaN."""
    tensors = (v for v in sample.args if isinstance(v, torch.Tensor))
    return not any(t.isnan().any() for t in tensors)


def test_every_op_has_a_native_version_and_a_large_sample() -> None:
    for name in OPS:
        assert name in LARGE
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"saliency_fast::{name}", "CPU")
        assert native != (name in ON_GPUS)


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_sample_equals_reference(op: Op, sample: Sample) -> None:
    assert_close_to_reference(op, sample, results(op, sample, op.overload))


@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("name", OPS)
def test_large_sample_equals_reference(name: str) -> None:
    assert_close_to_reference(OPS[name], LARGE[name], results(OPS[name], LARGE[name], OPS[name]))


@pytest.mark.parametrize(("op", "sample"), [p for p in SAMPLES if finite(p.values[1])])
def test_opcheck(op: Op, sample: Sample) -> None:
    torch.library.opcheck(op.overload, copied(sample))


def test_poison_fills_what_at_empty_gives() -> None:
    # torch.empty is at::empty, which the C++ ops call; both fill inside the allocation.
    with poisoned():
        assert torch.empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", OPS)
def test_bits_do_not_depend_on_threads(name: str, threads) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(OPS[name], LARGE[name], OPS[name]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_bits_do_not_depend_on_the_split_into_calls(name: str) -> None:
    op, sample = OPS[name], LARGE[name]
    names = [argument.name for argument in op.overload._schema.arguments]
    columns = ("grads", "slot", "weight", "example", "sample")
    per_row = [i for i, n in enumerate(names) if n in columns]
    args = copied(sample)
    for start, stop in ((0, 1), (1, 4), (4, 4), (4, 7)):
        part = [value[start:stop] if i in per_row else value for i, value in enumerate(args)]
        op(*part)
    whole = results(op, sample, op)
    split = [args[i] for i in mutated(op)]
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("_points")])
def test_points_do_not_depend_on_other_rows(name: str) -> None:
    op, sample = OPS[name], LARGE[name]
    names = [argument.name for argument in op.overload._schema.arguments]
    columns = ("example", "sample", "alpha", "coalition", "number", "start", "stop", "count")
    whole = op(*sample.args)
    for row in range(len(whole)):
        args = [
            value[row : row + 1] if n in columns else value
            for n, value in zip(names, sample.args, strict=True)
        ]
        assert torch.equal(op(*args)[0], whole[row])


def test_line_points_have_the_bits_of_the_reference() -> None:
    op = OPS["line_points"]
    for sample in [*op.samples(), LARGE["line_points"]]:
        assert torch.equal(op(*sample.args), op.reference(*sample.args))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_normals_are_those_of_float64(dtype: torch.dtype, most: float) -> None:
    count, rows = 1 << 18, 8
    seed, sample = torch.tensor([12345]), torch.arange(rows)
    zero = torch.zeros(1, count, dtype=dtype)
    item, one = torch.zeros(rows, dtype=torch.int64), torch.ones(1).double()
    got = ops.noise_points(zero, one, seed, item, sample, False, 1)
    want = philox.normals(seed.expand(rows), sample, count, 1)
    assert (got.double() - want).abs().max() <= most
    assert abs(got.double().mean()) < 5e-3
    assert abs(got.double().std() - 1) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_widened(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grads = bits.view(dtype)[None]
    total = torch.zeros(1, 2**16)
    ops.accumulate(total, grads, torch.tensor([0]), torch.ones(1).double(), "sum")
    assert torch.equal(total.nan_to_num(7e9), grads.float().nan_to_num(7e9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_points_are_rounded_once(dtype: torch.dtype) -> None:
    x, baseline = LARGE["line_points"].args[:2]
    item, alpha = LARGE["line_points"].args[2:]
    got = ops.line_points(x.to(dtype), baseline.to(dtype), item, alpha)
    want = ops.line_points(x.to(dtype).double(), baseline.to(dtype).double(), item, alpha)
    assert got.dtype == dtype
    assert relative_l2(got, want) < torch.finfo(dtype).eps / 2


def test_zero_rows() -> None:
    none = torch.tensor([], dtype=torch.int64)
    x, total = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    before, empty, row = total.clone(), torch.empty(0, 3, 5), torch.ones(2).double()
    assert ops.line_points(x, x, none, none.double()).shape == (0, 3, 5)
    assert ops.noise_points(x, row, none.new_ones(2), none, none, True, 0).shape == (0, 3, 5)
    ops.accumulate(total, empty, none, none.double(), "sum")
    ops.accumulate_moments(total, x, row, empty, none)
    assert torch.equal(total, before)
    assert ops.random_bits(none, none, 5, 0, 0).shape == (0, 5)
    values, sums = ops.finish(empty, None, None, "l2")
    assert (values.shape, sums.shape) == ((0, 5), (0,))
    assert ops.magnitude_percentile(empty, 50.0).shape == (0,)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_percentile_of_awkward_rows(share: float, dtype: torch.dtype) -> None:
    constant, heavy = torch.full((200_000,), -2.5), torch.randn(200_000)
    heavy[::3] = 0.125
    narrow = 1 + 1e-6 * torch.rand(200_000)
    wide = torch.randn(200_000) * 10.0 ** torch.randint(-40, 38, (200_000,)).float()
    infinite = torch.randn(200_000)
    infinite[::5], infinite[1::100] = -torch.inf, torch.nan
    op = OPS["magnitude_percentile"]
    for row in (constant, heavy, narrow, wide, infinite):
        values = torch.stack([row, -row.flip(0)]).to(dtype)
        got, want = op(values, 100 * share), op.reference(values, 100 * share)
        assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1))


def test_not_a_number_leaves_the_image_and_the_maximum_shows_it() -> None:
    image, values = torch.full((1, 2, 3), 77, dtype=torch.uint8), torch.tensor([[torch.nan, 1.0]])
    colors = torch.zeros(256, 3, dtype=torch.uint8)
    picture = ops.overlay(image, values, torch.ones(1), colors, True, 1.0)
    assert picture[0].tolist() == [[77, 77, 77], [0, 0, 0]]
    total = torch.tensor([[[1.0, 1.0], [torch.nan, 2.0], [3.0, 1.0]]])
    assert ops.finish(total, None, None, "absmax")[0].isnan().tolist() == [[True, False]]


_ROW, _X, _NUMBER = torch.ones(2).double(), torch.randn(2, 3, 4), torch.tensor([0, 1])
_BYTES = torch.zeros(2, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        (
            "line_points",
            (_X, _X, _NUMBER + 1, _ROW),
            IndexError,
            r"item must lie in \[0, 2\): got 2",
        ),
        (
            "line_points",
            (_X, _X, _NUMBER, _ROW[:1]),
            RuntimeError,
            r"alpha must be \[2\]: got \[1\]",
        ),
        ("line_points", (_X, _X[:, :1], _NUMBER, _ROW), RuntimeError, "rows of baseline must have"),
        ("line_points", (_X.int(), _X, _NUMBER, _ROW), RuntimeError, "x must be float32, float64"),
        ("noise_points", (_X, _ROW[:1], _NUMBER, _NUMBER, _NUMBER, True, 0), RuntimeError, "sigma"),
        ("accumulate", (_X, _X, _NUMBER, _ROW, "mean"), ValueError, "one of sum, square, absolute"),
        ("accumulate", (_X, _X, _NUMBER - 1, _ROW, "sum"), IndexError, "slot must lie in"),
        ("accumulate", (_X.mT, _X.mT, _NUMBER, _ROW, "sum"), RuntimeError, "must be contiguous"),
        ("accumulate", (_X, _X[:, :2], _NUMBER, _ROW, "sum"), RuntimeError, "rows of grads"),
        ("accumulate_moments", (_X, _X.double(), _ROW, _X, _NUMBER), RuntimeError, "like mean"),
        (
            "accumulate_moments",
            (_X, _X, _NUMBER, _X, _NUMBER),
            RuntimeError,
            "count must be float64",
        ),
        (
            "finish",
            (_X, None, None, "mean"),
            ValueError,
            "one of none, sum, absmax, l2: got 'mean'",
        ),
        (
            "finish",
            (torch.randn(3, 3, 4), _X, None, "sum"),
            RuntimeError,
            "multiple of the examples",
        ),
        ("magnitude_percentile", (_X, 101.0), RuntimeError, r"lie in \[0, 100\]: got 101"),
        (
            "overlay",
            (_BYTES, _X, _ROW, _BYTES, True, 0.5),
            RuntimeError,
            r"values must be \[2, 4\]",
        ),
    ],
)
def test_errors_say_what_was_wrong(name: str, args, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        OPS[name](*args)


def test_a_refused_call_changes_nothing() -> None:
    mean, spread, count = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).double()
    with pytest.raises(IndexError):
        ops.accumulate_moments(mean, spread, count, torch.ones(2, 3), torch.tensor([0, 2]))
    assert count.tolist() == [0.0, 0.0]


def test_reference_can_be_forced() -> None:
    code = "from saliency_fast import ops; print(ops.backends()['cpu'])"
    environment = {**os.environ, VARIABLE: "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("reference")
