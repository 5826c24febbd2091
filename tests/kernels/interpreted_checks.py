"""Run by test_interpreted.py in a process of its own: TRITON_INTERPRET must be set before triton
is imported. Alone: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_checks.py
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checking import assert_close_to_reference, every_sample, poisoned, results
from saliency_fast.kernels.configurations import TABLE, Configuration
from triton.runtime import interpreter

from benchmarks import tuning
from benchmarks.ops import Call
from saliency_fast.ops import OPS, Op, Sample
from tests.kernels.guarded import Guard, guarded
from tests.kernels.mutants import mutant


@pytest.fixture(autouse=True)
def numpy_scalars(monkeypatch):
    """Triton makes a loop bound by int() of a one-element array, which NumPy 2.4 refuses. From 3.6
    on it restores what it sets.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def rounded_bfloat16(monkeypatch):
    """Triton 3.6's interpreter cuts float32 to bfloat16, where GPUs round to the nearest."""
    convert = interpreter._convert_float

    def patched(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", patched)


@pytest.fixture(autouse=True)
def boolean_conditions(monkeypatch):
    """Triton 3.9's interpreter types a comparison's result like its operands, so that a scalar
    condition broadcast to a block holds whole numbers, which it then refuses as a mask.
    """
    broadcast = interpreter.InterpreterBuilder.create_splat

    def patched(self, kind, value):
        if value.data.dtype == np.bool_:
            value = interpreter.TensorHandle(value.data, tl.int1)
        return broadcast(self, kind, value)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", patched)


@pytest.fixture(autouse=True)
def checked_addresses():
    """Every launch of every test: see guarded.py."""
    with guarded() as guard:
        yield guard
    assert not guard.found, "\n".join(guard.found)


def small_enough(op: Op, sample: Sample) -> bool:
    """Ops with kernels; of the eight percentiles of the two largest maps, the slow interpreter is
    left one.
    """
    values = sample.args[0]
    large = op.name == "magnitude_percentile" and values.numel() > 100_000
    if op.triton is None:
        return False
    return not large or (values.dtype == torch.float32 and sample.args[1] == 99.0)


@pytest.mark.parametrize(("op", "sample"), [p for p in every_sample() if small_enough(*p.values)])
def test_sample(op: Op, sample: Sample):
    with poisoned():
        got = results(op, sample, op.launcher("triton"))
    assert_close_to_reference(op, sample, got)


def test_rows_split_over_launches_give_the_same_bits():
    slot, weight = torch.tensor([0, 2, 2, 0, 1, 2, 1, 0, 0]), torch.rand(9).double()
    total, grads = torch.randn(3, 33), torch.randn(9, 33)
    launcher = OPS["accumulate"].launcher("triton")
    whole, split = total.clone(), total.clone()
    launcher(whole, grads, slot, weight, "sum")
    for rows in (slice(0, 2), slice(2, 3), slice(3, 9)):
        launcher(split, grads[rows], slot[rows], weight[rows], "sum")
    assert torch.equal(whole, split)


@pytest.mark.parametrize("name", ["accumulate", "accumulate_moments", "accumulate_random_lines"])
def test_strided_totals_change_in_place(name: str):
    op = OPS[name]
    sample = next(s for s in op.samples() if s.args[0].dim() > 2)
    strided = tuple(
        a.transpose(1, 2).contiguous().transpose(1, 2) if i == 0 else a
        for i, a in enumerate(sample.args)
    )
    sample = Sample(strided)
    assert_close_to_reference(op, sample, results(op, sample, op.launcher("triton")))


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("_points")])
def test_no_rows_make_no_points(name: str):
    op = OPS[name]
    first = next(i for i, a in enumerate(op.overload._schema.arguments) if a.name == "example")
    args = list(next(op.samples()).args)
    for column in range(first, len(args)):
        if isinstance(args[column], torch.Tensor):
            args[column] = args[column][:0]
    assert op.launcher("triton")(*args).shape == (0, *args[0].shape[1:])


