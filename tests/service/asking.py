"""Requests that differ in everything, what they give alone, and a gate before launches."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import service as services

LATENCY = 0.2
"""As a rule long enough for requests that are handed in one after another to share a launch."""


def gathering(model: Any, number: int) -> sf.Engine:
    """An engine that begins when that many requests wait, however slow the machine is."""
    return sf.Engine(model, waiting=number, latency=600.0)


def seeded(kind: type[nn.Module], *shape: int, dtype: Any = torch.float64) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return kind().eval().to(dtype), torch.randn(16, *shape, dtype=dtype)


def same(found: sf.Attribution, expected: sf.Attribution, tolerance: float = 1e-9) -> None:
    """The same answer, to rounding, in all of its parts."""
    for name in ("values", "scores", "baseline_scores", "delta", "error"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        for a, b in zip(
            *(p if isinstance(p, tuple) else (p,) for p in (mine, theirs)), strict=True
        ):
            if a is not None:
                size = max(1.0, float(expected.scores.abs().max())) if name == "delta" else 1.0
                torch.testing.assert_close(
                    a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True
                )
    for name in ("classes", "points", "converged"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name


METHODS = (
    sf.IntegratedGradients(3),
    sf.IntegratedGradients(11),
    sf.IntegratedGradients(5, rule="gauss_legendre"),
    sf.IntegratedGradients(4, tolerance=0.05, max_steps=200),
    sf.IntegratedGradients(11, "midpoint"),
    sf.IntegratedGradients(4, "trapezoid", tolerance=0.05, max_steps=200),
    sf.SmoothGrad(6, seed=1),
    sf.SmoothGrad(6, seed=2, sigma=0.3),
    sf.VarGrad(7, seed=3),
    sf.ExpectedGradients(9, seed=4),
    sf.Gradient(),
    sf.InputXGradient(),
)


def asked(x: Tensor) -> list[dict[str, Any]]:
    """Requests for x [16, *] that differ in everything that may differ."""
    requests = []
    for number, method in enumerate(METHODS * 3):
        one = x[number % 14 : number % 14 + 1 + number % 3]
        batch = len(one)
        target: Any = ([number % 5] * batch, "predicted", (number % 5,), lambda y: y[:, 1] ** 2)
        request = {"inputs": one, "target": target[number % 4], "method": method}
        recipe = method.recipe()
        if recipe.baseline == "one":
            request["baseline"] = (None, 0.25, x[15:], "mean")[number % 4]
        elif recipe.baseline == "set":
            request["baseline"] = x[10:15]
        requests.append(request)
    return requests


def alone(model: Any, requests: list[dict[str, Any]]) -> list[sf.Attribution]:
    found = []
    for one in requests:
        about = dict(one)
        found.append(sf.explain(model, about.pop("inputs"), **about))
    return found


class Gate:
    """Stands before an engine's shared launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()
        for name in ("execute", "execute_together"):
            original = getattr(services, name)
            monkeypatch.setattr(services, name, partial(self._through, original))

    def _through(self, original: Any, *args: Any) -> Any:
        self.reached.set()
        assert self.open.wait(30)
        return original(*args)

    def shut(self, engine: sf.Engine, x: Tensor) -> Future[sf.Attribution]:
        """Closes it; returns a request that stands before it."""
        self.open.clear()
        self.reached.clear()
        first = engine.submit(x, 0)
        assert self.reached.wait(30)
        return first
