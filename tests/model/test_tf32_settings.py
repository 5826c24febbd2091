"""The user's TF32 settings, by PyTorch's older and newer switches, come back after a launch."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = (
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "backends.cuda.matmul.allow_tf32 = True",
    "backends.cudnn.allow_tf32 = False",
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'bf16'",
    "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.cuda.matmul.fp32_precision = 'ieee'",
    "backends.cudnn.fp32_precision = 'tf32'",
    "backends.cudnn.fp32_precision = 'ieee'",
    "backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "backends.cuda.matmul.fp32_precision = 'tf32'; backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'ieee'; backends.cudnn.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('high'); backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('high'); backends.cudnn.allow_tf32 = False",
)
INHERITING = [one for one in SETTINGS if one.startswith(("backends.fp32", "backends.cudnn.fp32"))]
"""What is set for all operators: those that inherit it go on to do so."""
SCRIPT = """
import sys
import torch
from torch import backends
from saliency_fast.engine.differentiable import _twice
from saliency_fast.graph.passes.half import FLOAT32, PRECISIONS, arithmetic, tf32_as_set, users_tf32

get, gpu = torch._C._get_fp32_precision_getter, torch.device("cuda")
of_gpu = [("cuda", one) for one in ("matmul", "conv", "rnn")]
older = (
    lambda: backends.cuda.matmul.allow_tf32,
    lambda: backends.cudnn.allow_tf32,
    torch.get_float32_matmul_precision,
)

def state():
    found = [get(*one) for one in (("generic", "all"), ("cuda", "all"), *of_gpu)]
    found += [get("mkldnn", one) for one in ("all", "matmul", "conv")]
    for one in older:
        try:
            found.append(one())
        except RuntimeError:
            found.append("raises")
    return [*found, backends.cudnn.benchmark, backends.cudnn.enabled]

def launches():
    before = state()
    for name in ("float32", "tf32", "float16"):
        with arithmetic(PRECISIONS[name], gpu), arithmetic(PRECISIONS[name], gpu):
            inside = [get(*one) == "tf32" for one in of_gpu]
            on_cpu = [get("mkldnn", one) for one in ("all", "matmul", "conv")]
            benchmark = backends.cudnn.benchmark
        assert inside == [name == "tf32"] * 3, (name, inside)
        # Other threads may compute on CPUs; cuDNN's choice by time is the user's.
        assert on_cpu == before[5:8] and benchmark == before[-2]
        assert state() == before, (name, before, state())
    with tf32_as_set(), arithmetic(FLOAT32, gpu):
        assert state() == before
        assert users_tf32() == tuple(before[2:5])
    assert users_tf32() == ()
    with _twice():
        assert not backends.cudnn.enabled
    assert state() == before, (before, state())

for benchmark in (False, True):
    backends.cudnn.benchmark = benchmark
    exec(sys.argv[1])
    if sys.argv[2] != "none":
        launches()
for value in ("ieee", "tf32", "none"):
    for module in (backends, backends.cudnn):
        module.fp32_precision = value
        print(state())
"""


def run(setting: str, wanted: str) -> str:
    """What a process prints that has these settings, after launches of ours or none."""
    told = [sys.executable, "-W", "ignore", "-c", SCRIPT, setting, wanted]
    made = subprocess.run(told, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-800:]
    return made.stdout


# Every process loads PyTorch anew, for three seconds.
QUICK = ("torch.set_float32_matmul_precision('medium')", SETTINGS[-3])


@pytest.mark.parametrize(
    "setting",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in SETTINGS],
)
def test_settings_are_kept(setting: str) -> None:
    found = run(setting, "launches")
    if setting in INHERITING:
        assert found == run(setting, "none")
