"""A report shown: well-formed and self-contained pages, curves, and tables that fit."""

from __future__ import annotations

import io
import json
import math
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reporting import Again, Check, Known, network, pictures

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.evaluate import Agreement, Deletion, Insertion, SensitivityN
from saliency_fast.evaluate.metric import field_meanings as meanings
from saliency_fast.evaluate.metric import fields_of
from saliency_fast.evaluate.metrics.agreement import COMPARISONS
from saliency_fast.evaluate.outcome import Interval, bootstrap
from saliency_fast.evaluate.reports.report import report
from saliency_fast.evaluate.reports.result import interval_text, plot_of, verdict_of, verdicts
from saliency_fast.render import plots
from tests.pages import Reader

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def shown():
    boxes = torch.tensor([[2, 3, 8, 9]] * 4)
    methods = {"gradient": "gradient", "<b>&mine": -pictures(), "integrated_gradients": "ig"}
    methods["integrated_gradients"] = sf.IntegratedGradients(steps=3)
    metrics = (Deletion(steps=4), Insertion(steps=4), Known(), Check(), Again())
    labels = ["cat & co", "dog", "<i>"]
    return report(
        network(), pictures(), methods=methods, metrics=metrics, boxes=boxes, labels=labels
    )


def test_the_page_is_well_formed_and_needs_nothing_else(shown):
    page = Reader(shown.html())
    assert not page.named("script")
    assert not page.named("link")
    for tag in ("img", "source"):
        for one in page.named(tag):
            source = one.get("src") or one.get("srcset")
            assert source.startswith("data:image/png;base64,")
            Image.open(io.BytesIO(b64decode(source.partition(",")[2]))).load()
    assert "http" not in shown.html()


def test_names_are_escaped(shown):
    html = shown.html()
    assert "<b>&" not in html
    assert "<i>" not in html
    text = Reader(html).text
    assert "<b>&mine" in text
    assert "cat & co" in text or "dog" in text or "<i>" in text


def test_tables_have_headers_with_a_scope_and_pictures_have_words(shown):
    page = Reader(shown.html())
    heads = page.named("th")
    assert heads
    assert all(one.get("scope") in ("row", "col", "colgroup", "rowgroup") for one in heads)
    assert all(one["alt"] for one in page.named("img"))
    assert len(page.named("h1")) == 1


def test_the_page_says_what_a_reader_must_know(shown):
    text = Reader(shown.html()).text
    for told in (
        "Has signs passes for gradient, <b>&mine",
        "Has signs fails for",
        "PASS",
        "again of <b>&mine",
        "Note: the first is left out",
        "What replaces the removed positions",
        "Samek et al., 2017",
        "threshold of the verdict",
        "bootstrap intervals of fewer than about 20 examples are too narrow",
        "The dashed frame is where the object is",
        "integrated_gradients(steps=3",
    ):
        assert told in text, told


def test_every_metric_with_curves_has_a_picture_for_light_and_dark(shown):
    page = Reader(shown.html())
    # Deletion, insertion and the known one.
    assert len(page.named("source")) == 3
    assert sum(one.get("class") == "plot" for one in page.named("img")) == 3


def test_inputs_and_maps_are_shown_with_their_boxes(shown):
    page = Reader(shown.html())
    pixels = [one for one in page.named("img") if one.get("class") == "pixels"]
    assert len(pixels) == 4 * (1 + 6)
    boxes = [one for one in page.named("div") if one.get("class") == "box"]
    assert len(boxes) == len(pixels)
    assert boxes[0]["style"] == "left:30.000%;top:16.667%;width:60.000%;height:50.000%"


def test_saving_writes_the_page_the_numbers_and_the_curves(shown, tmp_path):
    paths = shown.save(tmp_path / "a" / "b")
    names = [str(path.relative_to(tmp_path / "a" / "b")) for path in paths]
    curves = [f"curves/{name}.png" for name in ("deletion", "insertion", "known")]
    assert names == ["index.html", "report.json", *curves]
    assert json.loads(paths[1].read_text()) == shown.to_dict()
    assert Image.open(paths[2]).size == (1036, 518)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        shown.save(tmp_path / "file")


