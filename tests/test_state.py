"""What a model changes of itself while it is explained is as it was afterwards, in whatever way a
call ends, or a warning names it.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import captum
from saliency_fast.model import preserve
from tests.traces import one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Changing(nn.Module):
    """A network whose forward pass changes the module by `change(module, x)`."""

    def __init__(self, change: Callable[[Changing, Tensor], object]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.last: Any = None
        self.calls, self.seen = 0, [0]
        self.cache: dict[Any, Any] = {"a": [1, 2], 0: torch.zeros(2)}
        self.sizes: set[int] = {7}
        self.recent: deque[Any] = deque([1], maxlen=2)
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.history = torch.zeros(4, 6)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return self.body(x)


def moving(m: Changing, x: Tensor) -> None:
    m.average = 0.9 * m.average + 0.1 * x.detach().mean(0)


def in_place(m: Changing, x: Tensor) -> None:
    with torch.no_grad():
        m.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        m.steps += len(x)


def uncounted(m: Changing, x: Tensor) -> None:
    rows = torch.cat([x.detach(), x.detach() + 1])
    nn.functional.batch_norm(rows, m.average, m.spread, training=True)


def lazily(m: Changing, x: Tensor) -> None:
    if not hasattr(m, "table"):
        m.register_buffer("table", torch.arange(6.0), persistent=False)


def submodule(m: Changing, x: Tensor) -> None:
    m.extra = nn.Linear(2, 2)


def deleted(m: Changing, x: Tensor) -> None:
    if "ordered" in vars(m):
        del m.ordered
    m.ordered = OrderedDict(b=3)


CHANGES: dict[str, Callable[[Changing, Tensor], object]] = {
    "last input": lambda m, x: setattr(m, "last", x),
    "features": lambda m, x: setattr(m.body[1], "features", m.body[0](x)),
    "counter": lambda m, x: setattr(m, "calls", m.calls + 1),
    "new attribute": lambda m, x: setattr(m, "new", x.shape),
    "moving average": moving,
    "moving average in place": in_place,
    "batch normalisation": uncounted,
    "tensor in place": lambda m, x: m.history[0].copy_(x.detach()[0]),
    "growing list": lambda m, x: m.seen.append(x),
    "dictionary by size": lambda m, x: m.cache.__setitem__(len(x), torch.ones(len(x))),
    "list inside": lambda m, x: m.cache["a"].append(x),
    "tensor inside": lambda m, x: m.cache[0].add_(1.0),
    "set": lambda m, x: m.sizes.add(len(x)),
    "deque": lambda m, x: m.recent.append(x),
    "order": lambda m, x: m.ordered.move_to_end("a"),
    "lazy table": lazily,
    "new submodule": submodule,
    "deleted": deleted,
    "replaced parameter": lambda m, x: setattr(
        m.body[0], "bias", nn.Parameter(m.body[0].bias.detach() * 1.0)
    ),
}
every_change = pytest.mark.parametrize("change", CHANGES)
METHODS = (sf.Gradient(), sf.IntegratedGradients(steps=4), sf.Occlusion(2), sf.GuidedBackprop())


def X(batch: int = 3) -> Tensor:  # noqa: N802
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model: by identity, and by value."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = (id(value), _shown(value))
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version, value.tolist()
    if isinstance(value, dict):
        return [(key, _shown(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple, set, deque)):
        return [_shown(one) for one in value]
    return value if isinstance(value, (int, str)) else id(value)


@every_change
@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
@pytest.mark.parametrize("lean", [True, False])
def test_after_success(change: str, method: Any, lean: bool) -> None:
    model, x = Changing(CHANGES[change]).eval(), X()
    engine, before = sf.Engine(model, method, lean=lean), picture(model)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = engine(x, 1)
        assert picture(model) == before
    still = Changing(lambda m, x: None).eval()
    expected = sf.explain(still, x, target=1, method=method)
    assert torch.allclose(found.values, expected.values, 1e-5, 1e-6)


@every_change
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failure(change: str, error: type[BaseException]) -> None:
    calls = []

    def fails(m: Changing, x: Tensor) -> None:
        CHANGES[change](m, x)
        calls.append(len(x))
        if len(calls) >= 4:
            raise error

    model = Changing(fails).eval()
    before = picture(model)
    with pytest.raises(error if error is KeyboardInterrupt else sf.errors.ModelError):
        sf.explain(model, X(), target=1, points_per_launch=2, lean=False)
    assert picture(model) == before


@every_change
def test_between_the_launches_of_a_stream_and_in_a_plan(change: str) -> None:
    model = Changing(CHANGES[change]).eval()
    engine, before = sf.Engine(model, METHODS[1], points_per_launch=3), picture(model)
    engine.plan(X(), 1)
    assert picture(model) == before
    for _ in engine.stream(X(), 1):
        assert picture(model) == before


@every_change
def test_requests(change: str) -> None:
    model = Changing(CHANGES[change]).eval()
    before = picture(model)
    with sf.Engine(model, METHODS[1]) as engine:
        engine.explain_many([{"inputs": one, "target": 1} for one in X().split(1)])
    assert picture(model) == before


@every_change
@pytest.mark.parametrize("kind", [lambda m: lambda x: m(x), lambda m: m.forward, partial])
def test_functions_around_a_model(change: str, kind: Any) -> None:
    model = Changing(CHANGES[change]).eval()
    before = picture(model)
    sf.explain(kind(model), X(), target=1)
    assert picture(model) == before


@every_change
def test_the_captum_facade(change: str) -> None:
    model = Changing(CHANGES[change]).eval()
    before = picture(model)
    captum.IntegratedGradients(model).attribute(X(), target=1, n_steps=4)
    captum.FeatureAblation(model).attribute(X(), target=1)
    assert picture(model) == before


def test_threads_restore_once_the_last_of_them_leaves() -> None:
    inside, outside = threading.Event(), threading.Event()

    def waits(m: Changing, x: Tensor) -> None:
        m.calls += 1
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert outside.wait(30)

    model = Changing(waits).eval()
    before = picture(model)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(sf.explain, model, X(), target=1, method="gradient")
        assert inside.wait(30)
        sf.explain(model, X(), target=1, method="gradient")
        assert model.calls > 0
        outside.set()
        slow.result()
    assert picture(model) == before


def test_many_threads() -> None:
    model = Changing(lambda m, x: [CHANGES[one](m, x) for one in ("counter", "growing list")])
    before = picture(model)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: sf.explain(model, X(), target=n % 3), range(40)))
    assert picture(model) == before


class Quiet(nn.Module):
    """A network that holds numbers, tensors and an object, and changes itself once it is told to:
    such a model is looked at as a whole, without copies.
    """

    def __init__(self, change: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("places", torch.zeros(6), persistent=False)
        self.last, self.calls, self.config = None, 0, object()
        # No setting of the model's own, which would show.
        self.told, self.change = SimpleNamespace(now=False), change

    def forward(self, x: Tensor) -> Tensor:
        if self.told.now:
            self.change(self, x)
        return self.body(x)


QUIET: dict[str, Callable[[Any, Tensor], object]] = {
    "last input": CHANGES["last input"],
    "features": CHANGES["features"],
    "counter": CHANGES["counter"],
    "new attribute": CHANGES["new attribute"],
    "moving average": CHANGES["moving average"],
    "lazy table": CHANGES["lazy table"],
    "new submodule": CHANGES["new submodule"],
    "replaced parameter": CHANGES["replaced parameter"],
    "list for an object": lambda m, x: setattr(m, "config", [x]),
    "saved buffer": lambda m, x: m._non_persistent_buffers_set.discard("places"),
    "deleted": lambda m, x: vars(m).pop("last", None),
    "equal number": lambda m, x: setattr(m, "calls", False),
}


def _quiet(change: Callable[[Any, Tensor], object]) -> Quiet:
    """A model of which an earlier call has found nothing to copy or to restore."""
    model = Quiet(change).eval()
    sf.explain(model, X(1), target=1, method="gradient")
    assert model in preserve._OUTLINES
    return model


@pytest.mark.parametrize("change", QUIET)
@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
def test_a_model_that_changes_itself_only_later(
    change: str, error: type[Exception] | None, method: str
) -> None:
    def changes(m: Any, x: Tensor) -> None:
        QUIET[change](m, x)
        if error is not None:
            raise error

    model = _quiet(changes)
    expected = sf.explain(model, X(1), target=1, method=method).values
    for _ in range(2):
        model.told.now = True
        before = picture(model)
        engine = sf.Engine(model, method, lean=False)
        if error is None:
            assert torch.allclose(engine(X(1), 1).values, expected, 1e-5, 1e-6)
        else:
            with pytest.raises(sf.errors.ModelError):
                engine(X(1), 1)
        assert picture(model) == before
        model.told.now = False
        before = picture(model)
        assert torch.allclose(engine(X(1), 1).values, expected, 1e-5, 1e-6)
        assert picture(model) == before


def test_a_write_that_no_earlier_call_made_is_named() -> None:
    model = _quiet(lambda m, x: m.average.add_(1.0))
    model.told.now = True
    with pytest.warns(UserWarning, match="changed average"):
        sf.explain(model, X(1), target=1, method="gradient")
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.explain(model, X(1), target=1, method="gradient")
    assert picture(model) == before


def test_a_model_in_training_mode_again() -> None:
    model = _quiet(lambda m, x: None)
    model.train()
    assert sf.explain(model, X(1), target=1, method="gradient").provenance.trained_mode
    assert model.training
    assert model.body[0].training


@pytest.mark.parametrize("first", ["the whole", "a part"])
def test_the_second_of_two_threads_leaves_a_model_as_the_first_found_it(first: str) -> None:
    inside, entered, tasks = threading.Event(), threading.Event(), list[Any]()

    def moves(m: Any, x: Tensor) -> None:
        m.average = m.average + 1
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert entered.wait(30)
        else:
            # The other call ends while this one runs.
            entered.set()
            tasks[0].result(30)

    part = _quiet(moves)
    whole = nn.Sequential(part).eval()
    sf.explain(whole, X(1), target=1, method="gradient")
    assert {part, whole} <= set(preserve._OUTLINES)
    part.told.now = True
    before, (slow, fast) = picture(part), (whole, part) if first == "the whole" else (part, whole)
    with ThreadPoolExecutor(1) as pool:
        tasks.append(pool.submit(sf.explain, slow, X(1), target=1, method="gradient"))
        assert inside.wait(30)
        sf.explain(fast, X(1), target=1, method="gradient")
    assert picture(part) == before


def test_what_cannot_be_put_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def clips(m: Changing, x: Tensor) -> None:
        with torch.no_grad():
            m.body[0].weight.mul_(1.0)

    with pytest.warns(UserWarning, match=r"changed body\.0\.weight") as caught:
        sf.explain(Changing(clips), X(), target=1)
    assert caught[0].filename == __file__
    monkeypatch.setattr(preserve, "COPIED", 16)
    with pytest.warns(UserWarning, match="changed average"):
        sf.explain(Changing(in_place), X(), target=1)
    monkeypatch.setattr(preserve, "LONG", 3)
    model = Changing(lambda m, x: m.seen.append(x))
    model.seen = [0] * 5
    with pytest.warns(UserWarning, match="changed seen"):
        sf.explain(model, X(), target=1)


def test_buffers_that_only_later_calls_overwrite_are_named_once() -> None:
    wanted = []
    model = Changing(lambda m, x: in_place(m, x) if wanted else None).eval()
    sf.explain(model, X(), target=1)
    wanted.append(True)
    with pytest.warns(UserWarning, match="changed average"):
        sf.explain(model, X(), target=1)
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.explain(model, X(), target=1)
    assert picture(model) == before


def test_lazy_modules_keep_what_their_first_call_makes() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    first = sf.explain(model, X(), target=1)
    assert isinstance(model[0], nn.Linear)
    assert model[0].in_features == 6
    assert torch.equal(first.values, sf.explain(copy.deepcopy(model), X(), target=1).values)


def test_graphs_that_the_user_holds_stay_whole() -> None:
    model, x = Changing(in_place).eval(), X().requires_grad_()
    held = (model.body(x) * model.average[:3]).sum()
    sf.explain(model, X(), target=1)
    held.backward()
    assert x.grad is not None


def wide(change: Callable[[Changing, Tensor], object]) -> Changing:
    model = Changing(change)
    model.body = nn.Sequential(nn.Linear(6, 40_000), nn.Tanh(), nn.Linear(40_000, 3))
    return model.eval()


@every_change
def test_a_recording_holds_although_the_model_notes_itself(change: str) -> None:
    """The model is probed in its first call alone, and serves the others without its Python."""
    ran = []

    def counted(m: Changing, x: Tensor) -> None:
        ran.append(len(x))
        CHANGES[change](m, x)

    model = wide(counted)
    engine = sf.Engine(model, sf.Gradient(), points_per_launch=1)
    way = engine(X(1), 1).provenance.strategy
    first = len(ran)
    for _ in range(2):
        ran.clear()
        engine(X(1), 1)
        assert len(ran) == (0 if "recorded" in way else 1), (way, first)


def test_hashes_are_of_the_weights_as_they_were() -> None:
    model = Changing(moving).eval()
    found = sf.explain(model, X(), target=1)
    again = sf.explain(model, X(), target=1)
    assert found.provenance.weights_sha256 == again.provenance.weights_sha256
    assert sf.replay(found, model, X()).weights_match


def test_the_whole_model_is_unchanged() -> None:
    model, x = Changing(in_place), X()
    with unchanged(model, x):
        sf.explain(model, x, target=1)


class Remembering(nn.Module):
    """What it says depends on what it was asked before."""

    def __init__(self, kind: str, *, without: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.calls = kind, 0
        if without:
            # As layers without a bias, or statistics, have them.
            self.register_parameter("bias", None)
            self.register_buffer("variance", None)
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("bank", torch.ones(4, 6, dtype=torch.float64))
        self.hidden: torch.Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.kind == "average":
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            h = h - self.mean
        elif self.kind == "bank":
            with torch.no_grad():
                self.bank[self.calls % 4] = h[0]
            self.calls += 1
            h = h * self.bank.mean(0)
        elif self.kind == "hidden":
            before = torch.zeros_like(h) if self.hidden is None else self.hidden[: len(h)]
            h = torch.tanh(h + 0.5 * before.expand_as(h))
            self.hidden = h[:1].detach()
        else:
            self.calls += 1
            h = h * (1 + 0.1 * self.calls)
        return self.last(h)


@pytest.mark.parametrize("kind", ["average", "bank", "hidden", "counter"])
@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("without", [True, False])
def test_every_point_finds_the_state_of_the_call(
    kind: str, size: int | None, lean: bool, without: bool
) -> None:
    model = Remembering(kind, without=without).eval()
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.float64))
    start = copy.deepcopy(model)
    torch.manual_seed(2)
    x = torch.randn(1, 4, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for number in range(6):
        point = ((number + 0.5) / 6 * x).requires_grad_()
        expected += torch.autograd.grad(copy.deepcopy(start)(point)[0, 1], point)[0] / 6 * x
    engine = sf.Engine(
        model,
        sf.IntegratedGradients(steps=6, rule="midpoint"),
        points_per_launch=size,
        lean=lean,
    )
    for _ in range(2):
        found = engine(x, 1)
        torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found.scores.double(), copy.deepcopy(start)(x)[:, 1])
    ablated = sf.explain(model, x, target=1, method="feature_ablation", lean=lean).values
    for place in range(4):
        off = x.clone()
        off[0, place] = 0
        change = copy.deepcopy(start)(x)[0, 1] - copy.deepcopy(start)(off)[0, 1]
        torch.testing.assert_close(ablated[0, place], change)


def test_shared_switches_are_on_while_anybody_uses_them() -> None:
    switch: preserve.SharedSwitch[int] = preserve.SharedSwitch()
    events: list[object] = []

    def use(number: int) -> None:
        with switch.on(lambda: events.append("on") or number, lambda held: events.append(held)):
            gate.wait()

    gate = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert events[0] == "on"
    assert len(events) == 2
    assert None not in switch
    # A switch that cannot be turned on is not held.
    with pytest.raises(ZeroDivisionError), switch.on(lambda: 1 // 0, print):
        pass
    assert None not in switch
