"""Counterfactuals against a loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.controls import random_map
from saliency_fast.evaluate.inputs import replacement_of
from saliency_fast.evaluate.metrics.faithfulness import Counterfactual
from saliency_fast.zoo import digits_cnn, held_out
from tests.evaluate import naive_faithfulness as naive
from tests.models import SHAPES, Audio, Image, Scalar, Tabular, Video, make, randn

SHARES = (0.05, 0.2, 0.6, 0.85)
SOLVED = 1e-6


def region(values: Tensor, share: float, patch: int) -> Tensor:
    """The top places of a map [*spatial], or of its boxes, bool."""
    if patch == 1:
        gone = torch.zeros(values.numel(), dtype=torch.bool)
        gone[naive.top(values.flatten(), max(1, round(share * values.numel())))] = True
        return gone.view(values.shape)
    boxes = list(naive.grid_boxes(tuple(values.shape), patch))
    sums = torch.stack([values[box].sum() for box in boxes])
    gone = torch.zeros_like(values, dtype=torch.bool)
    for one in naive.top(sums, max(1, round(share * len(boxes)))):
        gone[boxes[one]] = True
    return gone


@pytest.mark.parametrize(
    ("kind", "by", "patch"),
    [
        (Tabular, "mean", 1),
        (Tabular, 0.3, 3),
        (Audio, "inpaint", 5),
        (Audio, "blur", 1),
        (Image, "inpaint", 1),
        (Image, "blur", 5),
        (Image, "zero", 1),
        (Video, "inpaint", 2),
    ],
)
def test_against_a_loop(kind: type[nn.Module], by: Any, patch: int) -> None:
    model, x, maps = make(kind), randn(4, *SHAPES[kind]), randn(4, *SHAPES[kind], seed=1)
    first = model(x).detach()
    target = first.argmax(1)
    found = Counterfactual(0.2, patch, by, 3, SHARES)(model, x, maps, target=target)
    fill = x if by == "inpaint" else replacement_of(by, x).expand_as(x)

    def replaced(row: int, share: float) -> Tensor:
        values = maps[row] if x.dim() == 2 else maps[row].sum(0)
        gone = region(values, share, patch)
        if by == "inpaint":
            point = naive.inpainted(x[row], gone)
        else:
            point = torch.where(gone, fill[row], x[row])
        return model(point[None]).detach()[0]

    for row in range(4):
        now, own = replaced(row, 0.2), int(target[row])
        assert int(found.details["decision"][row]) == int(now.argmax())
        assert float(found.values[row]) == float(now.argmax() != own)
        drop = first[row] - now
        assert abs(float(found.details["drop_logit"][row] - drop[own])) < SOLVED
        drop = first[row].softmax(0) - now.softmax(0)
        assert abs(float(found.details["drop_softmax"][row] - drop[own])) < SOLVED
        changed = [int(replaced(row, share).argmax()) != own for share in SHARES]
        assert found.curve.y[row].tolist() == changed
        needed = found.curve.x[changed.index(True)] if any(changed) else math.nan
        got = float(found.details["needed_share"][row])
        assert got == float(needed) or (math.isnan(got) and not any(changed))


def test_random_regions_are_the_same() -> None:
    metric, x = Counterfactual(draws=50, shares=(0.5,)), randn(1, 2, 6, 5)
    table = metric.region_sources(x, 30)
    assert torch.equal(table[0], torch.arange(30))
    assert torch.equal(table[-1], torch.arange(30))
    gone = torch.zeros(6, 5, dtype=torch.bool)
    gone[:2, 1:4] = True
    every = {
        tuple(gone.roll((down, right), (0, 1)).flatten().tolist())
        for down in range(6)
        for right in range(5)
    }
    drawn = {tuple(gone.flatten()[row].tolist()) for row in table[1:-1]}
    assert drawn <= every
    assert len(drawn) > 15
    features = metric.region_sources(randn(1, 30), 30)[1:-1]
    assert torch.equal(features.sort(1).values, torch.arange(30).expand(50, 30))


def test_random_regions_against_a_loop() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 12, 12, seed=1)
    model.requires_grad_(False)
    target = model(x).argmax(1)
    metric = Counterfactual(0.4, by="mean", draws=5)
    found = metric(model, x, maps, target=target)
    table = metric.region_sources(x, 144)[1:6]
    fill = x.mean((2, 3), keepdim=True).expand_as(x)
    for row in range(3):
        gone = region(maps[row], 0.4, 1).flatten()
        drops, changed = 0.0, 0
        for moved in table:
            point = torch.where(gone[moved].view(12, 12), fill[row], x[row])
            now = model(point[None]).detach()[0]
            changed += int(now.argmax() != target[row])
            drops += float((model(x[row : row + 1])[0] - now)[target[row]])
        assert float(found.details["random"][row]) == pytest.approx(changed / 5)
        assert float(found.details["random_drop_logit"][row]) == pytest.approx(drops / 5)


def test_other_decisions_say_nothing() -> None:
    model, x = make(Image), randn(3, 3, 12, 12)
    target = model(x).argmax(1)
    target[1] = (target[1] + 1) % 5
    found = Counterfactual()(model, x, x, target=target)
    assert found.values.isnan().tolist() == [False, True, False]
    assert "examples [1] is not the target" in found.caveats[0]
    assert not Counterfactual(draws=0)(model, x, x, target="predicted").values.isnan().any()


def test_neither_batch_nor_launches_matter() -> None:
    model, x, maps = make(Image), randn(3, 3, 12, 12), randn(3, 12, 12, seed=1)
    metric = Counterfactual(patch=3)
    want = metric(model, x, maps, target="predicted").details
    found = metric(model, x, maps, target="predicted", points_per_launch=4).details
    alone = metric(model, x[1:2], maps[1:2], target="predicted").details
    for name in ("drop_logit", "random_drop_logit", "random"):
        assert torch.allclose(found[name], want[name], atol=SOLVED)
        assert torch.allclose(alone[name], want[name][1:2], atol=SOLVED)


def test_digits_beat_random_maps_and_regions() -> None:
    model, samples = digits_cnn(), held_out()
    x, target = samples.images[:40], samples.labels[:40]
    maps = sf.explain(model, x, method="integrated_gradients", target=target)
    noise = random_map(model, x, target)
    for metric in (Counterfactual(patch=8), Counterfactual(patch=8, by="blur")):
        ours = metric(model, x, maps, target=target)
        assert ours.over(metric(model, x, noise, target=target)).low > 0
        assert float((ours.values - ours.details["random"]).nanmean()) > 0.3


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"share": 0.0}, InputError, "share must be a positive"),
        ({"share": 1.5}, InputError, "share is a share"),
        ({"by": "hole"}, InputError, "by must be one of inpaint, zero"),
        ({"by": True}, InputTypeError, "by must be one of inpaint, zero"),
        ({"draws": -1}, InputError, "draws must be at least 0"),
        ({"patch": 0}, InputError, "patch must be at least 1"),
        ({"shares": (0.3, 0.3)}, InputError, "shares must rise"),
    ],
)
def test_errors(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Counterfactual(**fields)


def test_errors_of_inputs() -> None:
    with pytest.raises(InputError, match="axes behind the channels"):
        Counterfactual()(make(Tabular), randn(2, 7), randn(2, 7), target="predicted")
    with pytest.raises(InputError, match="a target that is a class of several"):
        Counterfactual()(Scalar(), randn(2, 2, 5, 5), randn(2, 2, 5, 5))
