"""Gradients that a model gives itself are part of its map, also where the first point sees none."""

from __future__ import annotations

import pytest
import torch

import saliency_fast as sf
from tests.model.answers import METHODS, always_lean, check, way_of, why
from tests.model.gradient_rules import CUSTOM, GLOBAL, HOOKS, MODULES, custom, rows, silent
from tests.model.lean_models import Case, Net, seeded


@pytest.fixture(autouse=True)
def _always_lean():
    with always_lean():
        yield


@pytest.mark.parametrize("method", METHODS, ids=["line", "noise"])
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_functions(name: str, method: sf.IntegratedGradients) -> None:
    case = custom(name)
    engine = sf.Engine(case.make(), method, points_per_launch=4)
    check(engine, case)
    assert way_of(engine) != "program", why(engine)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_modules(hook: str, module: str) -> None:
    name, branch = MODULES[module]
    model = seeded(lambda: Net(silent(branch)))
    HOOKS[hook](model.get_submodule(name))
    engine = sf.Engine(model, METHODS[0], points_per_launch=4)
    check(engine, Case(lambda: model, inputs=(rows(0.05),)))
    assert way_of(engine) != "program", why(engine)


@pytest.mark.parametrize("hook", GLOBAL)
def test_hooks_of_all_modules(hook: str) -> None:
    model = seeded(lambda: Net(silent(MODULES["normalisation"][1])))
    engine = sf.Engine(model, METHODS[0], points_per_launch=4)
    case = Case(lambda: model, inputs=(rows(0.05),))
    before = engine(case.inputs, 1).values[0]
    assert way_of(engine) == "program", why(engine)
    handle = GLOBAL[hook]()
    try:
        check(engine, case)
        assert way_of(engine) != "program", why(engine)
        assert (engine(case.inputs, 1).values[0] - before).norm() > 0.1 * before.norm()
    finally:
        handle.remove()


def test_a_custom_function_is_named() -> None:
    engine = sf.Engine(custom("straight through").make(), METHODS[0])
    engine(rows(1.0), 1)
    assert "custom autograd function Custom" in why(engine)
    model = seeded(lambda: Net(silent(MODULES["convolution"][1])))
    model.second.register_full_backward_hook(lambda *_: None)
    engine = sf.Engine(model, METHODS[0])
    engine(rows(1.0), 1)
    assert "backward hook" in why(engine)


def test_the_graph_is_the_callers_own() -> None:
    """No default hook for saved tensors is left behind by a model that sets one."""
    engine = sf.Engine(custom("packed").make(), METHODS[0])
    engine(rows(1.0), 1)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
