"""The rows of docs/evaluation.md, "The same in Quantus", called as they are written there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saliency_fast.evaluate.metrics.faithfulness import (
    Deletion,
    Infidelity,
    Insertion,
    Road,
    SensitivityN,
)
from tests.models import Image, make, randn

quantus = pytest.importorskip("quantus")
BATCH, SIZE = 4, 3 * 12 * 12
# Scores of float32 models, whose rounding correlations and squared gaps magnify.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def case() -> tuple[Any, ...]:
    x = torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    maps = randn(BATCH, 3, 12, 12, seed=1).float()
    return make(Image).float().eval(), x, torch.arange(BATCH), maps


def _theirs(name: str, case: tuple[Any, ...], x: Any = None, **fields: Any) -> Any:
    model, inputs, target, maps = case
    common = {"normalise": False, "disable_warnings": True, "display_progressbar": False}
    metric = getattr(quantus, name)(**common, **fields)
    x = inputs.numpy().copy() if x is None else x
    return np.array(metric(model, x, target.numpy(), maps.numpy().copy()))


def _black(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).amin(1).view(-1, 1, 1, 1)


def test_pixel_flipping(case: tuple[Any, ...]) -> None:
    model, x, target, maps = case
    for given, substrate in (("black", _black(x)), (0.3, 0.3)):
        want = _theirs("PixelFlipping", case, features_in_step=12, perturb_baseline=given)
        metric = Deletion(step_size=12, substrate=substrate, per="element")
        curve = metric(model, x, maps, target=target).curve
        assert curve is not None
        np.testing.assert_allclose(curve.y[:, 1:].numpy(), want, rtol=0, atol=1e-6)


def test_insertion(case: tuple[Any, ...]) -> None:
    model, x, target, maps = case
    full = x.numpy().reshape(BATCH, -1)

    def put(arr: Any, indices: Any, **_: Any) -> Any:
        arr = arr.copy()
        np.put_along_axis(arr, indices, np.take_along_axis(full, indices, 1), 1)
        return arr

    blank = np.zeros_like(x.numpy())
    want = _theirs("PixelFlipping", case, blank, features_in_step=12, perturb_func=put)
    curve = Insertion(step_size=12, per="element")(model, x, maps, target=target).curve
    assert curve is not None
    np.testing.assert_allclose(curve.y[:, 1:].numpy(), want, rtol=0, atol=1e-6)


def test_infidelity(case: tuple[Any, ...]) -> None:
    model, x, target, maps = case
    want = _theirs("Infidelity", case, perturb_patch_sizes=[4], n_perturb_samples=1)
    metric = Infidelity("patches", patch=4, cumulative=True, substrate=_black(x))
    found = metric(model, x, maps, target=target).values
    np.testing.assert_allclose(found.numpy(), want, rtol=CLOSE)


def test_sensitivity_n(case: tuple[Any, ...]) -> None:
    model, x, target, maps = case
    want = _theirs("SensitivityN", case, features_in_step=12, return_aggregate=False)
    shares = tuple(12 * step / SIZE for step in range(1, len(want) + 1))
    metric = SensitivityN(
        shares, subsets="ranked", per="element", output="softmax", substrate=_black(x)
    )
    found = metric(model, x, maps, target=target).details["across_examples"]
    # Drops of about 1e-2 are told to 1e-7 of a probability.
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-3)


def test_road_of_one_channel(case: tuple[Any, ...]) -> None:
    model, x, target, maps = case
    wide, x, maps = torch.nn.Sequential(_Wide(), model).eval(), x[:, :1], maps[:, :1]
    found = Road((0.1, 0.3, 0.5), noise=0)(wide, x, maps, target=target).curve
    want = quantus.ROAD(
        percentages=[10, 30, 50],
        noise=0,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )(wide, x.numpy(), target.numpy(), maps.numpy())
    assert found is not None
    assert found.y.mean(0).tolist() == pytest.approx([float(one) for one in want.values()])


class _Wide(torch.nn.Module):
    """One channel as three."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1, -1)
