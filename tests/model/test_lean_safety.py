"""Memory-efficient executors in threads, many calls, callers' modes, and when things go wrong."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.memory import resident_bytes
from saliency_fast.errors import ModelError
from tests import models
from tests.model.answers import METHODS, always_lean, check, explain, way_of, why
from tests.model.lean_models import CASES, Case, Net, seeded
from tests.models import make, randn
from tests.traces import Notes, unchanged

X = randn(3, 2, 6, 6, seed=3)
LINE, NOISE = METHODS


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


@pytest.fixture(autouse=True)
def _no_saved_tensor_hooks():
    yield
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def branching(m: Net, x: Tensor) -> Tensor:
    return m.first(x) if x.sum() > -1e9 else x


def plainly(m: Net, x: Tensor) -> Tensor:
    return m.relu(m.norm(m.first(x)))


BY_WAY = {
    "program": lambda: seeded(lambda: Net(plainly)),
    "watched": lambda: seeded(lambda: Net(branching)),
    "off": CASES["gradient inside"].make,
}
every_way = pytest.mark.parametrize("way", BY_WAY)


@every_way
def test_threads(way: str) -> None:
    """8 threads, 2 engines on one model, 200 calls; the first ones probe at the same time."""
    model, methods = BY_WAY[way]().train(), (LINE, NOISE)
    inputs = [randn(rows, 2, side, 6, seed=rows) for rows in (1, 2, 3) for side in (5, 6)]
    alone = [[sf.Engine(model, one, hashes=False)(x, 1).values for x in inputs] for one in methods]
    shared = BY_WAY[way]().train()
    engines = [sf.Engine(shared, one, hashes=False) for one in methods]
    begin = threading.Barrier(8)

    def work(number: int) -> list[bool]:
        begin.wait()
        found = []
        for call in range(number, 200 if way == "program" else 80, 8):
            method, which = call % 2, call // 2 % len(inputs)
            values = engines[method](inputs[which], 1).values
            found.append(torch.equal(values, alone[method][which]))
        return found

    with unchanged(shared, *inputs), ThreadPoolExecutor(8) as pool:
        assert all(all(found) for found in pool.map(work, range(8)))
    assert way_of(engines[0]) == way, why(engines[0])


def live_tensors() -> int:
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


@every_way
def test_nothing_is_left_of_a_call(way: str) -> None:
    """No tensor stays when the call is over and its garbage is collected."""
    model = BY_WAY[way]()
    engines = [sf.Engine(model, method, hashes=False) for method in METHODS]

    def calls() -> None:
        for engine in engines:
            engine.plan(X, 1)
            engine(X, 1)

    calls()  # what PyTorch sets up once
    for engine in engines:
        engine._location.cache.clear()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(2):
            calls()
        gc.collect()
        assert live_tensors() == before
    finally:
        gc.enable()
    assert way_of(engines[0]) == way, why(engines[0])


REFUSED = [name for name, one in CASES.items() if one.way == "watched"]


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_left_of_a_refusal(name: str) -> None:
    case = CASES[name]
    engine = sf.Engine(case.make(), NOISE, hashes=False, points_per_launch=1)
    gc.disable()
    try:
        seen = []
        for _ in range(3):
            engine._location.cache.clear()
            explain(engine, case)
            gc.collect()
            seen.append(live_tensors())
        assert seen[1] == seen[2]
    finally:
        gc.enable()


def test_memory_does_not_grow() -> None:
    """Of 500 calls by every way, with changes of the model between them."""
    built = [BY_WAY["program"](), BY_WAY["program"](), BY_WAY["watched"](), BY_WAY["off"]()]
    engines = [sf.Engine(model, sf.Gradient(), hashes=False) for model in built]
    engines.append(sf.Engine(built[0], sf.SmoothGrad(samples=4), hashes=False))
    big = [randn(2, 2, 48, 48), X]

    def calls(count: int) -> tuple[int, int]:
        for number in range(count):
            engine = engines[number % len(engines)]
            engine(big[number % 2], 1)
            if number % 20 == 0:
                built[1].norm.eps = 1e-5 * (1 + number % 40)
        gc.collect()
        return live_tensors(), sum(len(engine._location.cache) for engine in engines)

    before, resident = calls(60), resident_bytes()[0]
    assert calls(500) == before
    # A point that stays behind from each call would be 18 MiB.
    assert resident_bytes()[0] - resident < 6 * 2**20


@every_way
def test_models_are_let_go_of(way: str) -> None:
    freed: list[int] = []
    model = BY_WAY[way]()
    engine = sf.Engine(model, LINE)
    engine(X, 1)
    torch.utils.weak.weakref.finalize(model, freed.append, 1)
    del model, engine
    gc.collect()
    assert freed


class LaunchError(Exception): ...


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise LaunchError


class Failing(nn.Module):
    """Fails in its `at`-th forward pass, or in the backward pass of that."""

    def __init__(self, body: nn.Module, at: int, error: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.at, self.error, self.notes = body, at, error, Notes(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.notes.calls += 1
        y = self.body(x)
        return self.error(y) if self.notes.calls == self.at else y


def raised(error: BaseException) -> Callable[[Tensor], Any]:
    def fail(_: Tensor) -> Any:
        raise error

    return fail


FAILURES = {
    "exception": raised(LaunchError()),
    "interrupt": raised(KeyboardInterrupt()),
    "wrong shape": lambda y: y @ y,
    "in backward": FailsBackward.apply,
}


@every_way
@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failure(way: str, failure: str) -> None:
    """In whichever pass: recorded, with two rows, memory-efficient, or in a launch."""
    model = Failing(BY_WAY[way]().train(), 0, FAILURES[failure])
    engine = sf.Engine(model, NOISE, points_per_launch=2, hashes=False)
    expected, passes, failed = engine(X, 1).values, model.notes.calls, 0
    assert passes >= (2 if way == "program" else 8)
    for model.at in range(1, passes + 1):
        model.notes.calls = 0
        engine._location.cache.clear()
        with unchanged(model, X):
            try:
                engine(X, 1)
            except (LaunchError, KeyboardInterrupt, RuntimeError):
                failed += 1
    # Failures of a memory-efficient executor alone, and of no backward pass, do not come through.
    assert failed >= 1
    model.at = 0
    torch.testing.assert_close(engine(X, 1).values, expected, rtol=1e-12, atol=1e-15)


def test_a_launch_of_a_program_that_fails() -> None:
    """PyTorch's own calls fail for some points, and the model's Python does not run any more."""

    def body(m: Net, x: Tensor) -> Tensor:
        size = x.square().mean((1, 2, 3))[:, None, None]
        return torch.linalg.cholesky(torch.eye(4, dtype=x.dtype) * (1 - size)).unsqueeze(3)

    model = seeded(lambda: Net(body)).train()
    engine = sf.Engine(model, LINE, points_per_launch=1)
    small = X / X.abs().max()
    check(engine, Case(lambda: model, inputs=(small,)))
    assert way_of(engine) == "program", why(engine)
    with unchanged(model, X), pytest.raises(ModelError, match="LinAlgError"):
        engine(3 * X, 1)
    check(engine, Case(lambda: model, inputs=(small,)))


def rows_or_failure(most: int, error: Exception) -> Callable[[Net, Tensor], Tensor]:
    def body(m: Net, x: Tensor) -> Tensor:
        if len(x) > most:
            raise error
        return plainly(m, x)

    return body


TWO_ROWS = {
    "not written for them": ValueError("one row alone"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
}


@pytest.mark.parametrize("error", TWO_ROWS.values(), ids=TWO_ROWS)
def test_a_model_that_takes_one_row(error: Exception) -> None:
    model = seeded(lambda: Net(rows_or_failure(1, error)))
    engine = sf.Engine(model, LINE, points_per_launch=1)
    check(engine, Case(lambda: model, inputs=(X[:1],)))
    assert way_of(engine) == "watched", why(engine)


def late_shape(m: Net, x: Tensor) -> Tensor:
    """A size from a number, by a way that no recording sees."""
    length = torch.arange(1, (x.detach().abs().amax() > 50.0) + 2)
    return m.first(x) * length.shape[0]


SECOND = X * torch.tensor([1.0, 1000.0, 1.0], dtype=X.dtype)[:, None, None, None]
"""The first and the last example are looked at before a way serves; the second is not."""


def test_what_shows_only_in_a_launch() -> None:
    """The call turns to the model as it is, and later calls begin there."""
    model = seeded(lambda: Net(late_shape))
    engine = sf.Engine(model, LINE, points_per_launch=1, hashes=False)
    check(engine, Case(lambda: model, inputs=(SECOND,)))
    *_, last = engine.stream(SECOND, 1)
    assert last.provenance.strategy.startswith("off")
    assert torch.equal(last.values, engine(SECOND, 1).values)


def test_what_shows_only_in_a_launch_of_a_stream() -> None:
    model = seeded(lambda: Net(late_shape))
    engine = sf.Engine(model, LINE, points_per_launch=1)
    with unchanged(model, SECOND):
        *_, last = engine.stream(SECOND, 1)
    plain = sf.Engine(model, LINE, points_per_launch=1, lean=False)
    assert torch.equal(last.values, plain(SECOND, 1).values)
    assert last.provenance.strategy.startswith("off")


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad off": lambda: torch.autograd.grad_mode.set_grad_enabled(False),
    "hooks": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("mode", MODES)
@every_way
def test_under_the_callers_modes(way: str, mode: str) -> None:
    model = BY_WAY[way]()
    expected = sf.Engine(model, LINE)(X, 1).values
    engine = sf.Engine(model, LINE)
    engine._location.cache.clear()
    with MODES[mode]():
        inside = X + 0.0
        with unchanged(model, inside):
            found = engine(inside, 1).values
    assert torch.equal(found, expected)
    assert way_of(engine) == way, why(engine)


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
def test_a_model_that_draws(method: Any) -> None:
    """The same numbers in the same order, and the caller's generator as it was."""
    model = seeded(lambda: Net(lambda m, x: m.first(x) * (1 + torch.rand_like(x).mean())))
    lean, plain = (sf.Engine(model, method, lean=one, hashes=False) for one in (True, False))
    with unchanged(model, X):
        found = lean(X, 1).values
        assert way_of(lean) in ("watched", "off"), why(lean)
        torch.testing.assert_close(found, plain(X, 1).values, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", models.SHAPES)
@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
def test_float32(kind: type[nn.Module], method: Any) -> None:
    model, x = make(kind).float(), randn(3, *models.SHAPES[kind]).float()
    lean, plain = (sf.Engine(model, method, lean=one) for one in (True, False))
    target = (0,) if kind is models.Segmenter else 1
    found = lean(x, target)
    assert way_of(lean) == "program", why(lean)
    expected = plain(x, target)
    gap = (found.values - expected.values).norm() / expected.values.norm()
    assert gap < 1e-5


class Keeping(nn.Module):
    """Keeps a table that it made of a weight, with its graph, as timm's LeViT and TinyViT do; or
    numbers of the points, made in another thread.
    """

    def __init__(self, threaded: bool = False) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.weight, self.kept = nn.Parameter(torch.rand(4, 1, 1)), dict[str, Tensor]()
        self.threaded = threaded

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = 2 * self.weight
        table = self.kept["table"]
        if self.threaded:
            # A new thread's nodes are numbered from zero on.
            with ThreadPoolExecutor(1) as pool:
                table = table * pool.submit(lambda: x.square().mean((1, 2, 3)) + 1).result().view(
                    -1, 1, 1, 1
                )
        return self.head((self.first(x).tanh() * table).sigmoid().mean((2, 3)))


def test_a_table_that_an_earlier_run_has_left_is_a_constant() -> None:
    model = seeded(Keeping)
    model(X)
    lean, plain = (sf.Engine(model, LINE, lean=one, hashes=False) for one in (True, False))
    found = lean(X, 1).values
    assert way_of(lean) == "program", why(lean)
    torch.testing.assert_close(found, plain(X, 1).values, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        model.weight.mul_(1.5)
    model.kept.clear()
    torch.testing.assert_close(lean(X, 1).values, plain(X, 1).values, rtol=1e-9, atol=1e-12)


def test_what_a_thread_made_of_the_points_is_no_constant() -> None:
    model = seeded(lambda: Keeping(threaded=True))
    model(X)
    lean, plain = (sf.Engine(model, LINE, lean=one, hashes=False) for one in (True, False))
    found = lean(X, 1).values
    assert "outside of PyTorch's own calls" in why(lean)
    torch.testing.assert_close(found, plain(X, 1).values, rtol=1e-9, atol=1e-12)
