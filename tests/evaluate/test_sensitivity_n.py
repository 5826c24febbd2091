"""Sensitivity-n and faithfulness correlation against loops and Quantus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.inputs import replacement_of
from saliency_fast.evaluate.maps import random_ranks
from saliency_fast.evaluate.metrics.faithfulness import (
    FaithfulnessCorrelation,
    SensitivityN,
)
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate import naive_faithfulness as naive
from tests.models import SHAPES, Audio, Image, Tabular, Video, make, randn

TARGET = torch.tensor([3, 0, 4])
EXACT = 1e-9
"""float64; correlations divide by spreads, which loses a digit."""


def one_score(model: nn.Module, target: int, shape: torch.Size) -> naive.Score:
    return lambda x: float(model(x.reshape(1, *shape)).detach()[0, target])


def subsets_of(seed: int, samples: int, places: int, count: int) -> list[list[int]]:
    ranks = random_ranks(seed, torch.arange(samples), places)
    return [(rank < count).nonzero().flatten().tolist() for rank in ranks]


@pytest.mark.parametrize("per", ["place", "element"])
@pytest.mark.parametrize("kind", [Tabular, Audio, Image, Video])
def test_against_a_loop(kind: type[nn.Module], per: str) -> None:
    model, x, maps = make(kind), randn(3, *SHAPES[kind]), randn(3, *SHAPES[kind], seed=1)
    metric = SensitivityN((0.1, 0.4), 7, substrate="mean", per=per, output="logit", seed=5)
    found = metric(model, x, maps, target=TARGET)
    fill = replacement_of("mean", x)
    rows = 1 if per == "element" or x.dim() == 2 else x.shape[1]
    places = x[0].numel() // rows
    for row, column in np.ndindex(3, 2):
        count = max(1, round((0.1, 0.4)[column] * places))
        want = naive.sensitivity_n(
            one_score(model, int(TARGET[row]), x.shape[1:]),
            x[row].reshape(rows, places),
            maps[row].reshape(rows, places).sum(0),
            fill[row].reshape(rows, places),
            subsets_of(5, 7, places, count),
        )
        assert float(found.curve.y[row, column]) == pytest.approx(want, rel=EXACT, abs=EXACT)
    assert torch.allclose(found.values, found.curve.y.mean(1))


def test_boxes_against_a_loop() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    found = SensitivityN((0.3,), 6, patch=5)(model, x, maps, target=TARGET)
    boxes = list(naive.grid_boxes((12, 12), 5))
    drawn = subsets_of(0, 6, len(boxes), round(0.3 * len(boxes)))
    for row in range(3):
        score = one_score(model, int(TARGET[row]), x.shape[1:])
        sums, drops = [], []
        for subset in drawn:
            point, total = x[row].clone(), 0.0
            for box in subset:
                point[(slice(None), *boxes[box])] = 0.0
                total += float(maps[row][(slice(None), *boxes[box])].sum())
            sums.append(total)
            drops.append(score(x[row]) - score(point))
        want = naive.correlation(sums, drops)
        assert float(found.values[row]) == pytest.approx(want, rel=EXACT, abs=EXACT)


def test_subsets_are_random_and_nested() -> None:
    ranks = random_ranks(3, torch.arange(400), 10)
    assert torch.equal(ranks.sort(1).values, torch.arange(10).expand(400, 10))
    # Each place is in half of the subsets of half the places: 200, give or take 10.
    assert ((ranks < 5).sum(0) - 200).abs().max() < 50
    assert not torch.equal(ranks, random_ranks(4, torch.arange(400), 10))
    assert torch.equal(ranks[7:9], random_ranks(3, torch.tensor([7, 8]), 10))


@pytest.mark.parametrize("metric", [SensitivityN(samples=9), FaithfulnessCorrelation(samples=9)])
def test_linear_models_add_up(metric: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 8, 5)).double()
    x = randn(3, 2, 9, 8)
    maps = x * model[1].weight.detach()[TARGET].view(3, 2, 9, 8)
    found = metric(model, x, maps, target=TARGET).values
    assert torch.allclose(found, torch.ones(3).double(), rtol=1e-12)
    assert float(metric(model, x, -maps, target=TARGET).values.max()) < -0.999


def test_faithfulness_correlation_against_quantus(monkeypatch: pytest.MonkeyPatch) -> None:
    import quantus

    model, x = make(Image).float(), randn(3, 3, 12, 12).float()
    maps = randn(3, 3, 12, 12, seed=1).float()
    drawn = [one for one in subsets_of(2, 20, 432, 50) for _ in range(3)]
    choices = iter(drawn)
    monkeypatch.setattr(np.random, "choice", lambda *_, **__: np.array(next(choices)))
    theirs = quantus.FaithfulnessCorrelation(
        nr_runs=20,
        subset_size=50,
        perturb_baseline=0.25,
        normalise=False,
        abs=False,
        return_aggregate=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    want = theirs(model, x.numpy(), TARGET.numpy(), maps.numpy(), softmax=False)
    metric = FaithfulnessCorrelation(50, 20, substrate=0.25, per="element", seed=2)
    found = metric(model, x, maps, target=TARGET)
    assert np.allclose(found.values.numpy(), np.array(want), rtol=0, atol=1e-5)
    assert found.parameters["places"] == 50
    same = SensitivityN((50 / 432,), 20, substrate=0.25, per="element", seed=2)
    assert torch.equal(same(model, x, maps, target=TARGET).values, found.values)


def test_ranked_against_quantus_and_a_loop() -> None:
    import quantus

    model, x = make(Image).float(), randn(6, 3, 12, 12).float()
    maps, target = randn(6, 3, 12, 12, seed=1).float(), torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = quantus.SensitivityN(
        features_in_step=12,
        n_max_percentage=2.4,  # of the places, which it counts without channels
        perturb_baseline=0.0,
        normalise=False,
        abs=False,
        return_aggregate=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    want = np.array(theirs(model, x.numpy(), target.numpy(), maps.numpy(), softmax=False))
    shares = tuple((step + 1) * 12 / 432 for step in range(len(want)))
    found = SensitivityN(shares, subsets="ranked", per="element")(model, x, maps, target=target)
    assert len(want) == 28
    assert np.allclose(found.details["across_examples"].numpy(), want, rtol=0, atol=1e-4)
    for row in range(6):
        flat, values = x[row].reshape(1, -1), maps[row].flatten()
        chosen = [naive.top(values, round(share * 432)) for share in shares]
        score = one_score(model, int(target[row]), x.shape[1:])
        one = naive.sensitivity_n(score, flat, values, torch.zeros_like(flat), chosen)
        assert float(found.values[row]) == pytest.approx(one, abs=1e-4)


def test_neither_batch_nor_launches_matter() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 12, 12, seed=1)
    metric = SensitivityN(samples=8)
    want = metric(model, x, maps, target=TARGET).values
    found = metric(model, x, maps, target=TARGET, points_per_launch=5).values
    assert torch.allclose(found, want, rtol=EXACT)
    alone = metric(model, x[1:2], maps[1:2], target=0).values
    assert torch.allclose(alone, want[1:2], rtol=EXACT)


def test_constants_say_nothing() -> None:
    x, maps = randn(2, 3, 12, 12), torch.ones(2, 12, 12).double()
    maps[0] = randn(12, 12, seed=3)
    found = SensitivityN((0.1, 0.2), 5)(make(Image), x, maps, target=0)
    assert found.values.isnan().tolist() == [False, True]
    assert "[1]" in found.caveats[0]


def test_digits_beat_random_maps() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:10], samples.labels[:10]

    def better(metric: Any, maps: Tensor) -> bool:
        noise = metric(model, x, random_map(model, x, target), target=target)
        return metric(model, x, maps, target=target).over(noise).low > 0.1

    maps = sf.explain(model, x, method="integrated_gradients", target=target)
    assert better(SensitivityN((0.01, 0.1), 30), maps)
    assert better(FaithfulnessCorrelation(0.2, 30, patch=8), maps)
    # Windows tell of places that go together.
    maps = sf.explain(model, x, method="occlusion", target=target)
    assert better(SensitivityN((0.1, 0.3), 30, patch=8), maps)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"shares": ()}, InputTypeError, "shares must be a tuple"),
        ({"shares": (0.5, 0.2)}, InputError, "shares must rise"),
        ({"shares": (0.5, 1.2)}, InputError, "shares is a share"),
        ({"samples": 1}, InputError, "samples must be at least 2"),
        ({"subsets": "all"}, InputError, "subsets must be one of random, ranked"),
        ({"per": "pixel"}, InputError, "per must be one of"),
        ({"subsets": "ranked", "shares": (0.5,)}, InputError, "shares must be several"),
        ({"subsets": "ranked", "patch": 2}, InputError, "patch is of subsets='random'"),
        ({"per": "element", "patch": 2}, InputError, "patch goes with per='place'"),
        ({"output": "margin"}, InputError, "output must be one of"),
    ],
)
def test_errors(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SensitivityN(**fields)


def test_errors_of_one_size() -> None:
    with pytest.raises(InputError, match="size must be at least 1"):
        FaithfulnessCorrelation(0)
    with pytest.raises(InputError, match="at most the 144 positions"):
        FaithfulnessCorrelation(500)(make(Image), randn(1, 3, 12, 12), randn(1, 12, 12), target=0)
