"""On a GPU: recorded launches, precisions and shared launches give the answers of plain ones."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import saliency_fast as sf
from saliency_fast.engine import captured
from saliency_fast.engine import cudagraph as graphs
from tests.models import Image, Tabular, Tokens, Video
from tests.service.asking import METHODS, alone, asked, same, seeded

if not torch.cuda.is_available():
    pytest.skip("torch.cuda.is_available() is False: no GPU here", allow_module_level=True)

KINDS: list[Any] = [(Tabular, 7), (Image, 3, 9, 9), (Video, 2, 5, 6, 6), (Tokens, 6, 8)]
CLOSE = {"tf32": 0.02, "float16": 0.02, "bfloat16": 0.1}


def on_gpu(kind: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, torch.Tensor]:
    net, x = seeded(*kind, dtype=dtype)
    return net.cuda(), x.cuda()


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("method", METHODS, ids=lambda one: f"{one.name}-{one.recipe().count}")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0].__name__)
def test_recorded_launches(kind: Any, method: Any, limit: int | None):
    net, x = on_gpu(kind)
    engine = sf.Engine(net, method, points_per_launch=limit)
    plain = sf.Engine(net, method, points_per_launch=limit, graphs=False)
    for start in range(3):
        one, target = x[start : start + 2], [start, 4 - start]
        same(engine(one, target), plain(one, target), 1e-8)
    found = [one for probe in engine._location.cache.values() for one in probe.captures.values()]
    assert found
    assert all(isinstance(one, captured.CapturedEvaluation) for one in found), found


def test_weights_that_change():
    net, x = on_gpu(KINDS[1])
    engine = sf.Engine(net, sf.IntegratedGradients(6))
    for change in (lambda: None, lambda: net[4].weight.data.mul_(-1.5), lambda: net.double()):
        change()
        same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(6), graphs=False)(x[:2], 1))
    net[4].weight.data = net[4].weight.data * 2
    same(engine(x[:2], 1), sf.Engine(net, sf.IntegratedGradients(6), graphs=False)(x[:2], 1))


@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0].__name__)
def test_precisions(kind: Any, name: str):
    net, x = on_gpu(kind, torch.float32)
    for method in (sf.IntegratedGradients(12, "midpoint"), sf.SmoothGrad(8), sf.VarGrad(8)):
        expected = sf.explain(copy.deepcopy(net).double(), x[:3].double(), target=1, method=method)
        found = sf.explain(net, x[:3], target=1, method=method, precision=name)
        gap = float((found.values - expected.values).norm() / expected.values.norm())
        assert gap < CLOSE[name] * (4 if method.name == "vargrad" else 1)
        assert found.precision_error is not None


def test_float32_is_float32():
    """TF32 is off in it, whatever the process allows."""
    net, x = on_gpu(KINDS[1], torch.float32)
    before = torch.backends.cudnn.allow_tf32
    found = sf.explain(net, x[:3], target=1, precision="float32")
    expected = sf.explain(copy.deepcopy(net).double(), x[:3].double(), target=1)
    assert float((found.values - expected.values).norm() / expected.values.norm()) < 1e-4
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_default_costs_two_hundredths_at_most():
    net, x = on_gpu(KINDS[1], torch.float32)
    engine = sf.Engine(net, sf.IntegratedGradients(50))
    for start in range(3):
        found = engine(x[start : start + 2], 1)
        exact = sf.explain(copy.deepcopy(net).double(), x[start : start + 2].double(), target=1)
        error = (found.values - exact.values).flatten(1).norm(dim=1)
        assert float((error / exact.values.flatten(1).norm(dim=1)).max()) < 0.02
    assert any("'auto'" in note for note in engine.plan(x[:2], 1).notes)


def test_what_is_given_up_hurts_no_other():
    nets = [on_gpu(kind) for kind in KINDS[:2]]
    engines = [sf.Engine(net, sf.IntegratedGradients(6)) for net, _ in nets]
    plain = [sf.Engine(net, sf.IntegratedGradients(6), graphs=False) for net, _ in nets]
    for _ in range(2):
        for one, (_, x) in zip(engines, nets, strict=True):
            one(x[:2], 1)
    graphs.cache_of(nets[0][1].device).give_up_one()
    # What the dead graphs held is written over.
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    for one, other, (_, x) in zip(engines, plain, nets, strict=True):
        same(one(x[2:4], 2), other(x[2:4], 2), 1e-8)
    del junk


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_the_second_gpu():
    net, x = seeded(*KINDS[1])
    net, x = net.to("cuda:1"), x.to("cuda:1")
    engine = sf.Engine(net, sf.IntegratedGradients(6))
    for start in range(3):
        one = x[start : start + 2]
        same(engine(one, 1), sf.Engine(net, sf.IntegratedGradients(6), graphs=False)(one, 1), 1e-8)


def test_kinds_of_two_threads_on_their_streams():
    net, x = on_gpu(KINDS[1])
    methods = [sf.IntegratedGradients(6), sf.SmoothGrad(6, seed=(1, 2))]
    expected = [sf.Engine(net, one, graphs=False)(x[:2], 1) for one in methods]
    torch.cuda.current_stream().synchronize()

    def work(number: int) -> list[sf.Attribution]:
        engine = sf.Engine(net, methods[number])
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [engine(x[:2], 1) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        for several, one in zip(pool.map(work, range(2)), expected, strict=True):
            for found in several:
                same(found, one, 1e-8)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind[0].__name__)
def test_requests_of_sixteen_threads(kind: Any):
    net, x = on_gpu(kind)
    requests = asked(x)
    expected = alone(net, requests)
    with sf.Engine(net) as engine, ThreadPoolExecutor(16) as pool:

        def work(number: int) -> sf.Attribution:
            one = requests[number % len(requests)]
            # From streams of their own, and both ways at once.
            with torch.cuda.stream(torch.cuda.Stream()):
                if number % 3:
                    return engine.submit(**one).result(timeout=120)
                about = dict(one)
                return sf.explain(net, about.pop("inputs"), **about)

        found = list(pool.map(work, range(4 * len(requests))))
    torch.cuda.synchronize()
    for number, mine in enumerate(found):
        same(mine, expected[number % len(requests)], 1e-8)
