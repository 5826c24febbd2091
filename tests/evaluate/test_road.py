"""ROAD against a loop and Quantus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.metrics.faithfulness import Road
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate import naive_faithfulness as naive
from tests.models import SHAPES, Audio, Image, Scalar, Tabular, Video, make, randn

TARGET = torch.tensor([3, 0, 4])
SOLVED = 1e-6
"""Inpainting is solved to 1e-8 of its right side."""


def loop(model: nn.Module, x: Tensor, maps: Tensor, metric: Road, sign: float) -> Tensor:
    """Outputs [B, n, classes] of every example with every share inpainted."""
    found = []
    for example, values in zip(x, maps, strict=True):
        flat = sign * values.sum(0).flatten()
        rows = []
        for share in metric.shares:
            missing = torch.zeros(len(flat), dtype=torch.bool)
            missing[naive.top(flat, int(share * len(flat) + 1e-9))] = True
            point = naive.inpainted(example, missing.view(values.shape[1:]))
            rows.append(model(point[None]).detach()[0])
        found.append(torch.stack(rows))
    return torch.stack(found)


@pytest.mark.parametrize("order", ["most_first", "least_first"])
@pytest.mark.parametrize("kind", [Audio, Image, Video])
def test_against_a_loop(kind: type[nn.Module], order: str) -> None:
    model, x, maps = make(kind), randn(3, *SHAPES[kind]), randn(3, *SHAPES[kind], seed=1)
    row = torch.arange(3)
    for output in ("accuracy", "softmax", "logit"):
        metric = Road((0.15, 0.5, 0.9), order, output, noise=0)
        found = metric(model, x, maps, target=TARGET)
        wanted = loop(model, x, maps, metric, 1.0 if order == "most_first" else -1.0)
        if output == "accuracy":
            want = (wanted.argmax(2) == TARGET[:, None]).double()
        else:
            wanted = wanted.softmax(2) if output == "softmax" else wanted
            want = wanted[row, :, TARGET]
        assert (found.curve.y - want).abs().max() < SOLVED
        assert (found.values - want.mean(1)).abs().max() < SOLVED
        assert found.better == ("lower" if order == "most_first" else "higher")


def test_against_quantus() -> None:
    import quantus

    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:6], samples.labels[:6]
    maps = sf.explain(model, x, method="integrated_gradients", target=target).values
    # No two alike, for Quantus's order of equal ones is not told.
    maps = maps + 1e-4 * maps.std() * random_map(model, x, target)[:, None]
    theirs = quantus.ROAD(
        percentages=[10, 29, 50, 70, 90],
        noise=0.0,
        normalise=False,
        abs=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    want = theirs(model, x.numpy(), target.numpy(), maps.numpy(), softmax=False)
    metric = Road((0.1, 0.29, 0.5, 0.7, 0.9), noise=0)
    found = metric(model, x, maps, target=target).curve.y.mean(0)
    assert np.allclose(found.numpy(), np.array(list(want.values())), atol=1e-12)


def test_noise_is_small_seeded_and_only_where_it_was_missing() -> None:
    seen = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make(Image)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.inner(x)

    model, x, maps = Seen(), randn(1, 3, 12, 12), randn(1, 12, 12, seed=1)

    def points(**fields: Any) -> Tensor:
        seen.clear()
        Road((0.5,), **fields)(model, x, maps, target=0)
        return seen[-1][-1]

    clean, noisy = points(noise=0), points(noise=0.05)
    kept = (clean == x[0]).all(0)
    assert int(kept.sum()) == 72
    assert torch.equal(noisy[:, kept], clean[:, kept])
    spread = (noisy - clean)[:, ~kept].std() / (0.05 * (x.max() - x.min()))
    assert 0.85 < float(spread) < 1.15  # 216 draws: 5 %
    assert torch.equal(noisy, points(noise=0.05))
    assert not torch.equal(noisy, points(noise=0.05, seed=1))


def test_neither_batch_nor_launches_matter() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 12, 12, seed=1)
    metric = Road(output="logit")
    want = metric(model, x, maps, target=TARGET).curve.y
    found = metric(model, x, maps, target=TARGET, points_per_launch=4).curve.y
    assert torch.allclose(found, want, rtol=SOLVED)
    alone = metric(model, x[1:2], maps[1:2], target=0).curve.y
    assert torch.allclose(alone, want[1:2], rtol=SOLVED)


def test_digits_beat_random_maps() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:16], samples.labels[:16]
    maps = sf.explain(model, x, method="occlusion", target=target)
    noise = random_map(model, x, target)
    ours, theirs = (Road((0.1, 0.2, 0.3))(model, x, one, target=target) for one in (maps, noise))
    assert ours.over(theirs).high < 0


def test_errors() -> None:
    with pytest.raises(InputError, match="shares must rise"):
        Road((0.5, 0.1))
    with pytest.raises(InputTypeError, match="shares must be a tuple"):
        Road(0.5)
    with pytest.raises(InputError, match="order must be one of"):
        Road(order="first")
    with pytest.raises(InputError, match="output must be one of accuracy, softmax, logit"):
        Road(output="margin")
    with pytest.raises(InputError, match="noise must be a positive"):
        Road(noise=-0.1)
    with pytest.raises(InputError, match="axes behind the channels"):
        Road()(make(Tabular), randn(2, 7), randn(2, 7), target=0)
    x = randn(2, 2, 5, 5)
    with pytest.raises(InputError, match="a target that is a class of several"):
        Road()(Scalar(), x, x)
    assert Road(output="logit")(Scalar(), x, x).values.shape == (2,)


def test_shares_are_whole_places() -> None:
    # .29 * 100 is 28.999999999999996.
    found = Road((0.29, 0.295))(make(Image), randn(1, 3, 10, 10), randn(1, 10, 10), target=0)
    assert found.curve.x.tolist() == [0.29, 0.29]
