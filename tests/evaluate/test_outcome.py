"""Outcomes: bootstrap intervals hold what they promise, and areas are those of the curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap as scipy_bootstrap

from saliency_fast.errors import InputError
from saliency_fast.evaluate.outcome import Curve, Outcome, bootstrap


def _outcome(values: torch.Tensor, **further: object) -> Outcome:
    return Outcome("metric", values, "higher", {}, **further)  # type: ignore[arg-type]


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    trials, covered = 400, 0
    for trial in range(trials):
        drawn = torch.randn(40, generator=generator, dtype=torch.float64) * 2 + 3
        found = bootstrap(drawn, 0.9, seed=trial)
        covered += found.low <= 3.0 <= found.high
    # Percentile intervals of 40 normal numbers cover a little less than they say: about .89. Four
    # standard errors of 400 trials are .06.
    assert 0.83 <= covered / trials <= 0.95


def test_ends_are_close_to_those_of_scipy() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = bootstrap(values, 0.95)
    theirs = scipy_bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=20000, random_state=0
    ).confidence_interval
    wide = theirs.high - theirs.low
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.low == pytest.approx(theirs.low, abs=0.05 * wide)
    assert found.high == pytest.approx(theirs.high, abs=0.05 * wide)
    assert (found.confidence, found.count) == (0.95, 50)


def test_more_confidence_is_wider_and_seeds_repeat() -> None:
    values = torch.rand(30, dtype=torch.float64)
    state = torch.random.get_rng_state()
    narrow, wide = bootstrap(values, 0.5), bootstrap(values, 0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_values_are_left_out() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.inf])
    found = _outcome(values).mean()
    assert (found.mean, found.count) == (2.0, 2)
    assert 1.0 <= found.low <= found.high <= 3.0
    nothing = _outcome(torch.full((3,), math.nan)).mean()
    assert nothing.count == 0
    assert math.isnan(nothing.mean)
    one = bootstrap(torch.tensor([2.5]))
    assert (one.mean, one.low, one.high) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 95.0, math.nan])
def test_confidence_is_checked(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence must lie between 0 and 1"):
        bootstrap(torch.ones(3), confidence)


def test_differences_are_paired() -> None:
    base = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 10
    better = base + 0.1
    gap = _outcome(better).over(_outcome(base))
    assert gap.mean == pytest.approx(0.1, abs=1e-9)
    assert gap.low == pytest.approx(0.1, abs=1e-9)
    holed = better.clone()
    holed[0] = math.nan
    assert _outcome(holed).over(_outcome(base)).count == 39
    with pytest.raises(InputError, match="outcomes must be of the same examples: got 40 and 3"):
        _outcome(base).over(_outcome(torch.ones(3)))


def test_areas_are_trapezoids() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).double()
    y = torch.tensor([[1.0, 0.5, 0.0], [2.0, 2.0, 2.0]]).double()
    area = Curve(x, y, "x", "y").area()
    torch.testing.assert_close(area, torch.tensor([0.375, 2.0]).double(), rtol=0, atol=1e-15)


def test_outcomes_read_well() -> None:
    text = repr(_outcome(torch.ones(4), passed=False, threshold=0.5, caveats=("look here",)))
    assert text.splitlines() == [
        "metric: 1 [1, 1] over 4 examples, FAILED, higher is better",
        "  note: look here",
    ]
