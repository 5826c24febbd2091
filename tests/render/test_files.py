"""Frames as files, by extension."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.render.frames import encode, write_frames


def ramp(*shape: int) -> torch.Tensor:
    """Distinct uint8 frames [*shape, 3]."""
    count = int(np.prod(shape)) * 3
    return (torch.arange(count) * 7 % 251).to(torch.uint8).view(*shape, 3)


def test_png_keeps_every_pixel(tmp_path):
    frames = ramp(5, 9)
    path = write_frames(frames, tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(path)), frames.numpy())


def test_gif_has_one_frame_for_each(tmp_path):
    frames = torch.stack([torch.full((6, 4, 3), 40 * t, dtype=torch.uint8) for t in range(5)])
    path = write_frames(frames, tmp_path / "clip.GIF", frames_per_second=4)
    with Image.open(path) as clip:
        assert clip.n_frames == 5
        assert clip.size == (4, 6)
        assert clip.info["duration"] == 250
        for t in range(5):
            clip.seek(t)
            assert np.array_equal(np.asarray(clip.convert("RGB")), frames[t].numpy())


def test_animated_png_keeps_every_pixel(tmp_path):
    frames = torch.stack([ramp(6, 4), ramp(6, 4).flip(0), ramp(6, 4).flip(1)])
    path = write_frames(frames, tmp_path / "clip.apng", frames_per_second=4)
    with Image.open(path) as clip:
        assert clip.n_frames == 3
        assert clip.info["duration"] == 250
        for t in range(3):
            clip.seek(t)
            assert np.array_equal(np.asarray(clip.convert("RGB")), frames[t].numpy())


def test_gif_of_equal_frames_lasts_as_long(tmp_path):
    path = write_frames(torch.zeros(4, 6, 6, 3, dtype=torch.uint8), tmp_path / "still.gif")
    with Image.open(path) as clip:
        assert clip.info["duration"] * clip.n_frames == 500


@pytest.mark.parametrize("extension", [".png", ".gif"])
def test_the_same_frames_give_the_same_bytes(extension):
    frames = ramp(16, 16)
    assert encode(frames, extension) == encode(frames.clone(), extension)


def test_non_contiguous_frames(tmp_path):
    frames = ramp(5, 9).transpose(0, 1)
    path = write_frames(frames, tmp_path / "one.png")
    assert np.array_equal(np.asarray(Image.open(path)), frames.numpy())


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_unknown_extensions_list_the_valid_ones(tmp_path, name):
    with pytest.raises(InputError, match=r"\.png, \.gif, \.apng, \.mp4"):
        write_frames(ramp(4, 4), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_png_of_several_frames_is_refused(tmp_path):
    with pytest.raises(InputError, match="one frame: got 3"):
        write_frames(ramp(3, 4, 4), tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 4, 4, 3), (0, 4, 4, 3), (4, 4, 1), (3, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"\[H, W, 3\]"):
        encode(torch.zeros(shape, dtype=torch.uint8), ".gif")


def test_floats_are_refused():
    with pytest.raises(InputTypeError, match=r"float32"):
        encode(torch.zeros(4, 4, 3), ".png")


@pytest.mark.parametrize("missing", ["imageio.v2", "imageio_ffmpeg"])
def test_mp4_without_its_extra_names_it(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"saliency-fast\[video\]"):
        write_frames(ramp(3, 4, 4), tmp_path / "a.mp4")


def test_mp4_of_odd_sizes(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    frames = torch.stack([torch.full((33, 47, 3), 30 * t, dtype=torch.uint8) for t in range(6)])
    path = write_frames(frames, tmp_path / "clip.mp4")
    with imageio.get_reader(path, format="FFMPEG") as clip:
        read = np.stack([np.asarray(frame) for frame in clip])
    assert read.shape == (6, 34, 48, 3)
    # Lossy, but grey stays grey and gets brighter.
    assert np.abs(read[:, :33, :47].astype(int) - frames.numpy()).mean() < 6
