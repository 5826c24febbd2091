"""A call leaves no trace: not on the model, the inputs or the process, in whatever way it ends."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.model import preserve_model_state
from tests.configured import RECORDED, configure
from tests.traces import Net, one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


METHODS = (
    sf.Gradient(),
    sf.InputXGradient(),
    sf.IntegratedGradients(steps=6),
    sf.IntegratedGradients(steps=4, tolerance=1e-3, max_steps=20),
    sf.SmoothGrad(samples=6),
    sf.SmoothGradSquared(samples=6),
    sf.VarGrad(samples=6),
    sf.ExpectedGradients(samples=6),
)
NAMES = [f"{method.name}-{number}" for number, method in enumerate(METHODS)]
CPU = torch.device("cpu")
every_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def of_baselines(method: Any) -> dict[str, Any]:
    """A baseline with as many rows as the batch where the method takes one."""
    return {"baseline": image().flip(0)} if method.recipe().baseline != "none" else {}


class InPlace(nn.Module):
    """Overwrites its very input before it looks at it."""

    def __init__(self, first: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return (x * x.sin()).flatten(1)


IN_PLACE = {
    "sub_": lambda x: x.sub_(0.5),
    "relu": nn.ReLU(inplace=True),
    "slice": lambda x: x[:, 0].mul_(2.0),
    "view": lambda x: x.view(-1).add_(1.0),
    "index": lambda x: x.__setitem__((slice(None), 0), 1.0),
}


class ForwardError(Exception): ...


class BackwardError(Exception): ...


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise BackwardError


class Fails:
    """What a Net makes of its scores: they, and on the `at`-th call a failure."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls != self.at:
            return y
        if self.error is BackwardError:
            return _FailsBackward.apply(y)
        raise self.error


@every_method
def test_after_success(method: Any) -> None:
    model, x, options = Net(), image(), of_baselines(method)
    engine, classes = sf.Engine(model, method), torch.tensor([4, 0, 2])
    with unchanged(model, x, classes, *options.values()):
        engine(x, classes, **options)
        engine.plan(x, 1, **options)
        engine(x, 1, **options)
        engine(x, [[0, 1], [2, 3], [4, 0]], **options)
        engine(x, "predicted", **options)


PROBE, PROOF, ENDS, MIDDLE = 1, 3, 4, 8
"""Calls of a model in a run of three examples, two points per launch: its first point, a row alone,
scores, and gradients."""


@pytest.mark.parametrize(
    ("error", "at"),
    [
        *(
            (error, at)
            for error in (ForwardError, KeyboardInterrupt)
            for at in (PROBE, PROOF, ENDS, MIDDLE)
        ),
        (BackwardError, PROBE),
        (BackwardError, MIDDLE),
    ],
)
def test_after_a_failure(
    error: type[BaseException], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, **RECORDED)
    model, x = Net(Fails(at, error)), image()
    engine = sf.Engine(model, sf.SmoothGrad(samples=6), points_per_launch=2)
    with unchanged(model, x), pytest.raises(error):
        engine(x, 1)
    assert model.after.calls == at
    with unchanged(model, x):
        again = engine(x, 1)
    assert torch.equal(again.values, sf.Engine(Net(), engine.method)(x, 1).values)


@pytest.mark.parametrize("launches", [0, 1, 3])
def test_after_a_stream_is_closed(launches: int) -> None:
    model, x = Net(), image()
    with unchanged(model, x):
        partial = sf.Engine(model, METHODS[2], points_per_launch=2).stream(x, 1)
        for _ in range(launches):
            next(partial)
        partial.close()
    with unchanged(model, x):
        abandoned = sf.Engine(model, METHODS[2], points_per_launch=2).stream(x, 1)
        for _ in range(launches):
            next(abandoned)
        del abandoned
        gc.collect()


