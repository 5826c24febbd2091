"""Localisation against loops over places, against Quantus, and on the digits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.metrics.localisation import (
    EVIDENCE,
    EnergyInBox,
    PointingGame,
    RankAccuracy,
    TopKIoU,
    near_masks,
)
from saliency_fast.zoo import held_out
from tests.evaluate import naive_metrics as naive
from tests.models import randn

SPATIAL = [(9,), (13, 8), (4, 5, 6)]


LAYOUTS = {3: "BCT", 4: "BCHW", 5: "BCDHW"}


def _maps(spatial: tuple[int, ...], batch: int = 4, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Maps with ties, and masks that hold something."""
    values = (randn(batch, channels, *spatial) * 2).round() / 2
    masks = randn(batch, *spatial, seed=1) > 0.8
    masks.view(batch, -1)[:, 3] = True
    return values, masks


def _each(values: Tensor, masks: Tensor) -> list[tuple[Any, Any]]:
    return list(zip(values.sum(1).numpy(), masks.numpy(), strict=True))


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2.3, 40])
def test_the_pointing_game_is_the_loop(spatial: tuple[int, ...], tolerance: float) -> None:
    values, masks = _maps(spatial)
    found = PointingGame(tolerance)(None, values, values, boxes=masks, layout=LAYOUTS[values.dim()])
    pairs = _each(values, masks)
    assert found.values.tolist() == [naive.pointing(a, m, tolerance) for a, m in pairs]
    chance = torch.tensor([naive.chance(m, tolerance) for _, m in pairs], dtype=torch.float64)
    torch.testing.assert_close(found.details["chance"], chance, rtol=1e-12, atol=0)
    assert found.details["maxima"].tolist() == [float((a == a.max()).sum()) for a, _ in pairs]


def test_tolerance_counts_from_the_edge_of_the_object() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 4, 4] = True
    near = near_masks(mask, 2.0)
    assert int(near.sum()) == 13
    assert bool(near[0, 2, 4])
    assert not bool(near[0, 2, 3])


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_energy_is_the_loop(spatial: tuple[int, ...], evidence: str) -> None:
    values, masks = _maps(spatial)
    values = values + 0.25
    found = EnergyInBox(evidence)(None, values, values, boxes=masks, layout=LAYOUTS[values.dim()])
    expected = [naive.energy(a, m, evidence) for a, m in _each(values, masks)]
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-10)
    share = masks.flatten(1).double().mean(1)
    torch.testing.assert_close(found.details["chance"], share)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("k", [None, 1, 7, 0.3, 1.0])
def test_the_top_is_the_loop(spatial: tuple[int, ...], k: int | float | None) -> None:
    values, masks = _maps(spatial)
    total = math.prod(spatial)
    unions, shares = [], []
    for a, m in _each(values, masks):
        count = int(m.sum()) if k is None else k if isinstance(k, int) else round(k * total)
        unions.append(naive.top_iou(a, m, count))
        shares.append(naive.rank_accuracy(a, m, count))
    union = TopKIoU(k)(None, values, values, boxes=masks, layout=LAYOUTS[values.dim()])
    share = RankAccuracy(k)(None, values, values, boxes=masks, layout=LAYOUTS[values.dim()])
    np.testing.assert_allclose(union.values.numpy(), unions, rtol=1e-12)
    np.testing.assert_allclose(share.values.numpy(), shares, rtol=1e-12)
    assert torch.equal(union.details["rank_accuracy"], share.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 5])
def test_numbers_are_those_of_quantus(dtype: torch.dtype, batch: int) -> None:
    quantus = pytest.importorskip("quantus")
    values = randn(batch, 1, 12, 12).to(dtype)
    masks = randn(batch, 12, 12, seed=1) > 0.7
    common: dict[str, Any] = {
        "normalise": False,
        "disable_warnings": True,
        "display_progressbar": False,
    }
    pairs = [
        (PointingGame(), quantus.PointingGame(abs=False, **common)),
        (EnergyInBox("signed"), quantus.RelevanceMassAccuracy(abs=False, **common)),
        (EnergyInBox("absolute"), quantus.RelevanceMassAccuracy(abs=True, **common)),
        (RankAccuracy(), quantus.RelevanceRankAccuracy(abs=False, **common)),
        (RankAccuracy(30), quantus.TopKIntersection(k=30, abs=False, **common)),
    ]
    for ours, theirs in pairs:
        found = ours(None, values, values, boxes=masks, layout=LAYOUTS[values.dim()])
        expected = theirs(
            model=None,
            x_batch=values.numpy(),
            y_batch=np.zeros(batch, dtype=int),
            a_batch=values.numpy().copy(),
            s_batch=masks[:, None].numpy(),
        )
        # Sums of 144 numbers of both signs: only the signed ratio loses digits.
        close = 1e-4 if dtype == torch.float32 else 1e-10
        np.testing.assert_allclose(found.values.numpy(), np.array(expected, float), rtol=close)


