"""Infidelity against loops, Captum and Quantus on the same perturbations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import captum.metrics
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.inputs import replacement_of
from saliency_fast.evaluate.metrics.faithfulness import Infidelity
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate import naive_faithfulness as naive
from tests.models import SHAPES, Audio, Image, Tabular, Video, make, randn

TARGET = torch.tensor([3, 0, 4])
EXACT = 1e-10
"""float64, sums in another order."""


def one_score(model: nn.Module, target: int) -> naive.Score:
    return lambda x: float(model(x[None]).detach()[0, target])


def points_of(metric: Infidelity, x: Tensor, size: int = 0, number: int = 0) -> Tensor:
    """The perturbed inputs [n, B, *] that a metric makes."""
    fill = replacement_of(metric.substrate, x, metric.seed)
    count, write = metric.perturbations(x, fill, size, number)
    example = torch.arange(count * len(x)) % len(x)
    return write(example, torch.arange(count * len(x)) // len(x)).view(count, *x.shape)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("kind", [Tabular, Audio, Image, Video])
def test_patches_against_a_loop(kind: type[nn.Module], cumulative: bool) -> None:
    model, x, maps = make(kind), randn(3, *SHAPES[kind]), randn(3, *SHAPES[kind], seed=1)
    metric = Infidelity("patches", patch=(3, 5), cumulative=cumulative, substrate="mean")
    found = metric(model, x, maps, target=TARGET)
    fill = replacement_of("mean", x)
    for row in range(3):
        # Inputs of features have no channels.
        example = x[row] if x.dim() > 2 else x[row][None]
        base = fill[row].view_as(example)
        score = one_score(model, int(TARGET[row]))
        want = 0.0
        for edge in (3, 5):
            points = naive.patched(example, base, edge, cumulative=cumulative)
            points = [point.view_as(x[row]) for point in points]
            want += naive.infidelity(score, x[row], maps[row], points) / 2
        assert float(found.values[row]) == pytest.approx(want, rel=EXACT)


def test_squares_are_squares() -> None:
    x = randn(2, 3, 12, 10)
    points = points_of(Infidelity("squares", samples=400, patch=4, substrate=9.0), x, 4)
    corners = Counter()
    for point in points:
        gone = point == 9.0
        places = gone[0, 0].nonzero()
        assert gone.sum() == 2 * 3 * 16
        assert (places.amax(0) - places.amin(0)).tolist() == [3, 3]
        assert torch.equal(point[~gone], x[~gone])
        corners[tuple(places[0].tolist())] += 1
    # 9 x 7 corners, each about 6 times.
    assert len(corners) > 58
    assert max(corners) == (8, 6)
    assert max(corners.values()) < 20


CASES = [
    Infidelity(samples=13, sigma=0.3),
    Infidelity(samples=13, output="softmax"),
    Infidelity("squares", samples=11, patch=5, substrate="blur"),
    Infidelity("patches", patch=4, cumulative=True),
]


def captum_of(
    metric: Infidelity, model: nn.Module, x: Tensor, maps: Tensor, **options: Any
) -> Tensor:
    points = points_of(metric, x, 0 if metric.perturbation == "gaussian" else metric.patch)
    points = points.movedim(1, 0)
    forward = nn.Sequential(model, nn.Softmax(1)) if metric.output == "softmax" else model
    by_function = options.pop("by_function", None)

    def perturbed(several: Tensor, baselines: Tensor | None = None) -> Any:
        assert len(several) == len(points.flatten(0, 1))
        one = points.flatten(0, 1)
        return one if by_function else (several - one, one)

    return captum.metrics.infidelity(
        forward,
        by_function(perturbed) if by_function else perturbed,
        x,
        maps,
        target=TARGET,
        n_perturb_samples=points.shape[1],
        **options,
    )


@pytest.mark.parametrize("metric", CASES, ids=str)
def test_against_captum(metric: Infidelity) -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    for scaled in (False, True):
        mine = Infidelity(**{**vars(metric), "scaled": scaled})
        found = mine(model, x, maps, target=TARGET).values
        want = captum_of(metric, model, x, maps, normalize=scaled)
        assert torch.allclose(found, want, rtol=1e-9, atol=0)


def test_contributions_against_captum() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    x[0, :, :5] = 0.0
    metric = Infidelity("squares", samples=9, patch=5, contributions=True)
    found = metric(model, x, maps, target=TARGET).values
    decorate = captum.metrics.infidelity_perturb_func_decorator(multiply_by_inputs=True)
    zeros = torch.zeros_like(x)
    want = captum_of(metric, model, x, maps, by_function=decorate, baselines=zeros)
    assert torch.allclose(found, want, rtol=1e-9, atol=0)


def test_against_quantus() -> None:
    import quantus

    model, x = make(Image).float(), randn(4, 3, 12, 12).float()
    maps, target = randn(4, 3, 12, 12, seed=1).float(), torch.tensor([0, 1, 2, 3])
    theirs = quantus.Infidelity(
        perturb_patch_sizes=[3, 4],
        n_perturb_samples=1,
        normalise=False,
        abs=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    want = theirs(model, x.numpy(), target.numpy(), maps.numpy(), softmax=False)
    black = x.flatten(1).amin(1).view(-1, 1, 1, 1)
    metric = Infidelity("patches", patch=(3, 4), cumulative=True, substrate=black)
    found = metric(model, x, maps, target=target).values
    assert np.allclose(found.numpy(), np.array(want), rtol=1e-5, atol=0)


@pytest.mark.parametrize("perturbation", ["gaussian", "squares", "patches"])
def test_linear_models_are_told_exactly(perturbation: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 8, 5)).double()
    x, weights = randn(3, 2, 9, 8), model[1].weight.detach()[TARGET].view(3, 2, 9, 8)
    plain = Infidelity(perturbation, samples=20)(model, x, weights, target=TARGET)
    assert float(plain.values.abs().max()) < 1e-20
    assert float(plain.details["of_zero_map"].min()) > 1e-3
    parts = Infidelity(perturbation, samples=20, substrate="mean", contributions=True)
    gap = x - x.mean((2, 3), keepdim=True)
    assert float(parts(model, x, weights * gap, target=TARGET).values.max()) < 1e-20
    scaled = Infidelity(perturbation, samples=20, scaled=True)(
        model, x, -7 * weights, target=TARGET
    )
    assert float(scaled.values.max()) < 1e-20
    assert torch.allclose(scaled.details["factor"], torch.full((3,), -1 / 7).double())


def test_contributions_without_channels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 5)).double()
    x = randn(3, 3, 6, 6)
    x[:, 1, :2] = 0.0
    parts = (model[1].weight.detach()[TARGET].view(3, 3, 6, 6) * x).sum(1)
    metric = Infidelity("squares", samples=15, patch=3, contributions=True)
    assert float(metric(model, x, parts, target=TARGET).values.max()) < 1e-20


@pytest.mark.parametrize("metric", CASES, ids=str)
def test_neither_batch_nor_launches_matter(metric: Infidelity) -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 3, 12, 12, seed=1)
    want = metric(model, x, maps, target=TARGET).values
    found = metric(model, x, maps, target=TARGET, points_per_launch=4).values
    assert torch.allclose(found, want, rtol=EXACT)
    alone = metric(model, x[1:2], maps[1:2], target=0).values
    assert torch.allclose(alone, want[1:2], rtol=EXACT)


def test_what_does_not_change_says_nothing() -> None:
    x = randn(2, 3, 12, 12)
    x[1] = 0.0
    for metric in (Infidelity(samples=3), Infidelity("patches")):
        found = metric(make(Image), x, x, target=0)
        assert found.values.isnan().tolist() == [False, True]
        assert "examples [1]" in found.caveats[0]


def test_digits_beat_random_maps() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:12], samples.labels[:12]
    maps = sf.explain(model, x, method="integrated_gradients", target=target)
    noise = random_map(model, x, target)
    for metric in (
        Infidelity(samples=30),
        Infidelity("squares", samples=30, patch=8, contributions=True),
        Infidelity("squares", samples=30, patch=8, contributions=True, scaled=True),
    ):
        ours = metric(model, x, maps, target=target)
        assert ours.over(metric(model, x, noise, target=target)).high < 0


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"perturbation": "salt"}, InputError, "gaussian, patches, squares"),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"samples": 1.5}, InputTypeError, "samples must be a whole number"),
        ({"sigma": -1.0}, InputError, "sigma must be a positive"),
        ({"patch": ()}, InputError, "at least one size"),
        ({"patch": (3, 0)}, InputError, "patch must be at least 1"),
        ({"cumulative": True}, InputError, "cumulative is of perturbation='patches'"),
        ({"scaled": 1}, InputTypeError, "scaled must be True or False"),
        ({"substrate": "grey"}, InputError, "substrate must be one of"),
        ({"output": "margin"}, InputError, "output must be one of"),
        ({"seed": None}, InputTypeError, "seed must be a whole number"),
    ],
)
def test_errors(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Infidelity(**fields)
