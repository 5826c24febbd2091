"""The zoo's models read their digits, from the place where the boxes say the digits are."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.clutter import CANVAS, INK, Glyphs, hide, split_glyphs
from saliency_fast.zoo import MODELS, Samples, held_out

ROOT = Path(__file__).parents[2]
DATA = ROOT / "saliency_fast" / "zoo" / "data"
REPORTS = {"digits": "digits_cnn.json", "digits-vit": "digits_vit.json"}
SHIPPED = ["digits_cnn.safetensors", "digits_vit.safetensors", "held_out.safetensors"]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return held_out()


@pytest.fixture(scope="module")
def split() -> tuple[Glyphs, Glyphs]:
    pytest.importorskip("sklearn")
    return split_glyphs()


def _inside(boxes: Tensor) -> Tensor:
    """[N, 1, 64, 64] bool, true within each half-open box."""
    steps = torch.arange(CANVAS)
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows = (steps >= top) & (steps < bottom)
    columns = (steps >= left) & (steps < right)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


@torch.no_grad()
def _right(name: str, images: Tensor, labels: Tensor) -> int:
    return int((MODELS[name]()(images).argmax(1) == labels).sum())


def _least_hits(count: int, rate: float, risk: float = 1e-3) -> int:
    """The most hits that Binomial(count, rate) falls short of with at most probability `risk`."""
    below = 0.0
    for hits in range(count + 1):
        below += math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits)
        if below > risk:
            return hits
    return count


@pytest.mark.parametrize("file", SHIPPED)
def test_shipped_files_stay_small(file: str) -> None:
    assert (DATA / file).stat().st_size < 1_000_000


@pytest.mark.parametrize("name", MODELS)
def test_models_come_trained_in_eval_mode(name: str) -> None:
    model = MODELS[name]()
    assert not any(part.training for part in model.modules())
    assert all(value.dtype == torch.float32 for value in model.parameters())
    logits = model(torch.zeros(3, 1, CANVAS, CANVAS))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32


def test_samples_have_the_promised_layout(samples: Samples) -> None:
    count = len(samples)
    assert samples.images.shape == (count, 1, CANVAS, CANVAS)
    assert samples.images.dtype == torch.float32
    assert 0.0 <= float(samples.images.min()) < float(samples.images.max()) <= 1.0
    assert samples.labels.dtype == samples.boxes.dtype == torch.int64
    assert torch.bincount(samples.labels).tolist() == [count // 10] * 10
    assert samples.boxes.shape == (count, 4)


def test_boxes_lie_inside_the_image(samples: Samples) -> None:
    top, left, bottom, right = samples.boxes.unbind(1)
    assert bool(((top >= 0) & (top < bottom) & (bottom <= CANVAS)).all())
    assert bool(((left >= 0) & (left < right) & (right <= CANVAS)).all())


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_matches_the_card(name: str, samples: Samples) -> None:
    # The shipped scenes show distinct glyphs, so hits are binomial; the rate is the lower end of
    # the measured interval.
    report = json.loads((DATA / REPORTS[name]).read_text())
    least = _least_hits(len(samples), report["interval95"][0])
    assert _right(name, samples.images, samples.labels) >= least


@pytest.mark.parametrize("name", MODELS)
def test_decisions_hang_on_the_box(name: str, samples: Samples) -> None:
    box = _inside(samples.boxes)
    # Half a canvas away in both directions no box overlaps itself: the same area, only clutter.
    elsewhere = box.roll((CANVAS // 2, CANVAS // 2), (2, 3))
    assert not bool((box & elsewhere).any())
    whole = _right(name, samples.images, samples.labels)
    without_digit = _right(name, samples.images.masked_fill(box, 0.0), samples.labels)
    without_clutter = _right(name, samples.images.masked_fill(elsewhere, 0.0), samples.labels)
    assert without_digit < 0.4 * len(samples)
    assert without_clutter > 0.9 * whole


def test_boxes_hold_all_ink_of_the_digit(split: tuple[Glyphs, Glyphs]) -> None:
    scenes = hide(split[1], torch.arange(0, 300, 3), seed=3, strength=0.0)
    ink, box = scenes.images > INK, _inside(scenes.boxes)
    assert not bool((ink & ~box).any())
    for axis in (2, 3):
        # Tight: shrinking the box by one pixel on any side would cut ink off.
        hit, extent = ink.any(dim=axis), box.any(dim=axis)
        assert torch.equal(hit.to(torch.int8).argmax(-1), extent.to(torch.int8).argmax(-1))
        assert torch.equal(
            hit.flip(-1).to(torch.int8).argmax(-1), extent.flip(-1).to(torch.int8).argmax(-1)
        )


def test_clutter_reaches_up_to_the_box(split: tuple[Glyphs, Glyphs]) -> None:
    which = torch.arange(300)
    scenes = hide(split[1], which, seed=4)
    box = _inside(scenes.boxes)
    wide = _inside(scenes.boxes + torch.tensor([-4, -4, 4, 4]))
    rim = float(scenes.images[wide & ~box].mean())
    away = float(scenes.images[~wide].mean())
    assert 0.8 * away < rim < 1.2 * away


def test_generator_is_deterministic_in_its_seed(split: tuple[Glyphs, Glyphs]) -> None:
    which = torch.arange(20)
    first, again, other = (hide(split[0], which, seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, other.images)


def test_train_and_held_out_digits_are_disjoint(split: tuple[Glyphs, Glyphs]) -> None:
    train, rest = ({tuple(row) for row in part.images.flatten(1).tolist()} for part in split)
    assert len(split[0]) + len(split[1]) == 1797
    assert train.isdisjoint(rest)


def test_shipped_samples_come_from_the_held_out_digits(
    split: tuple[Glyphs, Glyphs], samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    importlib.import_module("train_digits").write_samples(
        split[1], tmp_path / "held_out.safetensors"
    )

    fresh = load_file(tmp_path / "held_out.safetensors")
    assert torch.equal(fresh["labels"], samples.labels)
    # Bicubic sums may round to the next grey level on another machine, and move a box edge.
    assert float((fresh["boxes"] - samples.boxes).abs().max()) <= 1
    grey = (samples.images * 255).round() - fresh["images"]
    assert float(grey.abs().max()) <= 1
