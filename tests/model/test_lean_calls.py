"""Every lean version of a call against autograd's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from saliency_fast.graph.autograd import LEAN
from saliency_fast.graph.intercept import Calls
from saliency_fast.model.executors import EagerExecutor
from tests.model.lean_cases import CASES, made
from tests.model.ways import check, compare, executors, take
from tests.models import randn
from tests.traces import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize("name", CASES)
def test_against_autograd(name: str) -> None:
    case = CASES[name]
    taken = check(case.model, case.points())
    for executor, one in taken.items():
        if executor == "plain":
            continue
        mine = {node.removesuffix("Backward") for node in one.nodes if node[0] == "_"}
        assert case.node is None or case.node in mine, f"{executor}: {sorted(one.nodes)}"
        if case.kept is not None:
            promised = case.kept(case.points(), one.outputs[0])
            assert one.kept == promised, executor


def test_every_lean_version_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    served = set()
    for call, lean in LEAN.items():

        def counted(*args: Any, _call: Any = call, _lean: Any = lean, **named: Any) -> Any:
            found = _lean(*args, **named)
            if found is not NotImplemented:
                served.add(_call)
            return found

        monkeypatch.setitem(LEAN, call, counted)
    for case in CASES.values():
        point = case.points().requires_grad_().clone()
        with Calls():
            case.model(point)
    # In float64 they are PyTorch's own: see test_group_norms.py.
    served |= {torch.instance_norm, torch.group_norm}
    missing = [str(call) for call in LEAN if call not in served]
    assert not missing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(4, 5, 3, 2, 1),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.LeakyReLU(0.25),
        nn.Hardtanh(),
        nn.PReLU(4),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d(3),
        nn.ReflectionPad2d(1),
        nn.RMSNorm(10),
    ],
    ids=lambda model: type(model).__name__,
)
def test_other_types(model: nn.Module, dtype: torch.dtype) -> None:
    """As autograd's own in the same type, to a few roundings."""
    model = made(lambda: copy.deepcopy(model)).to(dtype)
    check(model, randn(3, 4, 9, 10, seed=4).to(dtype), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["conv2d stride 2 padding 1", "relu 4-d", "max_pool2d {} ties"])
def test_the_comparison_fails_where_it_should(name: str) -> None:
    case = CASES[name]
    x = case.points()
    expected = take(EagerExecutor(case.model), x)
    for executor in executors(case.model, x).values():
        found = take(executor, x)
        found.gradient[0, 0, 0, 0] += 1e-9
        with pytest.raises(AssertionError, match="gradient: off by"):
            compare(found, expected, 1e-12)
        found.gradient[0, 0, 0, 0] = torch.nan
        with pytest.raises(AssertionError, match="gradient: off by"):
            compare(found, expected, 1e-12)
