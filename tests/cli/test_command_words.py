"""saliency-fast explain --summary and --animate."""

from __future__ import annotations

from command import run
from markupsafe import escape
from PIL import Image

FAST = ("--method-arg", "steps=4")


def test_a_summary_is_printed_written_and_shown(here, grey_png, capsys):
    assert run("explain", grey_png, "--model", "tiny:grey", "--out", "o", "--summary", *FAST) == 0
    text = (here / "o" / "grey.integrated_gradients.txt").read_text(encoding="utf-8").strip()
    assert text.startswith("The model decides for class ")
    printed = capsys.readouterr().out
    assert f"grey, IntegratedGradients: {text}" in printed
    assert "o/grey.integrated_gradients.txt" in printed
    assert escape(text) in (here / "o" / "index.html").read_text(encoding="utf-8")


def test_a_summary_of_each_of_several_classes(here, grey_png):
    options = ("--target", "0,2", "--out", "o", "--summary", *FAST)
    assert run("explain", grey_png, "--model", "tiny:grey", *options) == 0
    for number in (0, 2):
        text = (here / "o" / f"grey.integrated_gradients.class{number}.txt").read_text()
        assert f"class {number}" in text


def test_a_summary_of_a_table(here):
    import numpy as np

    np.save(here / "row.npy", np.arange(5, dtype=np.float32) / 5)
    options = ("--target", "none", "--out", "o", "--summary", *FAST)
    assert run("explain", here / "row.npy", "--model", "tiny:single", *options) == 0
    assert "The output is " in (here / "o" / "row.integrated_gradients.txt").read_text()


def test_maps_of_layers_have_no_summary(here, grey_png, capsys):
    options = ("--at", "conv", "--summary", *FAST)
    assert run("explain", grey_png, "--model", "tiny:grey", *options) == 2
    assert "maps of the input" in capsys.readouterr().err


def test_an_animation_of_methods_that_take_several_launches(here, grey_png, capsys):
    options = (
        "--method",
        "integrated_gradients",
        "--method",
        "gradient",
        "--out",
        "o",
        "--animate",
    )
    assert run("explain", grey_png, "--model", "tiny:grey", *options) == 0
    assert "grey.integrated_gradients.progress.gif" in capsys.readouterr().out
    assert not (here / "o" / "grey.gradient.progress.gif").exists()
    with Image.open(here / "o" / "grey.integrated_gradients.progress.gif") as clip:
        assert clip.n_frames > 10


def test_clips_and_several_classes_are_animated_too(here, clip_npy):
    options = ("--target", "0,2", "--out", "o", "--animate")
    assert run("explain", clip_npy, "--model", "tiny:volume", *options) == 0
    for number in (0, 1):
        assert (here / "o" / f"clip.integrated_gradients.map{number}.progress.gif").exists()
