"""A model that was changed between calls, or takes another branch: the answer must follow."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import saliency_fast as sf
from tests.model.answers import METHODS, always_lean, check, way_of, why
from tests.model.lean_models import Case, Net, seeded
from tests.models import randn

X = randn(3, 2, 6, 6, seed=3)
LINE = METHODS[0]
FACTOR = 1.0
SETTINGS = types.ModuleType("settings")
SETTINGS.factor = 1.0


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


class Slotted:
    """A setting outside of any __dict__."""

    __slots__ = ("factor", "squared")

    def __init__(self) -> None:
        self.factor, self.squared = 1.0, False


@dataclass
class Config:
    factor: float = 1.0
    squared: bool = False


class Scale:
    """A callable that is no module."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.factor


def times_factor(y: Tensor) -> Tensor:
    return y * FACTOR


def times(y: Tensor, config: Config) -> Tensor:
    return y.square() if config.squared else y * config.factor


def plain(m: Net, x: Tensor) -> Tensor:
    return m.relu(m.norm(m.first(x)))


def with_(body: Callable[..., Tensor], **attributes: Any) -> nn.Module:
    model = seeded(lambda: Net(body))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def closing(state: dict[str, float]) -> nn.Module:
    class Closing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * state["factor"]

    model = seeded(lambda: Closing(plain))
    model.state = None
    return model


class Global(Net):
    """Reads settings in whatever way a class can."""

    factor, listed = 1.0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(super().forward(x))

    def scaled(self, y: Tensor) -> Tensor:
        return y * FACTOR * self.factor * self.listed[0] * SETTINGS.factor

    @property
    def doubled(self) -> float:
        return 2 * FACTOR


def of_class() -> nn.Module:
    """A model of a class of its own, which may be changed."""
    own = type("Own", (Global,), {})
    return seeded(lambda: own(plain))


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    # How the model is made, and how it is changed.
    "number": (
        lambda: with_(lambda m, x: m.first(x) * m.factor, factor=1.0),
        lambda m: setattr(m, "factor", 2.5),
    ),
    "True for 1": (
        lambda: with_(lambda m, x: m.first(x) * (3 if m.flag is True else 1), flag=1),
        lambda m: setattr(m, "flag", True),
    ),
    "text": (
        lambda: with_(lambda m, x: F.pad(m.first(x), (2, 0, 1, 0), m.mode), mode="constant"),
        lambda m: setattr(m, "mode", "reflect"),
    ),
    "list": (
        lambda: with_(lambda m, x: m.first(x) * m.factors[1], factors=[1.0, 2.0]),
        lambda m: m.factors.reverse(),
    ),
    "nested": (
        lambda: with_(lambda m, x: m.first(x) * m.deep["a"][0]["b"], deep={"a": [{"b": 1.0}]}),
        lambda m: m.deep["a"][0].update(b=3.0),
    ),
    "numpy array": (
        lambda: with_(lambda m, x: m.first(x) * float(m.array[1]), array=np.ones(3)),
        lambda m: m.array.__setitem__(1, 4.0),
    ),
    "config": (
        lambda: with_(lambda m, x: times(m.first(x), m.config), config=Config()),
        lambda m: setattr(m.config, "squared", True),
    ),
    "slots": (
        lambda: with_(lambda m, x: times(m.first(x), m.config), config=Slotted()),
        lambda m: setattr(m.config, "factor", 3.0),
    ),
    "callable": (
        lambda: with_(lambda m, x: m.scale_by(m.first(x)), scale_by=Scale()),
        lambda m: setattr(m.scale_by, "factor", 3.0),
    ),
    "partial": (
        lambda: with_(
            lambda m, x: m.scale_by(m.first(x)), scale_by=functools.partial(times, config=Config())
        ),
        lambda m: setattr(m.scale_by.keywords["config"], "factor", 3.0),
    ),
    "function": (
        lambda: with_(lambda m, x: m.act(m.first(x)), act=torch.sin),
        lambda m: setattr(m, "act", torch.tanh),
    ),
    "activation module": (
        lambda: with_(lambda m, x: m.act(m.first(x)), act=nn.ReLU()),
        lambda m: setattr(m, "act", nn.LeakyReLU(0.3)),
    ),
    "its setting": (
        lambda: with_(lambda m, x: m.act(m.first(x)), act=nn.LeakyReLU(0.1)),
        lambda m: setattr(m.act, "negative_slope", 0.7),
    ),
    "stride": (lambda: with_(plain), lambda m: setattr(m.first, "stride", (2, 1))),
    "submodule": (
        lambda: with_(plain),
        lambda m: setattr(m, "first", seeded(lambda: nn.Conv2d(2, 4, 1))),
    ),
    "submodules exchanged": (
        lambda: with_(lambda m, x: m.norm(m.second(m.norm(m.first(x)).tanh()))),
        lambda m: m.second.__dict__["_parameters"].update(
            weight=nn.Parameter(m.second.weight.detach().flip(0))
        ),
    ),
    "parameter": (
        lambda: with_(plain),
        lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight.detach() * 2 - 1)),
    ),
    "parameter's data": (
        lambda: with_(plain),
        lambda m: setattr(m.first.weight, "data", m.first.weight.data.flip(0)),
    ),
    "parameter in place": (lambda: with_(plain), lambda m: m.first.weight.data.mul_(-2.0)),
    "state": (
        lambda: with_(plain),
        lambda m: m.load_state_dict({k: v * 0.5 + 0.1 for k, v in m.state_dict().items()}),
    ),
    "statistics": (lambda: with_(plain), lambda m: m.norm.running_var.fill_(0.1)),
    "buffer": (
        lambda: with_(plain),
        lambda m: setattr(m.norm, "running_mean", m.norm.running_mean + 1.0),
    ),
    "closure": (
        lambda: (lambda state: with_(plain, state=state) and closing(state))({"factor": 1.0}),
        lambda m: type(m).forward.__closure__[-1].cell_contents.update(factor=3.0),
    ),
    "global": (of_class, lambda m: globals().update(FACTOR=2.0)),
    "global of a helper": (
        lambda: with_(lambda m, x: times_factor(m.first(x))),
        lambda m: globals().update(FACTOR=2.0),
    ),
    "attribute of a module": (of_class, lambda m: setattr(SETTINGS, "factor", 3.0)),
    "attribute of its class": (of_class, lambda m: setattr(type(m), "factor", 3.0)),
    "attribute in its class": (of_class, lambda m: type(m).listed.__setitem__(0, 3.0)),
    "method of its class": (
        of_class,
        lambda m: setattr(type(m), "scaled", lambda self, y: y.square()),
    ),
    "method": (of_class, lambda m: setattr(m, "scaled", lambda y: y.square())),
    "forward": (of_class, lambda m: setattr(m, "forward", lambda x: x.sin().mean((2, 3)))),
    "forward hook": (
        lambda: with_(plain),
        lambda m: m.norm.register_forward_hook(lambda _, __, y: y * 2),
    ),
    "forward pre-hook": (
        lambda: with_(plain),
        lambda m: m.norm.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    ),
    "backward hook": (
        lambda: with_(lambda m, x: m.norm(m.first(x))),
        lambda m: m.first.register_full_backward_hook(lambda _, grads, __: (grads[0] * 2,)),
    ),
    "pruned": (
        lambda: with_(plain),
        lambda m: prune.l1_unstructured(m.first, "weight", amount=0.5),
    ),
    "parametrised": (
        lambda: with_(plain),
        lambda m: parametrizations.weight_norm(m.first).parametrizations.weight.original0.data.mul_(
            2
        ),
    ),
    "training": (
        lambda: with_(
            lambda m, x: F.dropout(m.first(x), 0.0, m.first.training) * m.drop.p,
            drop=nn.Dropout(0.5),
        ),
        lambda m: setattr(m.drop, "p", 0.25),
    ),
    "code made anew": (
        lambda: with_(lambda m, x: m.act(m.first(x)), act=eval("lambda y: y * 2")),
        lambda m: (setattr(m, "act", None), setattr(m, "act", eval("lambda y: y * 3"))),
    ),
}


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    monkeypatch.setattr(SETTINGS, "factor", 1.0)
    monkeypatch.setattr(Global, "listed", [1.0])
    make, change = CHANGES[name]
    model = make()
    engine, case = sf.Engine(model, method, points_per_launch=4), Case(lambda: model, inputs=(X,))
    check(engine, case)
    assert way_of(engine) == "program", why(engine)
    probed = dict(engine._location.cache)
    before = engine(X, 1).values
    assert engine._location.cache == probed, "what did not change must not be probed again"
    change(model)
    check(engine, case)
    assert (engine(X, 1).values - before).abs().max() > 1e-3