def test_between_the_launches_of_a_stream() -> None:
    model, x = Net(), image()
    partial = sf.Engine(model, METHODS[2], points_per_launch=4).stream(x, 1)
    while True:
        with unchanged(model, x):
            if next(partial, None) is None:
                break


@every_method
@pytest.mark.parametrize("first", IN_PLACE.values(), ids=IN_PLACE)
def test_inputs_of_models_that_work_in_place(method: Any, first: Any) -> None:
    x, options = image(), of_baselines(method)
    with unchanged(None, x, *options.values()):
        found = sf.explain(InPlace(first), x, target=5, method=method, **options)

    def apart(x: Tensor) -> Tensor:
        return InPlace(first)(x.clone())

    expected = sf.explain(apart, x, target=5, method=method, **options)
    assert torch.equal(found.values, expected.values)


@every_method
def test_inputs_that_require_grad(method: Any) -> None:
    x, model = image().requires_grad_(), Net()
    options = {name: one.requires_grad_() for name, one in of_baselines(method).items()}
    with unchanged(model, x, *options.values()):
        found = sf.explain(model, x, target=1, method=method, **options)
    assert not found.values.requires_grad
    assert not found.scores.requires_grad


@every_method
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_under_the_callers_modes(method: Any, mode: Callable[[], Any]) -> None:
    model, x, options = Net(), image(), of_baselines(method)
    expected = sf.explain(model, x, target=1, method=method, **options)
    with mode():
        # Made here, so that under inference_mode they are inference tensors.
        inside, made = x + 0.0, {name: one + 0.0 for name, one in options.items()}
        with unchanged(model, inside, *made.values()):
            found = sf.explain(model, inside, target=1, method=method, **made)
    assert torch.equal(found.values, expected.values)
    assert found.values.dtype == torch.float32


def test_targets_and_arguments_made_in_inference_mode() -> None:
    x, net = image(), Net()

    def model(x: Tensor, rows: Tensor, shared: Tensor) -> Tensor:
        return x.sin() * rows[:, None, None, None] * shared

    def call() -> sf.Attribution:
        arguments = torch.arange(3) + 0.5, torch.linspace(0, 1, 9)
        target = (slice(None), torch.linspace(0, 1, 243).view(3, 9, 9))
        return sf.explain(model, x, target=target, method="gradient", forward_args=arguments)

    expected = call()
    with torch.inference_mode():
        found = call()
        classes = sf.explain(net, x, target=torch.tensor([1, 2, 3]), method="gradient")
        with unchanged(net, x), pytest.raises(InputError):
            sf.explain(net, x, target=torch.tensor([1, 2, 9]), method="gradient")
    assert torch.equal(found.values, expected.values)
    assert torch.equal(classes.classes, torch.tensor([1, 2, 3]))


