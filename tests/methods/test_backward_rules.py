"""Methods by backward rules through the engine: batches, records, warnings, bad fields."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.memory import Ledger, MemoryMeter
from saliency_fast.engine.strategies import Strategy
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods import make_method
from saliency_fast.rules.rectifiers import Guided
from tests.configured import RECORDED, configure
from tests.models import Multimodal, make, randn
from tests.naive import relative_l2
from tests.rules.ruled import Functional, Row, network, points

EXACT = 1e-10
PEERS: list[tuple[Any, Any]] = [
    (sf.GuidedBackprop(), captum.attr.GuidedBackprop),
    (sf.Deconvolution(), captum.attr.Deconvolution),
    (sf.DeepLift(captum=True), captum.attr.DeepLift),
    (sf.LRP("captum", 1e-9), captum.attr.LRP),
]
METHODS = [
    sf.GuidedBackprop(),
    sf.Deconvolution(),
    sf.DeepLift(),
    sf.LRP(),
    sf.LRP("epsilon_gamma_box", bounds=(-9.0, (9.0, 8.0)), layers=(("head", ("gamma", 0.5)),)),
]


def name_of(method: Any) -> str:
    return method.name if isinstance(method.name, str) else str(method)


@pytest.mark.parametrize("kind", ["mlp", "1-d", "2-d", "3-d"])
@pytest.mark.parametrize(("method", "peer"), PEERS, ids=lambda one: getattr(one, "name", ""))
def test_against_captum(kind: str, method: Any, peer: Any) -> None:
    model, x, target = network(kind), points(kind), [0, 3, 1]
    if kind == "1-d" or kind == "3-d":
        # Captum's LRP knows no such layers.
        method, peer = PEERS[2] if isinstance(method, sf.LRP) else (method, peer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peer(copy.deepcopy(model)).attribute(x.clone(), target=target).detach()
    found = sf.explain(model, x, target=target, method=method)
    assert relative_l2(found.values, expected) < EXACT
    single = sf.explain(model.float(), x.float(), target=target, method=method)
    assert relative_l2(single.values, expected) < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_batches_and_launches_make_no_difference(method: Any) -> None:
    model, x = network("residual"), points("residual", 5)
    options: dict[str, Any] = {"method": method}
    whole = sf.explain(model, x, target=1, **options)
    split = sf.explain(model, x, target=1, points_per_launch=2, **options)
    alone = sf.explain(model, x[3:4], target=1, **options)
    assert relative_l2(split.values, whole.values) < EXACT
    assert relative_l2(alone.values, whole.values[3:4]) < EXACT
    several = sf.explain(model, x, target=torch.tensor([[0, 1]] * 5), **options)
    assert several.values.shape[:2] == (5, 2)
    assert relative_l2(several.values[:, 1], whole.values) < EXACT


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_records_replay(method: Any, tmp_path: Path) -> None:
    model, x = network("residual"), points("residual")
    sf.explain(model, x, target=1, method=method).save(tmp_path / "one.safetensors")
    assert sf.replay(tmp_path / "one.safetensors", model, x)


def test_conservation() -> None:
    model, x = network("residual", bias=False), points("residual")
    found = sf.explain(model, x, target=1, method=sf.LRP("epsilon", 0.0))
    torch.testing.assert_close(found.values.flatten(1).sum(1), found.scores.flatten())


def test_deeplift_sums_to_the_difference() -> None:
    model, x, baseline = network("residual"), points("residual"), points("residual", 1, seed=1)
    found = sf.explain(model, x, target=1, method="deeplift", baseline=baseline)
    assert float(found.delta.abs().max()) < EXACT
    alone = sf.explain(model, x, target=1, method=sf.DeepLift(multiply=False), baseline=baseline)
    assert relative_l2(alone.values * (x - baseline), found.values) < EXACT


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "deeplift", "lrp"])
def test_several_inputs_and_arguments(method: str) -> None:
    model = make(Multimodal)
    inputs = randn(3, 3, 12, 12), randn(3, 7)
    scale = randn(3, seed=4)
    whole = sf.explain(model, inputs, target=1, method=method, forward_args=(scale,))
    one = sf.explain(
        model, tuple(x[2:] for x in inputs), target=1, method=method, forward_args=(scale[2:],)
    )
    for found, expected in zip(one.values, whole.values, strict=True):
        assert relative_l2(found, expected[2:]) < EXACT


def test_a_model_without_relu_is_warned_of() -> None:
    model, x = network("2-d", nn.GELU), points("2-d")
    for method in ("guided_backprop", "deconvolution"):
        with pytest.warns(UserWarning, match="these are plain gradients"):
            found = sf.explain(model, x, target=1, method=method)
        expected = sf.explain(model, x, target=1, method="gradient")
        assert relative_l2(found.values, expected.values) < EXACT


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, None])
def test_the_model_is_left_as_it_was(method: Any, stop: Any) -> None:
    calls = 0

    def act(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if stop is not None and calls > 4:
            raise stop
        return x.relu()

    model, x = network("residual", lambda: Functional(act)).train(), points("residual")
    before = copy.deepcopy(model.state_dict())
    try:
        sf.explain(model, x, target=1, method=method)
    except KeyboardInterrupt:
        assert stop is not None
    assert model.training
    assert not x.requires_grad
    for name, one in model.state_dict().items():
        assert torch.equal(one, before[name])
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_threads_share_a_model() -> None:
    model, x = network("residual"), points("residual")
    expected = {method: sf.explain(model, x, target=1, method=method).values for method in METHODS}
    wrong: list[Any] = []

    def work(method: Any) -> None:
        for _ in range(3):
            found = sf.explain(model, x, target=1, method=method).values
            if relative_l2(found, expected[method]) > EXACT:
                wrong.append(method)

    threads = [threading.Thread(target=work, args=(method,)) for method in METHODS]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("lrp", {"composite": "zplus"}, InputError, "composite must be one of epsilon, z_plus"),
        ("lrp", {"composite": "epsilon_gamma_box"}, InputError, "needs bounds"),
        ("lrp", {"epsilon": -1.0}, InputError, "epsilon must be a finite number of 0 or more"),
        ("lrp", {"layers": (("a", "b"),)}, InputError, "a rule must be one of epsilon"),
        ("lrp", {"layers": ("a",)}, InputError, "layers must be"),
        ("lrp", {"softmax": "x"}, InputError, "softmax must be one of taylor, constant"),
        ("deeplift", {"epsilon": 0.0}, InputError, "epsilon must be a positive"),
        ("deeplift", {"epsilon": "a"}, InputTypeError, "epsilon must be a number"),
        ("guided_backprop", {"rule": 1}, InputError, "has no field 'rule'"),
    ],
)
def test_bad_fields(name: str, fields: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_method(name, fields)


def test_layers_that_are_not_there() -> None:
    model, x = network("residual"), points("residual")
    with pytest.raises(InputError, match="no layer 'heed'; did you mean 'head'"):
        sf.explain(model, x, target=1, method=sf.LRP(layers=(("heed", "flat"),)))


def test_compiled_models_run_as_they_are() -> None:
    model, x = Row(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 4)).double(), points("mlp")
    compiled = torch.compile(model, backend="eager")
    for method in (sf.GuidedBackprop(), sf.LRP("epsilon"), sf.DeepLift()):
        expected = sf.explain(model, x, target=1, method=method)
        found = sf.explain(compiled, x, target=1, method=method)
        assert relative_l2(found.values, expected.values) < EXACT


class Map(nn.Module):
    """A segmentation model without biases, whose relevance is all of the score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.relu(self.inner(x)))
        return out


