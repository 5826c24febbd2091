"""saliency-fast explain: what it writes, for every kind of model and target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import run
from PIL import Image

import saliency_fast as sf

FAST = ("--method-arg", "steps=4")


def test_a_picture_gives_a_record_two_overlays_and_a_page(here, grey_png, capsys):
    assert run("explain", grey_png, "--model", "tiny:grey", "--out", "o", *FAST) == 0
    names = sorted(one.name for one in (here / "o").iterdir())
    stem = "grey.integrated_gradients"
    assert names == [f"{stem}.heat.png", f"{stem}.safetensors", f"{stem}.signed.png", "index.html"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4:] == [
        f"o/{stem}.safetensors",
        f"o/{stem}.signed.png",
        f"o/{stem}.heat.png",
        "o/index.html",
    ]
    recorded = sf.load(here / "o" / f"{stem}.safetensors")
    assert recorded.values.shape == (1, 1, 14, 12)
    assert recorded.provenance.notes == {"model": "tiny:grey", "input": str(grey_png)}
    assert recorded.provenance.parameters["steps"] == 4


def test_the_record_is_that_of_the_library(here, tiny, grey_png):
    run("explain", grey_png, "--model", "tiny:grey", "--target", "1", "--out", "o", *FAST)
    x = torch.from_numpy(np.asarray(Image.open(grey_png), dtype=np.float32) / 255)[None, None]
    found = sf.explain(tiny.grey(), x, target=1, method=sf.IntegratedGradients(steps=4))
    recorded = sf.load(here / "o" / "grey.integrated_gradients.safetensors")
    assert torch.equal(recorded.values, found.values)
    assert recorded.provenance.input_sha256 == found.provenance.input_sha256
    drawn = np.asarray(Image.open(here / "o" / "grey.integrated_gradients.signed.png"))
    assert np.array_equal(drawn, found.overlay(x)[0].numpy())


def test_pictures_are_the_same_every_time(here, grey_png):
    for out in ("a", "b"):
        options = ("--method", "smoothgrad", "--method-arg", "samples=4", "--out", out)
        assert run("explain", grey_png, "--model", "tiny:grey", *options) == 0
    for style in ("signed", "heat"):
        name = f"grey.smoothgrad.{style}.png"
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()


def test_maps_are_the_only_colour_in_an_overlay(here, colour_png):
    options = ("--method-arg", "steps=2", "--method-arg", "rule=left")
    assert run("explain", colour_png, "--model", "tiny:colour", *options) == 0
    recorded = sf.load("out/colour.integrated_gradients.safetensors")
    levels = torch.from_numpy(np.asarray(Image.open(colour_png), dtype=np.float32) / 255)
    grey = (levels @ torch.tensor([0.299, 0.587, 0.114]))[None, None]
    drawn = np.asarray(Image.open("out/colour.integrated_gradients.heat.png"))
    assert np.abs(drawn.astype(int) - recorded.overlay(grey, "heat")[0].numpy()).max() <= 1


def test_several_classes_give_a_map_each(here, grey_png):
    run("explain", grey_png, "--model", "tiny:grey", "--target", "0,2", "--out", "o", *FAST)
    recorded = sf.load(here / "o" / "grey.integrated_gradients.safetensors")
    assert recorded.values.shape == (1, 2, 1, 14, 12)
    for number in (0, 2):
        name = f"grey.integrated_gradients.class{number}.signed.png"
        assert (here / "o" / name).exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("predicted", "predicted"), ("2", "classes"), ("(1,)", "index"), ("(...,)", "index")],
)
def test_targets(here, grey_png, text, kind):
    out = ("--out", "o", *FAST)
    assert run("explain", grey_png, "--model", "tiny:grey", "--target", text, *out) == 0
    recorded = sf.load(here / "o" / "grey.integrated_gradients.safetensors")
    assert recorded.provenance.target["kind"] == kind


def test_one_number_per_example_and_no_picture(here, capsys):
    np.save("row.npy", np.ones(5, dtype=np.float32))
    assert run("explain", "row.npy", "--model", "tiny:single", "--target", "none", *FAST) == 0
    page = (here / "out" / "index.html").read_text()
    assert "No picture" in page
    assert not list((here / "out").glob("*.png"))


def test_several_methods_stand_side_by_side(here, grey_png):
    methods = ("--method", "integrated_gradients", "--method", "smoothgrad")
    fields = (
        "--method-arg",
        "integrated_gradients.steps=3",
        "--method-arg",
        "smoothgrad.samples=2",
    )
    assert run("explain", grey_png, "--model", "tiny:grey", *methods, *fields) == 0
    page = (here / "out" / "index.html").read_text()
    assert page.count('class="method"') == 2
    assert sf.load("out/grey.smoothgrad.safetensors").provenance.parameters["samples"] == 2


def test_a_volume_becomes_a_gif(here, clip_npy):
    assert run("explain", clip_npy, "--model", "tiny:volume", *FAST, "--style", "heat") == 0
    with Image.open("out/clip.integrated_gradients.heat.gif") as clip:
        assert clip.n_frames == 5
        assert clip.size == (6, 8)
    assert not list((here / "out").glob("*signed*"))
    recorded = sf.load("out/clip.integrated_gradients.safetensors")
    best = int(recorded.values[0, 0].abs().sum((1, 2)).argmax()) + 1
    assert f"frame {best} of 5, the strongest" in (here / "out" / "index.html").read_text()


def test_an_image_as_gif(here, grey_png):
    assert run("explain", grey_png, "--model", "tiny:grey", *FAST, "--overlay-format", "gif") == 0
    assert (here / "out" / "grey.integrated_gradients.signed.gif").exists()


def test_a_volume_as_png_is_refused(here, clip_npy, capsys):
    code = run("explain", clip_npy, "--model", "tiny:volume", *FAST, "--overlay-format", "png")
    assert code == 2
    assert "holds one frame: got 5" in capsys.readouterr().err


def test_a_batch_has_an_entry_for_each_example(here):
    np.save("many.npy", np.random.default_rng(0).random((3, 1, 9, 9), dtype=np.float32))
    assert run("explain", "many.npy", "--batched", "--model", "tiny:grey", *FAST) == 0
    recorded = sf.load("out/many.integrated_gradients.safetensors")
    assert recorded.values.shape == (3, 1, 9, 9)
    assert recorded.provenance.notes["batched"] is True
    page = (here / "out" / "index.html").read_text()
    assert page.count("<article") == 3
    assert "for 3 examples together" in page
    assert (here / "out" / "many.2.integrated_gradients.signed.png").exists()


@pytest.mark.parametrize("baseline", ["none", "0.5", "blur", "base.npy", "0,0.5", "mean,blur"])
def test_baselines(here, grey_png, baseline):
    np.save("base.npy", np.full((1, 14, 12), 0.25))
    options = ("--baseline", baseline, *FAST)
    assert run("explain", grey_png, "--model", "tiny:grey", *options) == 0


def test_a_model_that_is_a_plain_function(here, grey_png):
    assert run("explain", grey_png, "--model", "tiny:plain", *FAST) == 0
    assert "the model is a plain function" in (here / "out" / "index.html").read_text()


def test_the_plan_is_printed_and_nothing_runs(here, grey_png, capsys):
    options = ("--plan", "--points-per-launch", 2, "--memory-budget", "1GiB")
    assert run("explain", grey_png, "--model", "tiny:grey", *FAST, *options) == 0
    printed = capsys.readouterr().out
    assert "in 2 launches of 2" in printed
    assert not (here / "out").exists()


def test_progress_shows_a_bar(here, grey_png, capsys):
    assert run("explain", grey_png, "--model", "tiny:grey", *FAST, "--progress") == 0
    assert "integrated_gradients" in capsys.readouterr().err


def test_the_page_reproduces_itself(here, grey_png):
    (here / "with space.png").write_bytes(grey_png.read_bytes())
    run("explain", "with space.png", "--model", "tiny:grey", *FAST)
    page = (here / "out" / "index.html").read_text()
    assert "saliency-fast explain &#39;with space.png&#39; --model tiny:grey" in page
    assert "weights SHA-256" in page


def test_labels_of_probabilities_are_those_of_the_model(here, tiny, grey_png):
    run("explain", grey_png, "--model", "tiny:grey", *FAST)
    x = torch.from_numpy(np.asarray(Image.open(grey_png), dtype=np.float32) / 255)[None, None]
    shares = tiny.grey()(x).detach().softmax(1)[0]
    page = (here / "out" / "index.html").read_text()
    best, share = int(shares.argmax()), float(shares.max())
    assert f"predicted <strong>class {best}</strong>, {100 * share:.1f} %" in page


def test_a_precision_stands_in_the_record(here, grey_png):
    options = ("--model", "tiny:grey", "--precision", "bfloat16", "--out", "o", *FAST)
    assert run("explain", grey_png, *options) == 0
    recorded = sf.load(here / "o" / "grey.integrated_gradients.safetensors")
    assert recorded.provenance.precision == "bfloat16"
    assert float(recorded.precision_error.max()) > 0
    assert recorded.provenance.notes["model"] == "tiny:grey"
    assert recorded.provenance.notes["underflow"] == 0
    assert run("verify", here / "o" / "grey.integrated_gradients.safetensors") == 0


def test_auto_needs_no_more_than_its_name(here, grey_png):
    options = ("--model", "tiny:grey", "--precision", "auto", "--tolerance", "1e-6", *FAST)
    assert run("explain", grey_png, *options, "--out", "o") == 0
    recorded = sf.load(here / "o" / "grey.integrated_gradients.safetensors")
    assert recorded.provenance.precision == "float32"


def test_features_are_for_methods_that_take_them(here, grey_png, capsys):
    given = ("explain", grey_png, "--model", "tiny:grey", "--target", "1", "--features", "grid:2")
    assert run(*given, "--method", "gradient", "--out", "o") != 0
    assert "--features is for methods that take features away" in capsys.readouterr().err
    both = ("--method", "gradient", "--method", "feature_ablation", "--out", "o")
    assert run(*given, *both, "--plan") == 0
    assert run(*given, *both) == 0
    assert len(sf.load(here / "o" / "grey.feature_ablation.safetensors").values.unique()) <= 4