def test_without_matplotlib_everything_else_goes_on(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'saliency-fast\[plots\]'"):
        shown.curves(tmp_path)
    assert [one.name for one in shown.save(tmp_path)] == ["index.html", "report.json"]
    text = Reader((tmp_path / "index.html").read_text()).text
    assert "This page has no curves: matplotlib is not installed" in text


def test_bands_are_bootstrap_intervals_of_known_curves(shown):
    (band, *_) = plot_of(shown, "known").bands
    y = shown.outcomes["gradient"]["known"].curve.y[1:]
    assert band.mean == pytest.approx(y.mean(0).tolist())
    for place in range(2):
        interval = bootstrap(y[:, place])
        assert band.low[place] == pytest.approx(interval.low, abs=1e-12)
        assert band.high[place] == pytest.approx(interval.high, abs=1e-12)
    assert [one.control for one in plot_of(shown, "known").bands] == [False] * 3 + [True] * 3
    assert plot_of(shown, "has_signs") is None


def test_plots_differ_by_theme(shown):
    plot = plot_of(shown, "deletion")
    light, dark = (
        np.asarray(Image.open(io.BytesIO(plots.plot_png(plot, theme))).convert("L"))
        for theme in ("light", "dark")
    )
    assert light[0, 0] > 250
    assert dark[0, 0] < 60


@pytest.mark.parametrize("many", [1, 9])
def test_the_terminal_table_fits_a_hundred_columns(many):
    methods = {f"method_number_{number}": torch.rand(4, 12, 10) for number in range(many)}
    found = report(network(), pictures(), methods=methods, metrics=[Known(), Check()])
    text = str(found)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("known ↑") == math.ceil((many + 3) / 5)
    assert "FAIL" in text
    assert "95 % bootstrap intervals" in text


def test_show_prints_it(shown, capsys):
    shown.show()
    printed = capsys.readouterr().out
    assert "deletion ↓" in printed
    assert "note: " in printed


def test_maps_without_pictures_have_none():
    found = report(torch.nn.Linear(6, 2), torch.rand(3, 6), methods="gradient", metrics=[Known()])
    page = Reader(found.html())
    assert not [one for one in page.named("img") if one.get("class") == "pixels"]


def test_a_check_that_a_control_passes_is_a_bad_sign():
    methods = {"a": -torch.ones(4, 12, 10)}
    controls = {"inverted": lambda model, x, target: -x}
    found = report(network(), pictures(), methods=methods, controls=controls, metrics=[Check()])
    assert ("bad", "Has signs passes for inverted too, which never asked the model: beware.") in (
        verdicts(found)
    )


@pytest.mark.parametrize(
    ("ends", "better", "verdict"),
    [
        ((0.1, 0.3), "higher", "better"),
        ((0.1, 0.3), "lower", "worse"),
        ((-0.3, -0.1), "lower", "better"),
        ((-0.1, 0.1), "higher", "unclear"),
        ((0.0, 0.0), "higher", "unclear"),
        ((0.1, 0.3), "", "unclear"),
    ],
)
def test_a_difference_counts_where_its_interval_excludes_zero(ends, better, verdict):
    gap = Interval(sum(ends) / 2, *ends, 0.95, 9)
    assert verdict_of(gap, better) == verdict


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.41234, 0.38123, 0.45123, ("0.412", "0.381 … 0.451")),
        (-0.5, -1.23, 0.2, (f"{MINUS}0.5", f"{MINUS}1.2 … 0.2")),
        (1234.5, 1200.0, 1300.0, ("1234", "1200 … 1300")),
        (1e-9, 0.5e-9, 2e-9, (f"1.00e{MINUS}09", f"5.00e{MINUS}10 … 2.00e{MINUS}09")),
        (0.25, 0.25, 0.25, ("0.250", "no spread")),
        (1.0, 1.0 - 1e-15, 1.0, ("1.00", "no spread")),
        (0.01, -0.001, 0.05, ("0.010", f"{MINUS}0.001 … 0.050")),
        (0.01, -0.0004, 0.05, ("0.010", "0.000 … 0.050")),
        (math.nan, math.nan, math.nan, ("\N{EN DASH}", "")),
    ],
)
def test_numbers_have_the_digits_that_they_deserve(mean, low, high, expected):
    count = 0 if math.isnan(mean) else 5
    assert interval_text(Interval(mean, low, high, 0.95, count)) == expected


def test_the_meaning_of_fields_is_read_from_docstrings():
    told = meanings(Deletion)
    assert told["steps"].startswith("The number of steps")
    assert told["step_size"] == "Positions per step, instead of steps"
    assert told["seed"] == "Of the uniform replacement"
    assert set(meanings(SensitivityN)) == set(fields_of(SensitivityN))
    assert meanings(Known) == {}


def test_an_agreement_becomes_matrices(shown):
    undefined = torch.full((4, 6, 6), math.nan)
    matrices = dict.fromkeys(COMPARISONS, undefined) | {"overlap": torch.full((4, 6, 6), 0.5)}
    page = Reader(replace(shown, agreement=Agreement(shown.names, matrices, 0.1, "signed")).html())
    assert sum(one.get("class") == "matrix" for one in page.named("table")) == 1
    assert page.text.count("Agreement between methods") == 1