@pytest.mark.parametrize(
    "target",
    [
        (1, slice(2, 6), slice(None)),
        (0, 3, 4),
        torch.ones(6, 7, dtype=torch.bool),
        lambda out: out[:, 1].sum((1, 2)) - out[:, 0].mean((1, 2)),
    ],
    ids=["slices", "place", "mask", "difference"],
)
def test_relevance_of_many_outputs_is_what_the_score_owes_to_each(target: Any) -> None:
    model, x = Map(), torch.randn(2, 2, 6, 7, dtype=torch.float64)
    if isinstance(target, Tensor):
        target = (1, target)
    found = sf.explain(model, x, target=target, method=sf.LRP("epsilon", epsilon=1e-12))
    torch.testing.assert_close(found.values.flatten(1).sum(1), found.scores, rtol=1e-9, atol=1e-12)
    # Without biases the epsilon rule of a ReLU network is input x gradient.
    expected = sf.explain(model, x, target=target, method="input_x_gradient")
    assert relative_l2(found.values, expected.values) < 1e-9


def test_a_strategy_with_a_profiler_is_the_same_strategy() -> None:
    """All but the programs, which tell which call is running."""
    strategy = Strategy(intercepted=True, offloaded=True, rules=Guided(), copies=False)
    profiled = strategy.with_profiler(Ledger(MemoryMeter()))
    for one in fields(Strategy):
        assert getattr(profiled, one.name) == getattr(strategy, one.name), one.name


def test_plans_measure_a_point_under_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """References double what DeepLIFT keeps; rectifiers under a rule keep a bit of each number."""
    configure(monkeypatch, **RECORDED)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(8))).eval()
    model.append(nn.Flatten())
    x = torch.randn(1, 4, 64, 64)

    def kept(method: str) -> int:
        return sf.Engine(model, method, lean=False).plan(x, 0).saved_after

    plain = kept("gradient")
    assert kept("deeplift") > 1.5 * plain
    assert kept("guided_backprop") < 0.2 * plain
    # Layers keep what they divide by, beside what autograd keeps.
    assert kept("lrp") > plain
    for method in ("deeplift", "guided_backprop", "lrp"):
        plan = sf.Engine(model, method).plan(x, 0)
        assert "under" in plan.lean, "the plan must be that of the model under its rules"
        assert f"strategy   {plan.lean}" in str(plan)
