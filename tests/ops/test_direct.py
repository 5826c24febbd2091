"""The direct convolution of few channels: its rounding, its bands, and what is no number."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saliency_fast import ops
from saliency_fast.graph.autograd.winograd import built
from tests.models import randn

native = pytest.mark.skipif(not built(), reason="the C++ loops do not run here")
POOL = (3, 3, 2, 2, 1, 1)


def layer(channels: int, side: tuple[int, int], results: int = 32, rows: int = 2) -> list[Tensor]:
    x = randn(rows, channels, *side, seed=channels).float()
    weight = randn(results, channels, 3, 3, seed=1).float() / 3
    return [x, weight, randn(results, seed=2).float()]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [(9, 11), (300, 260), (5, 1000)])
@pytest.mark.parametrize("pool", [(), POOL])
def test_errs_as_a_sum_of_few_products(channels: int, side: tuple[int, int], pool: Any) -> None:
    x, weight, bias = layer(channels, side)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    want = F.max_pool2d(want, 3, 2, 1) if pool else want
    # A rounding for each of the products and the bias, which do not all go the same way.
    found = ops.direct(x, weight, bias, [1, 1], [1, 1], True, pool)
    assert relative(found, want) <= (9 * channels + 1) ** 0.5 * 2**-24


def test_an_image_does_not_depend_on_its_launch() -> None:
    x, weight, bias = layer(3, (37, 41), rows=11)
    about = ([2, 1], [1, 1], False, POOL)
    whole = ops.direct(x, weight, bias, *about)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 11)):
        assert torch.equal(ops.direct(x[rows], weight, bias, *about), whole[rows])


@pytest.mark.parametrize("pool", [(), (2, 2, 2, 2, 0, 0), POOL])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_stays_where_pytorch_has_it(value: float, pool: Any) -> None:
    x, weight, bias = layer(1, (12, 13))
    x[1, 0, 5, 6] = value
    want = F.conv2d(x, weight, bias, padding=1).relu()
    want = F.max_pool2d(want, pool[:2], pool[2:4], pool[4:]) if pool else want
    found = ops.direct(x, weight, bias, [1, 1], [1, 1], True, pool)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf())
    assert not found[0].isnan().any()


NARROW = """
import sys, torch, saliency_fast.ops as ops
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
torch.save([ops.direct(*args) for args in torch.load(sys.argv[1])], sys.argv[2])
"""


@native
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the narrow version is this one"
)
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    cases = [
        (*layer(channels, (23, 30), results), [stride, 1], [0, 1], True, list(pool))
        for channels, results, stride, pool in ((1, 16, 1, POOL), (3, 80, 2, ()), (4, 112, 1, POOL))
    ]
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    torch.save(cases, given)
    variables = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run(
        [sys.executable, "-c", NARROW, str(given), str(found)], env=variables, check=True
    )
    for args, narrow in zip(cases, torch.load(found), strict=True):
        assert torch.equal(narrow, ops.direct(*args))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(2, 5, 8, 8)}, "must be"),
        ({0: torch.zeros(2, 3, 8, 8).double()}, "must be float32"),
        ({1: torch.zeros(20, 3, 3, 3)}, "multiple of 16"),
        ({2: torch.zeros(8)}, "bias must be"),
        ({3: [0, 1]}, "stride and padding"),
        ({4: [1]}, "stride and padding"),
        ({6: [2, 2]}, "pool must be empty"),
        ({6: [2, 2, 2, 2, 2, 2]}, "at most half a window"),
        ({0: torch.zeros(2, 3, 1, 1), 4: [0, 0]}, "no window of"),
        ({6: [9, 9, 1, 1, 0, 0]}, "no window of"),
    ],
)
def test_wrong_arguments(changed: dict[int, Any], message: str) -> None:
    args: list[Any] = [*layer(3, (8, 8)), [1, 1], [1, 1], True, []]
    for place, value in changed.items():
        args[place] = value
    for version in (ops.direct, ops.direct.reference):
        with pytest.raises(ValueError, match=message):
            version(*args)
