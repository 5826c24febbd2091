"""pytest-benchmark's entry points: every op, and the quick end-to-end settings.

    pytest benchmarks --benchmark-only          measures, grouped by op and by setting
    pytest benchmarks --benchmark-disable       runs everything once, as a smoke test

The numbers that count come from `benchmarks.ops` and `benchmarks.end_to_end`; these are tiny.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor

from benchmarks.cases import QUICK_CASES, QUICK_SETTINGS, Case
from benchmarks.contenders import ON_CPU, Setting
from benchmarks.ops import largest_call
from benchmarks.processes import Worker
from saliency_fast.ops import OPS

# Captum says at every call that it had to make its input require gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require")


@cache
def worker(case: Case, contender: str) -> Worker:
    return Worker(case.workload, case.side, contender, "cpu")


@pytest.mark.parametrize("version", ["dispatched", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: Any, name: str, version: str) -> None:
    op = OPS[name]
    args = largest_call(op).args
    benchmark.group = f"op: {name}"
    # Ops that accumulate change their own copies, over and over.
    own = tuple(value.clone() if isinstance(value, Tensor) else value for value in args)
    function = op if version == "dispatched" else op.reference
    benchmark(lambda: function(*own))


@pytest.mark.parametrize("contender", ON_CPU)
@pytest.mark.parametrize("setting", QUICK_SETTINGS, ids=lambda setting: setting.label)
@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: case.workload)
def test_end_to_end(benchmark: Any, case: Case, setting: Setting, contender: str) -> None:
    runner, batch = worker(case, contender), case.batches[-1]
    benchmark.group = f"{case.workload} batch {batch}: {setting.label}"
    runner.load(batch)
    runner.warm(setting)
    sample = benchmark(runner.run, setting, keep=batch)
    assert sample.values.shape == (batch, *runner.workload.shape)
    assert sample.values.isfinite().all()
