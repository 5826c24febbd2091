"""What a recording takes: numbers that Python reads, outputs that nobody reads, tables made late,
models that count their calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import saliency_fast as sf
from saliency_fast.engine.calibrate import Calibration
from tests.model.answers import METHODS, always_lean, check, way_of, why
from tests.model.gradient_rules import reverse
from tests.model.lean_models import Case, Net, seeded
from tests.models import randn

X = randn(3, 2, 6, 6, seed=3)
FULL = torch.ones(3, 6, dtype=torch.int64)
PADDED = FULL.clone()
PADDED[:, 4:] = 0
MIXED = FULL.clone()
MIXED[1, 3:] = 0


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


def masked(m: Net, x: Tensor, mask: Tensor) -> Tensor:
    """As language models do: a mask of ones is left out."""
    y = m.first(x)
    return y if mask.all() else y.masked_fill(mask[:, None, None] == 0, -0.3)


READS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    # Of a further argument [R, 6].
    "bool": masked,
    "item": lambda m, x, mask: m.first(x) * (1 + mask[0, -1].item()),
    "tolist": lambda m, x, mask: m.first(x) * (1 + mask[0].tolist()[-1]),
    "equal": lambda m, x, mask: (
        m.first(x).sin() if torch.equal(mask, torch.ones_like(mask)) else m.first(x)
    ),
    "any": lambda m, x, mask: m.first(x).sin() if (mask == 0).any() else m.first(x),
    "float of a weight": lambda m, x, mask: (
        m.first(x) * float(m.scale.detach()) * mask[0, -1].item()
    ),
    "through a view that is overwritten": lambda m, x, mask: _overwritten(m, x, mask),
}


def _overwritten(m: Net, x: Tensor, mask: Tensor) -> Tensor:
    flags = torch.zeros(2)
    view = flags[1:]
    flags[1] = mask.min()
    return m.first(x).sin() if view.item() else m.first(x)


def engine_of(body: Callable[..., Any], method: Any = METHODS[0]) -> tuple[sf.Engine, Any]:
    model = seeded(lambda: Net(body))
    return sf.Engine(model, method, points_per_launch=4), model


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
@pytest.mark.parametrize("name", READS)
def test_numbers_that_do_not_depend_on_the_points(name: str, method: Any) -> None:
    """Noted, and read again: another mask is another program, in whatever order they come."""
    engine, model = engine_of(READS[name], method)
    for mask in (FULL, PADDED, FULL, PADDED):
        check(engine, Case(lambda: model, inputs=(X,), args=(mask,)))
        assert way_of(engine) == "program", why(engine)
    known = dict(engine._location.cache)
    for mask in (FULL, PADDED):
        engine(X, 1, forward_args=(mask,))
    assert dict(engine._location.cache) == known, "what is known must not be probed again"


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", ["bool", "any"])
@pytest.mark.filterwarnings("ignore:saliency_fast. the examples of this call depend:UserWarning")
def test_examples_by_which_python_goes_several_ways(name: str, lean: bool) -> None:
    model = seeded(lambda: Net(READS[name]))
    engine = sf.Engine(model, METHODS[0], points_per_launch=4, lean=lean)
    for mask in (MIXED, FULL, MIXED):
        check(engine, Case(lambda: model, inputs=(X,), args=(mask,)))


@pytest.mark.filterwarnings("ignore:saliency_fast. the examples of this call depend:UserWarning")
def test_examples_of_which_some_lead_python_another_way() -> None:
    """Each alone and all at once read the same; two of them in a launch do not."""
    engine = sf.Engine(seeded(lambda: Net(neighbours)), METHODS[0], points_per_launch=2)
    ids = torch.tensor([[0], [1], [5]])
    check(engine, Case(lambda: seeded(lambda: Net(neighbours)), inputs=(X,), args=(ids,)))
    assert way_of(engine) != "program", why(engine)


def neighbours(m: Net, x: Tensor, ids: Tensor) -> Tensor:
    y = m.first(x)
    return y.sin() if ids.max() - ids.min() == 1 else y


def test_a_number_that_differs_in_every_call() -> None:
    """Programs do not pile up."""
    engine, model = engine_of(lambda m, x, factor: m.first(x) * factor.sum().item())
    for number in range(20):
        factor = torch.tensor([[1.0 + number]], dtype=torch.float64)
        check(engine, Case(lambda: model, inputs=(X[:1],), args=(factor,)))
    assert len(engine._location.cache) < 12


def test_a_number_of_a_buffer() -> None:
    engine, model = engine_of(lambda m, x: m.first(x) * m.norm.running_mean[0].item())
    case = Case(lambda: model, inputs=(X,))
    check(engine, case)
    assert way_of(engine) == "program", why(engine)
    model.norm.running_mean[0] = -3.0
    check(engine, case)
    model.norm.running_mean.data[0] = 2.0
    check(engine, case)


def test_a_view_of_what_is_overwritten_by_the_points() -> None:
    """It depends on them from then on: its gradient is not lost, nor are its numbers constant."""

    def body(m: Net, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 4, 6, 6, dtype=x.dtype)
        view = out[:, 1:3]
        out.copy_(m.first(x))
        return torch.cat([view.sin(), view * 3], 1)

    engine, model = engine_of(body)
    check(engine, Case(lambda: model, inputs=(X,)))


class Cache:
    """What no noted call makes."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return 1