def test_a_model_that_draws_random_numbers() -> None:
    model, x = Net(lambda y: y + torch.rand_like(y) + torch.randn(())), image()
    with unchanged(model, x):
        sf.explain(model, x, target=1, method=METHODS[4])
        sf.Engine(model, METHODS[4]).plan(x, 1)
        for _ in sf.Engine(model, METHODS[4], points_per_launch=4).stream(x, 1):
            pass


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "occlusion", "conductance"])
def test_a_map_of_a_model_that_draws_says_so(method: str, lean: bool) -> None:
    class Draws(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.a, self.share = nn.Conv2d(3, 2, 3), share

        def forward(self, x: Tensor) -> Tensor:
            y = functional.dropout(self.a(x), self.share, training=self.share > 0)
            # PyTorch calls this random, and without dropout it is not.
            y = functional.scaled_dot_product_attention(y, y, y)
            return torch.tanh(y).mean((2, 3))

    options = {"at": "a"} if method == "conductance" else {}
    for share in (0.5, 0.0):
        engine = sf.Engine(Draws(share), method, lean=lean, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text, found = str(engine.plan(image(1), 1)), engine(image(1), 1)
        said = found.provenance.notes.get("draws", "")
        assert ("draws random numbers" in text) == ("draws random numbers" in said) == (share > 0)


def test_memory_does_not_grow() -> None:
    """Nor do hooks: `unchanged` counts them."""
    model, x = Net(), image(1)
    engines = [sf.Engine(model, method) for method in METHODS]

    def calls(count: int) -> int:
        for _ in range(count):
            for engine in engines:
                engine(x, 1)
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    before = calls(2)
    with unchanged(model, x):
        assert calls(300 // len(engines) + 1) <= before


def test_threads_share_a_model() -> None:
    model = Net()
    methods = (sf.IntegratedGradients(steps=5), sf.SmoothGrad(samples=5))
    engines = [sf.Engine(model, method) for method in methods]
    jobs = [(engines[n % 2], image(1 + n % 3) + n, n % 5) for n in range(100)]
    expected = [engine(x, target).values for engine, x, target in jobs]
    with unchanged(model, *(x for _, x, _ in jobs)), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: job[0](*job[1:]).values, jobs))
    for one, other in zip(found, expected, strict=True):
        # To rounding: after some calls a recording serves, in launches of other sizes.
        torch.testing.assert_close(one, other)


def test_a_call_leaves_no_cycle() -> None:
    """Model and inputs go as soon as nobody holds them, and not when cycles are collected."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        found = sf.explain(model, torch.ones(2, 4), target=1, method="gradient")
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert found.values.shape == (2, 4)


def test_a_part_of_a_model_that_is_explained_at_the_same_time() -> None:
    """The one that began first ends first; modes come back with the last."""
    model = Net()
    with unchanged(model), ExitStack() as first, ExitStack() as second:
        assert first.enter_context(preserve_model_state(model, CPU))
        assert second.enter_context(preserve_model_state(model.body, CPU))
        first.close()
        assert not any(module.training for module in model.body.modules())
        assert model.drop.training


def leave_hook(model: Net, x: Tensor) -> None:
    model.head.register_forward_pre_hook(lambda *_: None)


def leave_autocast(model: Net, x: Tensor) -> None:
    torch.set_autocast_enabled("cpu", True)


TRACES: dict[str, tuple[Callable[[Net, Tensor], object], Callable[[Net, Tensor], object]]] = {
    "training": (lambda m, x: m.drop.eval(), lambda m, x: None),
    "norm.training": (lambda m, x: m.norm.train(), lambda m, x: None),
    "head._forward_pre_hooks": (leave_hook, lambda m, x: None),
    "body.0.weight.requires_grad": (
        lambda m, x: m.body[0].weight.requires_grad_(),
        lambda m, x: None,
    ),
    "head.bias.grad": (lambda m, x: m.zero_grad(), lambda m, x: None),
    "running_mean contents": (lambda m, x: m.body[1].running_mean.add_(1), lambda m, x: None),
    "head.weight hooks": (
        lambda m, x: m.head.weight.register_hook(lambda g: g),
        lambda m, x: None,
    ),
    "attributes": (lambda m, x: setattr(m, "left", 1), lambda m, x: None),
    "tensor 0 writes": (lambda m, x: x.mul_(1.0), lambda m, x: None),
    "tensor 0.requires_grad": (lambda m, x: x.requires_grad_(), lambda m, x: None),
    "torch random state": (lambda m, x: torch.rand(1), lambda m, x: None),
    "grad mode": (
        lambda m, x: torch.set_grad_enabled(False),
        lambda m, x: torch.set_grad_enabled(True),
    ),
    "autocast": (leave_autocast, lambda m, x: torch.set_autocast_enabled("cpu", False)),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_seen(name: str) -> None:
    """The check of this file is tested: each trace that a call might leave turns it red."""
    spoil, restore = TRACES[name]
    model, x = Net(), image()
    try:
        with pytest.raises(AssertionError, match=name), unchanged(model, x):
            spoil(model, x)
    finally:
        restore(model, x)
