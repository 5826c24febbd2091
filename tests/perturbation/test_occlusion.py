"""Occlusion against a loop over windows and against Captum; its hierarchy."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.methods.perturbation import Grid
from tests.models import SHAPES, Audio, Image, Multimodal, Tabular, Video, make, randn
from tests.naive import relative_l2
from tests.perturbation import naive_perturbation as naive

CASES: list[tuple[type[nn.Module], Any, Any, tuple[int, ...], tuple[int, ...]]] = [
    # model, window and stride as they are given, and for every axis
    (Tabular, 3, 2, (3,), (2,)),
    (Tabular, (4,), None, (4,), (2,)),
    (Audio, 7, 4, (2, 7), (2, 4)),
    (Audio, (1, 8), (1, 8), (1, 8), (1, 8)),
    (Image, 4, 3, (3, 4, 4), (3, 3, 3)),
    (Image, (5, 3), (5, 2), (3, 5, 3), (3, 5, 2)),
    (Image, (2, 4, 12), (1, 4, 99), (2, 4, 12), (1, 4, 12)),
    (Video, (2, 3, 3), (2, 3, 2), (2, 2, 3, 3), (2, 2, 3, 2)),
    (Video, None, None, (2, 1, 1, 1), (2, 1, 1, 1)),
]


def one_target(model: nn.Module, target: int) -> naive.Score:
    return lambda *x: model(*x)[0, target]


@pytest.mark.parametrize(("kind", "window", "stride", "wide", "steps"), CASES)
def test_against_a_loop_and_captum(
    kind: type[nn.Module], window: Any, stride: Any, wide: Any, steps: Any
) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind])
    fill = randn(1, *SHAPES[kind], seed=1)
    with torch.no_grad():
        slow = [
            naive.occlusion(one_target(model, 2), (one[None],), (fill,), [wide], [steps])[0]
            for one in x
        ]
    found = sf.explain(model, x, target=2, method=sf.Occlusion(window, stride), baseline=fill)
    assert relative_l2(found.values, torch.cat(slow)) < 1e-12
    assert float(found.error.max()) == 0.0
    assert found.delta is None
    theirs = captum.attr.Occlusion(model).attribute(x, wide, steps, fill, target=2)
    # Captum's occlusion is in float32.
    assert relative_l2(found.values, theirs) < 1e-6


def test_windows_of_several_inputs() -> None:
    model, x = make(Multimodal), (randn(2, *SHAPES[Image]), randn(2, *SHAPES[Tabular]))
    windows, strides = ((3, 5, 5), (2,)), ((3, 5, 4), (1,))
    method = sf.Occlusion(((5, 5), 2), ((5, 4), 1))
    with torch.no_grad():
        slow = [
            naive.occlusion(
                one_target(model, 1),
                tuple(part[row : row + 1] for part in x),
                tuple(torch.zeros_like(part[:1]) for part in x),
                windows,
                strides,
            )
            for row in range(2)
        ]
    found = sf.explain(model, x, target=1, method=method, points_per_launch=5)
    for number, values in enumerate(found.values):
        assert relative_l2(values, torch.cat([one[number] for one in slow])) < 1e-12


def test_many_targets_are_one_call() -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = sf.explain(model, x, target=targets, method=sf.Occlusion(4, 3))
    assert found.values.shape == (2, 3, *SHAPES[Image])
    for place in range(3):
        alone = sf.explain(model, x, target=targets[:, place], method=sf.Occlusion(4, 3))
        assert relative_l2(found.values[:, place], alone.values) < 1e-12


def test_token_ids_are_hidden_by_a_token() -> None:
    table = nn.Sequential(nn.Embedding(11, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()
    ids = torch.arange(12).view(2, 6) % 11
    found = sf.explain(table, ids, target=1, method=sf.Occlusion(2, 1), baseline=7)
    with torch.no_grad():
        slow = [
            naive.occlusion(
                one_target(table, 1), (row[None],), (torch.full((1, 6), 7),), [(2,)], [(1,)]
            )[0]
            for row in ids
        ]
    assert relative_l2(found.values, torch.cat(slow)) < 1e-12


@pytest.mark.parametrize("fill", [0.3, "blur", "mean"])
def test_what_hides(fill: Any) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    found = sf.explain(model, x, target=1, method=sf.Occlusion(4, 4), baseline=fill)
    other = sf.explain(model, x, target=1, method=sf.Occlusion(4, 4))
    assert relative_l2(found.values, other.values) > 0.01


class Spots(nn.Module):
    """A score that two places decide."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * x[:, 0, 5, 6] + x[:, 0, 20:22, 27].sum(1)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_hierarchy_that_keeps_all_is_the_plain_way(levels: int) -> None:
    model, x = make(Image), randn(2, *SHAPES[Image])
    plain = sf.explain(model, x, target=1, method=sf.Occlusion(3, 2))
    method = sf.Occlusion(3, 2, hierarchy=levels, keep=1.0)
    found = sf.explain(model, x, target=1, method=method)
    assert relative_l2(found.values, plain.values) < 1e-12
    assert int(found.points[0]) > int(plain.points[0])


def test_a_hierarchy_finds_the_same_places_with_fewer_points() -> None:
    x = randn(2, 1, 32, 32) + 3.0
    plain = sf.explain(Spots(), x, method=sf.Occlusion(2, 1))
    method = sf.Occlusion(2, 1, hierarchy=3, keep=0.2)
    found = sf.explain(Spots(), x, method=method)
    # 31 x 31 windows; 16 coarse ones and three times a fifth of four times as many.
    assert int(plain.points[0]) == 961
    assert int(found.points[0]) < 80
    large = plain.values.abs() > 0.5
    torch.testing.assert_close(found.values[large], plain.values[large])


def test_a_hierarchy_shares_out_what_it_does_not_split() -> None:
    """On a linear model coarse effects are sums, so that even shares add up to them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False)).double()
    x = torch.ones(1, 1, 8, 8).double()
    found = sf.explain(model, x, target=0, method=sf.Occlusion(1, 1, hierarchy=2, keep=0.01))
    weight = model[1].weight.detach().view(8, 8)
    assert float(found.values.sum()) == pytest.approx(float(weight.sum()), abs=1e-12)


def test_the_last_window_is_cut_at_the_edge() -> None:
    (start, stop) = Grid.of((10,), (4,), (3,)).bounds[0]
    assert (start.tolist(), stop.tolist()) == ([0, 3, 6], [4, 7, 10])
    (start, stop) = Grid.of((9,), (4,), (3,)).bounds[0]
    assert (start.tolist(), stop.tolist()) == ([0, 3, 6], [4, 7, 9])
    assert Grid.of((9,), (4,), (3,)).coarser().bounds[0][1].tolist() == [7, 9]
