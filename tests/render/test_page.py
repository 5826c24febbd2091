"""The page: well-formed, self-contained, escaped, and honest about what is not known."""

from __future__ import annotations

import math
from base64 import b64decode
from dataclasses import replace

import pytest
import torch

from saliency_fast.render.frames import encode
from saliency_fast.render.pages import (
    BoxEvidence,
    Entry,
    Figure,
    MapMeasurements,
    MapView,
    Page,
    delta_text,
    error_text,
    memory_text,
    page_html,
    percent_text,
)
from tests.pages import Reader

NUMBERS = MapMeasurements(
    score=9.5,
    gain=10.0,
    delta=-0.02,
    error=0.0123,
    converged=None,
    points=50,
    seconds=0.25,
    peak_bytes=3 * 1024**2,
    peak_measured=True,
)


def page(**changes: object) -> Page:
    data = encode(torch.zeros(8, 8, 3, dtype=torch.uint8), ".png")
    figure = Figure(data, "image/png", 8, "alt of <b>it</b>", "Input", (0.25, 0.5, 0.125, 0.25))
    view = MapView(
        "Integrated", "steps=50", "explains cat", (figure, figure), NUMBERS, "a.safetensors"
    )
    entry = Entry(
        name="a<script>alert(1)</script>",
        source="a&b.png",
        shape="3 x 8 x 8",
        sha256="ab" * 32,
        figure=figure,
        ranking=(("cat", 0.9), ('"dog"', 0.1)),
        truth="cat",
        maps=(view,),
    )
    entry = replace(entry, **changes)
    return Page("Title & more", "Lead", (entry,), (("torch", "2 <3"),), "saliency-fast 'x'")


def test_it_is_well_formed_and_escaped():
    html = page_html(page())
    found = Reader(html)
    assert "<script" not in html
    assert "a<script>alert(1)</script>" in found.text
    assert "a&b.png" in found.text
    assert "torch" in found.text
    assert "2 <3" in found.text
    assert "saliency-fast 'x'" in found.text


def test_it_loads_nothing_and_describes_its_pictures():
    found = Reader(page_html(page()))
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 3
    for image in images:
        assert image["alt"] == "alt of <b>it</b>"
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert b64decode(data).startswith(b"\x89PNG")
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe")
        assert "href" not in attributes
        assert "http" not in str(attributes.get("src", ""))
    assert "url(" not in page_html(page())


@pytest.mark.parametrize(("truth", "word"), [("cat", "right"), ("dog", "wrong")])
def test_a_known_label_is_compared(truth, word):
    assert f"truly {truth}: {word}" in Reader(page_html(page(truth=truth))).text


def test_inputs_without_picture_label_or_classes():
    bare = page(figure=None, ranking=(), truth=None, sha256=None)
    view = replace(bare.entries[0].maps[0], figures=())
    found = Reader(page_html(page(figure=None, ranking=(), truth=None, maps=(view,))))
    assert "No picture" in found.text
    assert "truly" not in found.text
    assert "Colour legend" not in str(found.tags)


def test_the_box_is_drawn_in_shares_of_the_picture():
    html = page_html(page())
    assert "left:25.000%;top:50.000%;width:12.500%;height:25.000%" in html


def test_what_numbers_say():
    assert delta_text(NUMBERS) == "\N{MINUS SIGN}0.02 (0.20 % of the score's gain)"
    assert delta_text(replace(NUMBERS, gain=0.0)) == "\N{MINUS SIGN}0.02"
    assert delta_text(replace(NUMBERS, delta=None)) == "none: this method has no completeness"
    assert error_text(NUMBERS) == "1.2 % of the map (relative L2)"
    assert error_text(replace(NUMBERS, error=math.nan)) == "unknown"
    assert error_text(replace(NUMBERS, error=0.0, points=1)).startswith("none")
    assert "NOT within" in error_text(replace(NUMBERS, converged=False))
    assert memory_text(NUMBERS) == "3.0 MiB (measured)"
    assert memory_text(replace(NUMBERS, peak_bytes=12, peak_measured=False)) == "12 B (planned)"
    assert percent_text(1e-7) == "under 0.01 %"
    assert percent_text(0.0) == "0 %"


def test_shares_are_told_with_their_chance_level():
    inside = replace(NUMBERS, inside=BoxEvidence(0.75, 0.125))
    view = replace(page().entries[0].maps[0], numbers=inside)
    text = Reader(page_html(page(maps=(view,)))).text
    assert "75.0 %; the box covers 12.5 % of the picture" in text
