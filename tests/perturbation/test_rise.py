"""RISE against masks that are enlarged one by one, and what its error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.methods.perturbation import masks
from tests.models import SHAPES, Audio, Image, Multimodal, Tabular, Video, make, randn
from tests.naive import relative_l2
from tests.perturbation import naive_perturbation as naive


@pytest.mark.parametrize("size", [(7,), (12, 12), (5, 13), (5, 7, 6)])
@pytest.mark.parametrize("grid", [1, 3, 5])
def test_masks_are_enlarged_grids(size: tuple[int, ...], grid: int) -> None:
    sample = torch.tensor([0, 3, 17, 4])
    found = masks(sf.Rise(grid=grid, keep=0.4), 1, size, torch.full_like(sample, 5), sample)
    for row, number in zip(found, sample.tolist(), strict=True):
        expected = naive.rise_mask(5, number, 1, size, grid, 0.4)
        torch.testing.assert_close(row.view(size), expected, rtol=0.0, atol=1e-12)


def test_masks_keep_their_share() -> None:
    sample = torch.arange(4000)
    found = masks(sf.Rise(grid=4, keep=0.3), 0, (9, 9), 0 * sample, sample)
    # Cells are drawn with a chance of .3: their mean has a deviation of .46 / sqrt(4000).
    assert float((found.mean(0) - 0.3).abs().max()) < 5 * 0.46 / 4000**0.5


@pytest.mark.parametrize("kind", [Tabular, Audio, Image, Video])
@pytest.mark.parametrize("seed", [3, (3, 8)])
def test_against_a_loop(kind: type[nn.Module], seed: Any) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind])
    fill = randn(1, *SHAPES[kind], seed=1)
    size = SHAPES[kind] if kind is Tabular else SHAPES[kind][1:]
    total = torch.zeros_like(x)
    folds = torch.zeros(2, *x.shape, dtype=torch.float64)
    for row in range(2):
        own = seed if isinstance(seed, int) else seed[row]
        for sample in range(20):
            mask = naive.rise_mask(own, sample, 0, size, 4, 0.6)
            with torch.no_grad():
                score = model(fill + mask * (x[row : row + 1] - fill))[0, 2]
            total[row] += score * mask / (0.6 * 20)
            folds[sample % 2, row] += score * mask / (0.6 * 10)
    method = sf.Rise(20, 4, 0.6, seed)
    found = sf.explain(model, x, target=2, method=method, baseline=fill, points_per_launch=7)
    assert relative_l2(found.values, total) < 1e-12
    gap = (folds[0] - folds[1]).flatten(1).norm(dim=1) / 2 / total.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.error, gap, rtol=1e-9, atol=0.0)


def test_inputs_have_masks_of_their_own() -> None:
    model, x = make(Multimodal), (randn(2, *SHAPES[Image]), randn(2, *SHAPES[Tabular]))
    totals = [torch.zeros_like(one) for one in x]
    for row in range(2):
        for sample in range(9):
            own = [naive.rise_mask(0, sample, 0, (12, 12), 3, 0.5)]
            own.append(naive.rise_mask(0, sample, 1, (7,), 3, 0.5))
            with torch.no_grad():
                score = model(*(part[row : row + 1] * m for part, m in zip(x, own, strict=True)))
            for total, mask in zip(totals, own, strict=True):
                total[row] += score[0, 1] * mask / (0.5 * 9)
    found = sf.explain(model, x, target=1, method=sf.Rise(9, 3))
    for values, total in zip(found.values, totals, strict=True):
        assert relative_l2(values, total) < 1e-12


def test_the_error_is_about_the_distance_to_many_samples() -> None:
    model, x = make(Image), randn(4, *SHAPES[Image])
    best = sf.explain(model, x, target=1, method=sf.Rise(20_000, 4, seed=99))
    found = sf.explain(model, x, target=1, method=sf.Rise(500, 4))
    gap = (found.values - best.values).flatten(1).norm(dim=1) / best.values.flatten(1).norm(dim=1)
    assert bool((gap < 3 * found.error).all())
    assert bool((gap > found.error / 3).all())


def test_a_stream_gives_maps_on_the_way() -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    engine = sf.Engine(model, sf.Rise(64, 4))
    maps = list(engine.stream(x, 1))
    assert len(maps) == 16
    assert maps[-1].points.tolist() == [64, 64]
    torch.testing.assert_close(maps[-1].values, engine(x, 1).values)
    errors = [float(one.error.max()) for one in maps]
    assert errors[-1] < errors[2]
    short = sf.explain(model, x, target=1, method=sf.Rise(4, 4))
    assert relative_l2(maps[0].values, short.values) < 1e-12


def test_what_is_refused() -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    with pytest.raises(InputError, match=r"grid is finer than the input: got 13 cells"):
        sf.explain(model, x, target=1, method=sf.Rise(grid=13))
    table = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(InputTypeError, match="rise fades elements"):
        sf.explain(table, torch.ones(2, 4, dtype=torch.int64), target=1, method=sf.Rise(grid=2))
    with pytest.raises(InputError, match="samples must be at least 1"):
        sf.Rise(0)
    with pytest.raises(InputError, match=r"keep is a share, at most 1: got 1\.5"):
        sf.Rise(keep=1.5)
