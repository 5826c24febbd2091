"""What an engine answers, by which way, and the same from a naive loop of autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import saliency_fast as sf
from tests import naive
from tests.configured import ALWAYS_LEAN, configure
from tests.model.lean_models import WAYS, Case
from tests.traces import one_thread, unchanged

METHODS = (
    sf.IntegratedGradients(steps=5, rule="gauss_legendre"),
    sf.SmoothGrad(samples=4, sigma=0.3, seed=7, antithetic=False),
)


@contextmanager
def always_lean() -> Iterator[None]:
    """Lean and fused also where points are so small that it does not pay, and in float64, whose
    rounding tells wrong gradients from right ones.
    """
    with pytest.MonkeyPatch.context() as patch, one_thread():
        configure(patch, **ALWAYS_LEAN)
        yield


def way_of(engine: sf.Engine) -> str:
    """What served last: one of WAYS."""
    (*_, last) = engine._location.cache.values()
    strategy = last.strategy
    if strategy.program is not None:
        return WAYS[0]
    return WAYS[1] if strategy.intercepted else WAYS[2]


def why(engine: sf.Engine) -> str:
    return "; ".join(f"{one.strategy}: {one.reason}" for one in engine._location.cache.values())


def expected(model: Any, case: Case, method: Any) -> list[Tensor]:
    """Example by example, and point by point, from copies: models may work in place."""
    found = []
    for row in range(len(case.inputs[0])):
        own = slice(row, row + 1)

        def of_row(value: Any, own: slice = own) -> Any:
            tensor = isinstance(value, Tensor)
            return value[own].clone() if tensor and len(value) == 3 else value

        def one(*points: Tensor, of_row: Any = of_row) -> Any:
            args = [of_row(value) for value in case.args]
            named = {name: of_row(value) for name, value in case.kwargs.items()}
            return model(*[point.clone() for point in points], *args, **named)

        x = tuple(tensor[own] for tensor in case.inputs)
        found.append(by_hand(one, score_of(case.target), x, method))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def by_hand(model: Any, score: Any, x: tuple[Tensor, ...], method: Any) -> Any:
    if isinstance(method, sf.IntegratedGradients):
        zeros = tuple(torch.zeros_like(one) for one in x)
        return naive.integrated_gradients(model, score, x, zeros, method.rule, method.steps)
    sigma = [method.sigma] * len(x)
    drawn = naive.noisy_gradients(model, score, x, sigma, method.samples, method.seed, False)
    return [torch.stack(parts).mean(0) for parts in zip(*drawn, strict=True)]


def score_of(target: Any) -> Callable[[Any], Tensor]:
    if callable(target):
        return target
    index = (slice(None), *target) if isinstance(target, tuple) else (slice(None), target)

    def score(raw: Any) -> Tensor:
        if isinstance(raw, dict):
            raw = raw["out"]
        return getattr(raw, "logits", raw)[index]

    return score


def explain(engine: sf.Engine, case: Case) -> tuple[Tensor, ...]:
    inputs = case.inputs if len(case.inputs) > 1 else case.inputs[0]
    found = engine(inputs, case.target, forward_args=case.args, forward_kwargs=case.kwargs)
    return found.values if isinstance(found.values, tuple) else (found.values,)


def check(engine: sf.Engine, case: Case) -> None:
    """A call's maps, and that it leaves no trace."""
    further = [one for one in (*case.args, *case.kwargs.values()) if isinstance(one, Tensor)]
    with unchanged(engine.model, *case.inputs, *further):
        found = explain(engine, case)
    for a, b in zip(found, expected(engine.model, case, engine.method), strict=True):
        gap = naive.relative_l2(a, b)
        assert gap <= 1e-11, f"off by {gap:.2g}, {way_of(engine)}: {why(engine)}"
