"""compile=True: torch.compile's kernels of the user's model, which stays as it is."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo

import saliency_fast as sf
from saliency_fast.errors import InputError
from tests.models import Image

GRAPHS: list[Any] = []
"""What was compiled."""


@pytest.fixture
def compiled(monkeypatch) -> list[Any]:
    """What was handed to torch.compile, which a compiler of no kernels takes apart."""
    found: list[Any] = []
    compile = torch.compile

    def counted(graph: Any, inputs: Any) -> Any:
        GRAPHS.append(graph)
        return graph.forward

    def noted(model: Any, **options: Any) -> Any:
        found.append(model)
        return compile(model, backend=counted, **options)

    GRAPHS.clear()
    torch._dynamo.reset()

    monkeypatch.setattr(torch, "compile", noted)
    return found


@pytest.mark.parametrize("method", [sf.IntegratedGradients(6), sf.SmoothGrad(5)])
def test_same_maps(compiled, method):
    torch.manual_seed(0)
    net, x = Image().train(), torch.randn(3, 3, 9, 9)
    expected = sf.explain(net, x, target=1, method=method)
    forward = net.forward
    engine = sf.Engine(net, method, compile=True, points_per_launch=4)
    found = engine(x, 1)
    assert compiled == [net]
    assert GRAPHS
    assert engine.model is net
    assert net.forward == forward
    assert net.training
    assert "forward" not in vars(net)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
    assert found.provenance.strategy == "off"
    assert found.provenance.weights_sha256 == expected.provenance.weights_sha256
    assert engine.explain_many([{"inputs": x, "target": 1}])[0].values.shape == x.shape
    engine.close()


@pytest.mark.parametrize("wanted", [False, "auto"])
def test_is_off_unless_asked_for(compiled, wanted):
    net, x = Image().eval(), torch.randn(1, 3, 9, 9)
    sf.Engine(net, compile=wanted)(x, 1)
    assert compiled == []


def test_a_model_that_the_user_compiled_stays_compiled(compiled):
    x = torch.randn(1, 3, 9, 9)
    for lean in (False, True):
        torch._dynamo.reset()
        GRAPHS.clear()
        net = torch.compile(Image().eval())
        sf.explain(net, x, target=1, lean=lean)
        net(torch.randn(5, 3, 9, 9))
        assert GRAPHS, "the model was given up"


def test_bad_input():
    with pytest.raises(InputError, match="compile must be True, False or 'auto': got 'max'"):
        sf.Engine(Image(), compile="max")


def test_threads_that_probe_leave_no_stance(compiled):
    from torch._dynamo.eval_frame import _stance

    before = _stance.stance
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        for turn in range(4):
            net, x = Image().eval(), torch.randn(1, 3, 9 + number % 3, 9)
            barrier.wait()
            sf.explain(net, x, target=turn)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    from torch._dynamo.eval_frame import _stance as after

    assert after.stance == before == "default"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inside_of_a_compiled_function():
    net, x = Image().eval(), torch.randn(2, 3, 9, 9)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return sf.explain(net, x * 2, target=1).values

    torch.testing.assert_close(doubled(x), sf.explain(net, x * 2, target=1).values)