class Returns(Net):
    """`shape(logits, keys)` of a net."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(lambda m, x: m.first(x))
        self.shape = shape

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        logits = super().forward(*inputs, **named)
        return self.shape(logits, logits * 2)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cache": lambda y, keys: {"logits": y, "cache": Cache(keys)},
    "custom function": lambda y, keys: {"logits": y, "cache": reverse(keys)},
    "tuple in a dict": lambda y, keys: {"logits": y, "cache": (Cache(keys), None, "text")},
    "namespace": lambda y, keys: {"logits": y, "cache": SimpleNamespace(keys=keys)},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_the_target_does_not_read(name: str) -> None:
    model = seeded(lambda: Returns(OUTPUTS[name]))
    engine, plain = sf.Engine(model, METHODS[0]), sf.Engine(model, METHODS[0], lean=False)
    for target in (1, lambda raw: raw["logits"][:, 2]):
        found = engine(X, target)
        assert found.provenance.strategy.startswith("recorded"), engine.plan(X, target).notes
        torch.testing.assert_close(found.values, plain(X, target).values, rtol=1e-10, atol=1e-12)
    together = engine.explain_many([{"inputs": X[:1], "target": 1}, {"inputs": X[1:], "target": 2}])
    torch.testing.assert_close(together[1].values, plain(X[1:], 2).values, rtol=1e-10, atol=1e-12)


READERS: dict[str, Callable[[Any], Tensor]] = {
    "a tensor in it": lambda raw: raw["cache"].keys[:, 1] + raw["logits"][:, 0],
    "its length": lambda raw: raw["logits"][:, 0] * len(raw["cache"]),
    "whether it is true": lambda raw: raw["logits"][:, 0] * (2 if raw["cache"] else 3),
    "its class": lambda raw: raw["logits"][:, 0] * (2 if isinstance(raw["cache"], Cache) else 3),
    "an attribute": lambda raw: raw["logits"][:, 0] * (2 if hasattr(raw["cache"], "keys") else 3),
}


@pytest.mark.parametrize("name", READERS)
def test_outputs_that_the_target_reads(name: str) -> None:
    """The model itself runs then, and the map is its own."""
    model, read = seeded(lambda: Returns(OUTPUTS["cache"])), READERS[name]
    found = sf.Engine(model, METHODS[0])(X, read)
    expected = sf.Engine(model, METHODS[0], lean=False)(X, read)
    assert not found.provenance.strategy.startswith("recorded")
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-12)


class Late(Net):
    """Makes a table in its first run, and keeps it."""

    tables: dict[Any, Tensor]

    def __init__(self, keyed: bool) -> None:
        super().__init__(lambda m, x: m.first(x + m.made(x)))
        self.places: Tensor | None = None
        self.keyed, self.tables = keyed, {}

    def made(self, x: Tensor) -> Tensor:
        if self.keyed:
            key = x.shape[-1]
            if key not in self.tables:
                self.tables[key] = torch.linspace(0, 1, key, dtype=x.dtype)
            return self.tables[key]
        if self.places is None:
            self.places = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return self.places


@pytest.mark.parametrize("keyed", [False, True])
def test_tables_that_are_made_in_the_first_run(keyed: bool) -> None:
    model = seeded(lambda: Late(keyed))
    engine = sf.Engine(model, METHODS[0], points_per_launch=4)
    check(engine, Case(lambda: model, inputs=(X,)))
    assert way_of(engine) == "program", why(engine)


class Counts(Net):
    """Counts its calls; from `late` on it does something else."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.first(x))
        self.calls, self.late, self.log = 0, 10**6, []

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor:
        self.calls += 1
        self.log.append(inputs[0].shape)
        y = super().forward(*inputs, **named)
        return y.sin() if self.calls > self.late else y


def test_a_model_that_counts_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps its program when it was called, and is looked at: what it does later is followed."""
    model = seeded(Counts)
    engine, case = sf.Engine(model, METHODS[0], points_per_launch=4), Case(lambda: model)
    check(engine, case)
    assert way_of(engine) == "program", why(engine)
    probed, renewed, original = list[Any](), list[Any](), Calibration.renewed
    with monkeypatch.context() as patch:
        patch.setattr("saliency_fast.engine.planner.calibrated", lambda *a, **k: probed.append(a))
        patch.setattr(
            Calibration, "renewed", lambda *a: renewed.append(original(*a)) or renewed[-1]
        )
        for _ in range(3):
            model(*case.inputs)
            engine(*case.inputs, 1)
            engine(*case.inputs, 1)
    assert not probed
    assert len(renewed) == 3
    assert all(one is not None for one in renewed)
    for late in (0, 10**6, model.calls + 1, 0):
        model.late = late
        check(engine, case)
