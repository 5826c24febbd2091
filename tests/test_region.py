"""Regions: what is asked about is right, what is not is zero, and less is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from tests.configured import configure


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()


@pytest.fixture(autouse=True)
def _always_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, lean_from=0)
    torch.manual_seed(0)


X = torch.randn(2, 3, 40, 48, generator=torch.Generator().manual_seed(1)).double()
BOX = (slice(4, 13), slice(30, 48))
METHODS = [
    sf.Gradient(),
    sf.IntegratedGradients(steps=8),
    sf.SmoothGrad(samples=6, sigma=0.2),
    sf.VarGrad(samples=6, sigma=0.2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.name)
@pytest.mark.parametrize("lean", [True, False])
def test_a_box_has_the_values_of_the_whole(method: Any, lean: bool) -> None:
    model = network()
    whole = sf.explain(model, X, target=2, method=method, lean=False)
    part = sf.explain(model, X, target=2, method=method, lean=lean, region=BOX)
    inside = (..., *BOX)
    torch.testing.assert_close(part.values[inside], whole.values[inside], rtol=1e-10, atol=1e-14)
    outside = part.values.clone()
    outside[inside] = 0
    assert not outside.any()
    assert part.delta is None
    assert ("tiles" in part.provenance.strategy) == lean
    assert part.provenance.region == [[4, 13], [30, 48]]


def test_pairs_and_masks_name_the_same_part() -> None:
    model, method = network(), sf.IntegratedGradients(steps=4)
    box = sf.explain(model, X, target=1, method=method, region=[(4, 13), (30, 48)]).values
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[BOX] = True
    assert torch.equal(sf.explain(model, X, target=1, method=method, region=mask).values, box)
    mask[5, 31] = False
    holed = sf.explain(model, X, target=1, method=method, region=mask).values
    assert not holed[..., 5, 31].any()
    assert torch.equal(holed[..., 6:13, 30:48], box[..., 6:13, 30:48])


def test_several_targets_and_batches() -> None:
    model, method = network(), sf.IntegratedGradients(rule="midpoint")
    whole = sf.explain(model, X, target=[[0, 3], [4, 1]], method=method, lean=False)
    part = sf.explain(model, X, target=[[0, 3], [4, 1]], method=method, region=BOX)
    torch.testing.assert_close(part.values[..., 4:13, 30:48], whole.values[..., 4:13, 30:48])


def test_a_region_of_a_model_without_local_calls_is_cut_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 48, 4), nn.Tanh(), nn.Linear(4, 5))
    model = model.double()
    whole = sf.explain(model, X, target=2, lean=False)
    part = sf.explain(model, X, target=2, region=BOX)
    torch.testing.assert_close(part.values[..., 4:13, 30:48], whole.values[..., 4:13, 30:48])
    assert part.values.count_nonzero() <= 2 * 3 * 9 * 18


def test_a_record_of_a_region_replays(tmp_path: Any) -> None:
    model = network()
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[8:20, 3:9] = True
    mask[10, 5] = False
    path = sf.explain(model, X, target=2, region=mask).save(tmp_path / "part.safetensors")
    assert sf.replay(path, model, X)
    path = sf.explain(model, X, target=2, region=BOX).save(tmp_path / "box.safetensors")
    assert sf.replay(path, model, X)


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ((slice(0, 4),), "one slice for each spatial axis"),
        ((slice(4, 4), slice(0, 4)), "empty"),
        ((slice(0, 8, 2), slice(0, 4)), "step 1"),
        (((0, 99), (0, 4)), "within its 40 places"),
        (torch.ones(40, 48), "must be bool"),
        (torch.ones(4, 4, dtype=torch.bool), "must be bool"),
        (torch.zeros(40, 48, dtype=torch.bool), "empty"),
    ],
)
def test_bad_regions(region: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sf.explain(network(), X, target=1, region=region)


def test_regions_need_spatial_axes() -> None:
    with pytest.raises(InputError, match="spatial"):
        sf.explain(nn.Linear(3, 2), torch.randn(2, 3), target=1, region=[(0, 1)])
    with pytest.raises(InputTypeError, match="bool mask"):
        sf.explain(network(), X, target=1, region="left")  # type: ignore[arg-type]


def test_less_is_computed() -> None:
    """The local calls run a second time on a crop alone."""
    model = network()

    engine = sf.Engine(model, sf.Gradient())
    engine(X, 2, region=BOX)
    way = next(iter(engine._location.cache.values())).strategy.within(((4, 13), (30, 48)), 0.6)
    assert way.tiled is not None
    assert way.tiled.share < 0.4