def test_perfect_maps_win_and_random_ones_score_chance() -> None:
    samples = held_out()
    x, boxes = samples.images, samples.boxes
    inside = PointingGame()(None, x, x, boxes=boxes)
    spatial = torch.zeros(len(x), 64, 64)
    for number, (top, left, bottom, right) in enumerate(boxes.tolist()):
        spatial[number, top:bottom, left:right] = 1.0
    for metric in (PointingGame(), EnergyInBox(), TopKIoU(), RankAccuracy()):
        assert metric(None, x, spatial, boxes=boxes).mean().mean == 1.0
        drawn = metric(None, x, random_map(lambda x: x, x), boxes=boxes)
        if not isinstance(metric, TopKIoU):
            interval = drawn.mean(0.999)
            assert interval.low <= float(drawn.details["chance"].mean()) <= interval.high
    assert torch.allclose(inside.details["chance"], spatial.flatten(1).mean(1).double())


def test_constant_maps_are_told() -> None:
    x = torch.rand(2, 1, 6, 6)
    boxes = [[0, 0, 2, 2], [1, 1, 3, 3]]
    found = PointingGame()(None, x, torch.zeros_like(x), boxes=boxes)
    assert found.values.tolist() == [1.0, 1.0]
    assert "2 of 2 maps are constant" in found.caveats[0]
    energy = EnergyInBox()(None, x, torch.zeros_like(x), boxes=boxes)
    assert bool(energy.values.isnan().all())
    assert "2 of 2 maps are without positive evidence" in energy.caveats[0]


def test_smoothing_outvotes_a_lone_place() -> None:
    x = torch.zeros(1, 1, 32, 32)
    maps = torch.zeros(1, 32, 32)
    maps[0, 4:12, 4:12] = 1.0
    maps[0, 28, 28] = 2.0
    boxes = [[4, 4, 12, 12]]
    assert PointingGame()(None, x, maps, boxes=boxes).values.item() == 0.0
    assert PointingGame(smooth=0.05)(None, x, maps, boxes=boxes).values.item() == 1.0
    still = PointingGame(smooth=0.05)(None, x, torch.ones(1, 32, 32), boxes=boxes)
    assert "constant" in still.caveats[0]


@pytest.mark.parametrize(
    ("kind", "options", "raised", "words"),
    [
        (PointingGame, {"tolerance": -1}, InputError, "tolerance must be 0 or more"),
        (PointingGame, {"tolerance": math.nan}, InputError, "tolerance must be 0 or more"),
        (PointingGame, {"tolerance": "15"}, InputTypeError, "tolerance must be a number"),
        (PointingGame, {"smooth": 2.0}, InputError, "smooth is a share"),
        (EnergyInBox, {"evidence": "negative"}, InputError, "positive, absolute, signed"),
        (TopKIoU, {"k": 0}, InputError, "k must be at least 1"),
        (TopKIoU, {"k": 1.5}, InputError, "k is a share"),
        (TopKIoU, {"k": math.nan}, InputError, "k must be a positive finite number"),
        (RankAccuracy, {"k": True}, InputTypeError, "k must be a whole number"),
    ],
)
def test_options_are_checked(
    kind: Any, options: dict[str, Any], raised: type[Exception], words: str
) -> None:
    with pytest.raises(raised, match=words):
        kind(**options)


def test_what_does_not_fit_the_maps_is_told() -> None:
    x = torch.rand(2, 3)
    boxes = [[0, 1], [1, 3]]
    assert PointingGame()(None, x, x, boxes=boxes).values.shape == (2,)
    with pytest.raises(InputError, match="at most the maps' 3 positions: got 4"):
        TopKIoU(4)(None, x, x, boxes=boxes)
    with pytest.raises(InputError, match="smooth needs maps with spatial axes"):
        PointingGame(smooth=0.1)(None, x, x, boxes=boxes)
    with pytest.raises(InputError, match=r"pointing game needs boxes or masks.*pass boxes="):
        PointingGame()(None, x, x)