@pytest.mark.parametrize("name", ["relu_mask", "relu_mask_", "relu_mask_backward", "pack_mask"])
def test_masks_of_more_elements_than_32_bits_count(name: str, monkeypatch):
    """Every sample, as if it were that large."""
    op = OPS[name]
    launcher = op.launcher("triton")
    monkeypatch.setattr(sys.modules[launcher.__module__], "NARROW", 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for sample in op.samples():
            assert_close_to_reference(op, sample, results(op, sample, launcher))


@pytest.mark.parametrize(
    "name", ["maxpool_index", "maxpool_index_backward", "window_points", "cam"]
)
def test_tensors_of_more_elements_than_32_bits_count(name: str, monkeypatch):
    """Some samples, as if they were that large."""
    op = OPS[name]
    launcher = op.launcher("triton")
    monkeypatch.setattr(sys.modules[launcher.__module__], "NARROW", 0)
    for sample in list(op.samples())[::4]:
        assert_close_to_reference(op, sample, results(op, sample, launcher))


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("numbers", [(64, 1, 1, 1), (2048, 8, 8, 4)], ids=str)
def test_any_configuration_gives_the_same_results(kernel: str, numbers: tuple[int, ...]):
    op = OPS[tuning.OP_OF[kernel]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = [sample for sample in op.samples() if op.moved(*sample.args) < 50_000]
    sample = max(small, key=lambda one: op.moved(*one.args))
    with tuning.using(kernel, Configuration(*numbers)), poisoned():
        got = results(op, sample, op.launcher("triton"))
    assert_close_to_reference(op, sample, got)


def test_tuning_judges_every_candidate_by_the_reference(monkeypatch):
    """A kernel that leaves out what its first tile does not hold is right in large tiles only."""
    op = OPS["line_points"]
    sample = list(op.samples())[2]
    numel = sample.args[0][0].numel()
    launcher = op.launcher("triton")

    def first_tile(x, *others):
        out = launcher(x, *others)
        block = TABLE["points.line"].at(4).elements
        out.flatten(1)[:, block:] = float("nan")
        return out

    monkeypatch.setattr(sys.modules[launcher.__module__], "line_points", first_tile)
    monkeypatch.setattr(tuning, "spilling", lambda *_: "")
    monkeypatch.setattr(tuning, "call_for", lambda *_: Call(op, sample.note, sample.args))
    sizes = [Configuration(2**n) for n in (1, 3, 8, 9)]
    monkeypatch.setattr(tuning, "candidates", lambda *_: sizes)
    timed = []

    def timer(functions):
        timed.extend(functions)
        return {name: 1.0 + number for number, name in enumerate(functions)}

    rows = tuning.tune("points.line", 4, "sm_90", "cpu", timer)
    right = [one.elements >= numel for one in sizes]
    assert [not row["refused"] for row in rows] == right
    assert set(right) == {True, False}
    assert timed == [row["label"] for row, ok in zip(rows, right, strict=True) if ok] + ["copy"]
    assert tuning.winner(rows) is rows[right.index(True)]


OUTSIDE, TWICE = "outside of the tensor", "stored twice"
LOADED, ATOMIC = "loads what another one stores", "changes by an atomic"
FAULTS = [
    ("line_points", "points", "inside = at < numel", "inside = at <= numel", OUTSIDE),
    ("line_points", "points", "(example % baselines) * numel", "example * numel", OUTSIDE),
    ("line_points", "points", "out + row * numel + at, point", "out + at, point", TWICE),
    ("noise_points", "points", "(at >= 0) & (at < numel)", "at < numel", OUTSIDE),
    ("accumulate", "accumulate", "slot + row, mask=row < rows", "slot + row, mask=rows > 0",
     OUTSIDE),
    ("accumulate", "accumulate", "total + mine * wide + at, kept", "total + at, kept", LOADED),
    ("accumulate_moments", "accumulate", "tl.load(before + mine)", "tl.load(count + mine)", LOADED),
    ("finish", "finish", "program // slots, tl.sum", "0, tl.sum", TWICE),
    ("magnitude_percentile", "overlay", "mask=inside, other=0) &", "mask=at >= 0, other=0) &",
     OUTSIDE),
    ("magnitude_percentile", "overlay", "tl.atomic_add(place, found.to(tl.int64), mask=found > 0,"
     ' sem="relaxed")', "tl.store(place, tl.load(place) + found)", LOADED),
    ("magnitude_percentile", "overlay", "    place =", "    tl.load(counts + digit)\n    place =",
     ATOMIC),
    ("relu_mask", "masks", "value.to(y.dtype.element_ty), mask=inside)",
     "value.to(y.dtype.element_ty))", OUTSIDE),
    ("window_points", "windows", "inside = at < numel", "inside = at <= numel", OUTSIDE),
    ("maxpool_index", "pools", "values + at, best", "values + at + 1, best", OUTSIDE),
]  # fmt: skip
"""(op, file, what stands there, what it becomes, what is found)."""


@pytest.mark.parametrize(("name", "file", "old", "new", "what"), FAULTS, ids=range(len(FAULTS)))
def test_planted_faults_are_found(name, file, old, new, what, checked_addresses: Guard, tmp_path):
    launcher = getattr(mutant(file, old, new, tmp_path), name)
    op, guard = OPS[name], checked_addresses
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = [one for one in op.samples() if op.moved(*one.args) < 500_000]
    for sample in samples:
        results(op, sample, launcher)
        if guard.found:
            break
    found, guard.found = guard.found, []
    assert any(what in line for line in found), found


@triton.jit
def _misused(x, out, n, KIND: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    if KIND == "read of a neighbour":
        at += tl.program_id(0) * BLOCK
        near = tl.load(out + at + 1, mask=at + 1 < n)
        tl.store(out + at, near, mask=at < n)
    elif KIND == "equal values":
        tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)
    elif KIND == "another argument":
        tl.store(x + at + n, tl.load(x + at, mask=at < n), mask=at < n)
    elif KIND == "duplicates":
        tl.store(out + at // 2, tl.load(x + at, mask=at < n), mask=at < n)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("read of a neighbour", LOADED),
        ("equal values", ""),
        ("another argument", OUTSIDE),
        ("duplicates", TWICE),
    ],
)
def test_misuse_of_memory_is_found(kind: str, what: str, checked_addresses: Guard):
    memory = torch.arange(128.0)
    _misused[2,](memory[:60], memory[60:120], 60, KIND=kind, BLOCK=32)
    found, checked_addresses.found = checked_addresses.found, []
    assert {what in line for line in found} == ({True} if what else set()), found
