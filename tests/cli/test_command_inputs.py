"""Every kind of INPUT, and what is said of the unreadable ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from safetensors.torch import save_file

import saliency_fast as sf
from saliency_fast.cli.arguments import Form, read_form, read_inputs
from saliency_fast.errors import InputError


def read(source, form=None, batched=False, dtype=torch.float32):
    return read_inputs([str(source)], form or Form(), dtype, batched)


def test_a_grey_png(grey_png):
    (one,) = read(grey_png)
    assert one.name == "grey"
    assert one.x.shape == (1, 1, 14, 12)
    assert one.x.dtype == torch.float32
    expected = np.asarray(Image.open(grey_png), dtype=np.float32) / 255
    assert np.array_equal(one.x[0, 0].numpy(), expected)


def test_a_colour_png_and_its_grey(colour_png):
    assert read(colour_png)[0].x.shape == (1, 3, 14, 12)
    assert read(colour_png, Form(channels=1))[0].x.shape == (1, 1, 14, 12)


def test_grey_as_colour_and_resized(grey_png):
    (one,) = read(grey_png, Form((20, 10), 3))
    assert one.x.shape == (1, 3, 20, 10)
    assert 0 <= float(one.x.min()) <= float(one.x.max()) <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_a_jpeg(here, colour_png, suffix):
    Image.open(colour_png).save(here / f"a{suffix}", "JPEG")
    assert read(here / f"a{suffix}")[0].x.shape == (1, 3, 14, 12)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA"])
def test_other_png_modes(here, colour_png, mode):
    Image.open(colour_png).convert(mode).save(here / "a.png")
    channels = 1 if mode in ("1", "LA") else 3
    assert read(here / "a.png")[0].x.shape == (1, channels, 14, 12)


def test_sixteen_bits_keep_their_depth(here):
    levels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 257
    Image.fromarray(levels).save(here / "deep.png")
    (one,) = read(here / "deep.png")
    assert np.allclose(one.x[0, 0].numpy(), levels / 65535, atol=1e-7)


def test_a_turned_photograph_is_turned_back(here, colour_png):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(colour_png).save(here / "a.jpg", exif=exif)
    assert read(here / "a.jpg")[0].x.shape == (1, 3, 12, 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_array_is_one_example_unless_batched(here, dtype):
    np.save("a.npy", np.arange(24).reshape(2, 3, 4))
    (one,) = read("a.npy", dtype=dtype)
    assert one.x.shape == (1, 2, 3, 4)
    assert one.x.dtype == dtype
    assert float(one.x.max()) == 23
    assert read("a.npy", batched=True)[0].x.shape == (2, 3, 4)


def test_tensors_all_or_one(here):
    save_file({"b": torch.ones(2, 3), "a/x": torch.zeros(4)}, "t.safetensors")
    every = read("t.safetensors")
    assert [one.name for one in every] == ["t.a_x", "t.b"]
    assert [one.source for one in every] == ["t.safetensors::a/x", "t.safetensors::b"]
    (one,) = read("t.safetensors::b")
    assert one.x.shape == (1, 2, 3)
    with pytest.raises(InputError, match="no tensor 'c': expected one of a/x, b"):
        read("t.safetensors::c")


def test_a_folder_in_order_with_unique_names(here, grey_png):
    folder = here / "many"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(grey_png.read_bytes())
    np.save(folder / "a.npy", np.zeros((1, 14, 12)))
    (folder / "notes.txt").write_text("not an input")
    assert [one.name for one in read(folder)] == ["a", "a-2", "b"]
    assert run("explain", folder, "--model", "tiny:grey", "--method-arg", "steps=2") == 0
    assert sf.load("out/a-2.integrated_gradients.safetensors").provenance.notes["input"] == str(
        folder / "a.png"
    )


def test_what_cannot_be_read_is_named(here):
    (here / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (here / "no.jpg").write_bytes(b"nothing")
    (here / "no.npy").write_bytes(b"nothing")
    (here / "no.safetensors").write_bytes(b"nothing")
    np.save("pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("words.npy", np.array(["a"]))
    (here / "a.txt").write_text("")
    (here / "empty").mkdir()
    for name in (
        *("cut.png", "no.jpg", "no.npy", "no.safetensors", "pickled.npy", "words.npy"),
        *("a.txt", "empty", "absent.png", "absent.npy"),
    ):
        with pytest.raises(InputError, match=rf"{name}.*expected a picture \(\.png"):
            read(name)


def test_a_truncated_picture_is_named(here, colour_png):
    (here / "cut.png").write_bytes(colour_png.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.png cannot be read"):
        read("cut.png")


@pytest.mark.parametrize(("text", "size"), [("24", (24, 24)), ("24x30", (24, 30))])
def test_sizes(text, size):
    assert read_form(text, None) == Form(size)


@pytest.mark.parametrize("text", ["0", "a", "3x", "1x2x3", "-4"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="--size"):
        read_form(text, 1)