def test_a_global_hook_is_followed() -> None:
    model = with_(lambda m, x: m.norm(m.first(x)))
    engine, case = sf.Engine(model, LINE), Case(lambda: model, inputs=(X,))
    check(engine, case)
    shared = torch.nn.modules.module
    handle = shared.register_module_forward_hook(
        lambda module, _, y: y * 2 if module is model.norm else None
    )
    try:
        check(engine, case)
    finally:
        handle.remove()
    check(engine, case)


def test_a_plain_function_is_followed() -> None:
    state, config = [1.0], Config()

    def model(x: Tensor) -> Tensor:
        return times(x.sin(), config).flatten(1) * state[0]

    engine, case = sf.Engine(model, LINE), Case(lambda: model, inputs=(X,))
    check(engine, case)
    assert way_of(engine) == "program", why(engine)
    probed = dict(engine._location.cache)
    check(engine, case)
    assert engine._location.cache == probed
    state[0] = 2.0
    check(engine, case)
    config.squared = True
    check(engine, case)


def test_other_arguments_are_followed() -> None:
    """Tensors are read anew; numbers, text and flags are part of what was recorded."""
    model = with_(lambda m, x, add, mode="sin", **more: getattr(m.first(x) + add, mode)())
    engine = sf.Engine(model, LINE)
    for args, named in (
        ((randn(3, 4, 1, 1, seed=1),), {}),
        ((randn(3, 4, 1, 1, seed=2),), {}),
        ((0.5,), {}),
        ((0.75,), {}),
        ((randn(4, 1, 1, seed=3),), {"mode": "tanh"}),
        ((randn(4, 1, 1, seed=3),), {"mode": "relu"}),
        ((randn(4, 1, 1, seed=3),), {"mode": "relu", "unused": {"deep": [1]}}),
    ):
        check(engine, Case(lambda: model, inputs=(X,), args=args, kwargs=named))
        assert way_of(engine) == "program", why(engine)


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
def test_branches_of_successive_calls(method: Any) -> None:
    """What the first input took says nothing of the next: no program may stand for either."""

    def body(m: Net, x: Tensor) -> Tensor:
        return m.first(x).sin() if x.mean() > 0 else m.second(m.first(x)).square()

    model = with_(body)
    engine = sf.Engine(model, method, points_per_launch=1)
    for shift in (2.0, -2.0, 0.0, 2.0):
        check(engine, Case(lambda: model, inputs=(X + shift,)))
        assert way_of(engine) == "watched", why(engine)
