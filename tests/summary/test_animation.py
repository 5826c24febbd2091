"""Animations: so many frames, one colour scale, and the overlay at the end."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.render.frames import frames as drawn
from saliency_fast.summary import animate, progress
from saliency_fast.summary.animation import BAR, FILL, OPACITY, PERCENTILE, STRIP, caption
from saliency_fast.zoo import digits_cnn, held_out


@pytest.fixture(scope="module")
def engine():
    return sf.Engine(digits_cnn(), sf.SmoothGrad(samples=48))


@pytest.fixture(scope="module")
def x():
    return held_out().images[:1]


def alone(found, number=-1):
    """The picture of a frame as it was before it was enlarged."""
    height, width = found.size
    return found.frames[number, : height : found.zoom, : width : found.zoom]


@pytest.mark.parametrize("style", ["signed", "heat"])
def test_the_last_frame_is_the_overlay(engine, x, style):
    found = progress(engine, x, "predicted", style=style, frames=12)
    whole = engine(x, "predicted")
    assert torch.equal(alone(found), whole.overlay(x, style)[0])
    assert found.moments[-1].error == pytest.approx(float(whole.error[0]), rel=1e-5)
    assert found.moments[-1].points == 48


def test_frames_share_the_scale_of_the_last(engine, x):
    found = progress(engine, x, "predicted", frames=6)
    last = found.moments[-1].values.abs().flatten().sort().values
    scale = last[math.ceil(PERCENTILE / 100 * (len(last) - 1))][None]
    for number, one in enumerate(found.moments):
        expected = drawn(x, one.values, "signed", PERCENTILE, OPACITY, scale)[0]
        assert torch.equal(alone(found, number), expected)


@pytest.mark.parametrize("frames", [1, 2, 7, 12, 48, 400])
def test_there_are_as_many_frames_as_asked_for_at_most(engine, x, frames):
    found = progress(engine, x, 3, frames=frames)
    points = [one.points for one in found.moments]
    assert len(found.frames) == len(points) <= frames
    assert frames / 2 <= len(points) or frames == 400
    assert points == sorted(set(points))
    assert points[-1] == 48
    assert found.frames.shape[1] == found.size[0] + BAR + STRIP


def test_the_bar_grows_with_the_points(engine, x):
    found = progress(engine, x, 3, frames=8)
    row = found.frames[:, found.size[0]]
    lengths = (row == torch.tensor(FILL, dtype=torch.uint8)).all(2).sum(1).tolist()
    width = found.frames.shape[2]
    assert lengths == [round(width * one.points / 48) for one in found.moments]


def test_the_error_is_written(engine, x):
    found = progress(engine, x, 3, frames=4)
    assert caption(found.moments[-1], 48).startswith("48/48 points, error ")
    assert "unknown" in caption(found.moments[-1].__class__(x, math.nan, 3), 48)
    texts = found.frames[:, found.size[0] + BAR :]
    assert not torch.equal(texts[0], texts[-1])


def test_a_stream_of_ones_own(engine, x):
    finer = sf.Engine(engine.model, engine.method, points_per_launch=16)
    found = progress(finer.stream(x, 3), x, frames=24)
    assert [one.points for one in found.moments] == [16, 32, 48]


@pytest.mark.parametrize("extension", ["gif", "apng", "mp4"])
def test_files(engine, x, tmp_path, extension):
    path = animate(engine, x, 3, tmp_path / f"map.{extension}", frames=5, frames_per_second=4)
    assert path.stat().st_size > 1000
    if extension != "mp4":
        with Image.open(path) as clip:
            assert clip.n_frames >= 4
            assert clip.size == (192, 212)


def test_videos_show_their_strongest_frame(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 40, 2))
    x = torch.zeros(1, 1, 3, 4, 40)
    x[:, :, 2] = 1.0
    engine = sf.Engine(model, sf.IntegratedGradients(steps=8), layout="BCTHW")
    found = progress(engine, x, 1)
    assert torch.equal(alone(found), engine(x, 1).overlay(x)[0, 2])


def test_one_launch_is_one_frame(x):
    assert len(progress(sf.Engine(digits_cnn(), sf.Gradient()), x, 3).frames) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inputs": torch.rand(2, 1, 64, 64)}, InputError, r"pass x\[:1\]"),
        ({"inputs": torch.rand(1, 64)}, InputError, "one image, video or volume"),
        ({"inputs": "x"}, InputTypeError, "one tensor"),
        ({"frames": 0}, InputError, "frames must be"),
        ({"style": "rainbow"}, InputError, "style must be"),
        ({"frames_per_second": 0}, InputError, "frames_per_second"),
        ({"path": "map.jpg"}, InputError, "gif"),
        ({"target": [[1, 2]]}, InputError, "one map"),
    ],
)
def test_errors_of_animations(engine, x, tmp_path, change, error, words):
    about = {"inputs": x, "target": 3, "path": "map.gif", "frames": 3} | change
    path = tmp_path / about.pop("path")
    with pytest.raises(error, match=words):
        animate(engine, about.pop("inputs"), about.pop("target"), path, **about)
    with pytest.raises(InputError, match="stream holds no map"):
        progress([], x)


def test_maps_of_layers_have_no_picture(x):
    engine = sf.Engine(digits_cnn(), sf.IntegratedGradients(steps=2), at="auto")
    with pytest.raises(InputError, match="does not lie over the input"):
        progress(engine.stream(x, 3), x)
