"""saliency-fast demo: the shipped model on held-out digits."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from command import run
from PIL import Image

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.cli.explain import inside


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a demo with two examples, and what it printed is not kept."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert run("demo", "--examples", 2, "--out", folder) == 0
    return folder


def test_it_writes_inputs_overlays_records_and_a_page(made):
    methods, styles = ("integrated_gradients", "smoothgrad"), ("signed", "heat")
    expected = {"index.html"}
    for number in range(2):
        stem = f"digit-{number:02d}"
        expected |= {f"{stem}.png"}
        expected |= {f"{stem}.{method}.safetensors" for method in methods}
        expected |= {f"{stem}.{method}.{style}.png" for method in methods for style in styles}
    assert {one.name for one in made.iterdir()} == expected


def test_the_inputs_are_the_held_out_ones(made):
    samples = zoo.held_out()
    for number in range(2):
        levels = np.asarray(Image.open(made / f"digit-{number:02d}.png").convert("L"))
        assert np.array_equal(levels, (samples.images[number, 0] * 255).round().numpy())


def test_its_records_verify_by_themselves(made, capsys):
    for method in ("integrated_gradients", "smoothgrad"):
        assert run("verify", made / f"digit-00.{method}.safetensors") == 0
        assert "\nagrees" in capsys.readouterr().out


def test_the_page_tells_what_is_known(made):
    page = (made / "index.html").read_text()
    assert page.count("<article") == 2
    assert page.count("<img") == 2 * 5
    assert page.count('class="box"') == 2 * 5
    assert "none: this method has no completeness" in page
    assert len(re.findall(r"truly digit \d: ", page)) == 2
    assert len(re.findall(r"; the box covers \d+\.\d % of the picture", page)) == 4
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_the_summary_has_a_row_for_each_map(tmp_path, capsys):
    assert run("demo", "--examples", 1, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("digit-00 ")]
    assert len(rows) == 2
    assert printed.rstrip().endswith("index.html")


def test_the_share_inside_is_that_of_the_map(made):
    found = sf.load(made / "digit-00.integrated_gradients.safetensors")
    top, left, bottom, right = zoo.held_out().boxes[0].tolist()
    positive = found.values[0, 0].clamp_min(0).double()
    share = positive[top:bottom, left:right].sum() / positive.sum()
    told = inside(found, 0, (top, left, bottom, right))
    assert told.share == pytest.approx(float(share))
    assert told.area == pytest.approx((bottom - top) * (right - left) / 64**2)
    assert inside(found, 0, (0, 0, 64, 64)).share == pytest.approx(1.0)


def test_a_map_without_positive_evidence_has_none_inside(made):
    from dataclasses import replace

    found = sf.load(made / "digit-00.smoothgrad.safetensors")
    empty = replace(found, values=-torch.ones_like(found.values))
    assert inside(empty, 0, (0, 0, 9, 9)).share == 0.0


@pytest.mark.parametrize("count", [0, 100_000])
def test_too_few_or_too_many_examples(tmp_path, capsys, count):
    assert run("demo", "--examples", count, "--out", tmp_path) == 2
    assert "--examples must lie between 1 and" in capsys.readouterr().err
