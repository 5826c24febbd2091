"""saliency-fast evaluate: from files and the built-in scenes to tables, a page and an exit code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command import run
from PIL import Image

from saliency_fast.cli import evaluate as command
from saliency_fast.cli.arguments import read_boxes
from saliency_fast.errors import InputError
from saliency_fast.evaluate import Deletion
from saliency_fast.evaluate.reports.report import report

TINY = ("--model", "tiny:grey")
FAST = ("--method", "gradient", "--metric", "deletion", "--metric-arg", "steps=3")


@pytest.fixture
def pair(here, grey_png):
    """Two grey pictures of one size."""
    levels = np.random.default_rng(5).integers(0, 256, (14, 12), dtype=np.uint8)
    Image.fromarray(levels).save(here / "other.png")
    return "grey.png", "other.png"


def numbers(folder="out"):
    with open(f"{folder}/report.json") as opened:
        return json.load(opened)


def test_numbers_are_those_of_the_library(here, pair, tiny):
    assert run("evaluate", *pair, *TINY, *FAST) == 0
    x = torch.stack([torch.from_numpy(np.asarray(Image.open(one)) / 255.0) for one in pair])
    x = x[:, None].float()
    alone = report(tiny.grey().eval(), x, methods="gradient", metrics=[Deletion(steps=3)])
    cell = numbers()["outcomes"]["gradient"]["deletion"]
    assert cell["values"] == pytest.approx(alone.outcomes["gradient"]["deletion"].values.tolist())
    assert cell["parameters"]["steps"] == 3


def test_it_writes_a_page_numbers_and_curves_and_says_so(here, pair, capsys):
    assert run("evaluate", *pair, *TINY, *FAST, "--out", "there") == 0
    printed = capsys.readouterr().out
    assert "deletion ↓" in printed
    for name in ("index.html", "report.json", "curves/deletion.png"):
        assert (here / "there" / name).is_file()
        assert f"there/{name}" in printed
    assert "saliency-fast evaluate grey.png other.png" in (here / "there/index.html").read_text()


def test_json_is_all_that_is_printed(here, pair, capsys):
    assert run("evaluate", *pair, *TINY, *FAST, "--json", "--no-controls") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["gradient"]
    assert found == numbers()


def test_options_reach_methods_and_metrics(here, pair):
    options = (
        "--method",
        "smoothgrad",
        "--method-arg",
        "smoothgrad.samples=4",
        "--method",
        "gradient",
    )
    metrics = ("--metric", "deletion", "--metric", "insertion", "--metric-arg", "insertion.steps=4")
    further = ("--substrate", "blur", "--steps", "6", "--confidence", "0.9", "--seed", "4")
    assert run("evaluate", *pair, *TINY, *options, *metrics, *further, "--target", "1") == 0
    found = numbers()
    assert found["provenance"]["methods"]["smoothgrad"]["parameters"]["samples"] == 4
    cells = found["outcomes"]["gradient"]
    assert cells["deletion"]["parameters"]["substrate"] == "blur"
    assert (
        cells["deletion"]["parameters"]["steps"],
        cells["insertion"]["parameters"]["steps"],
    ) == (6, 4)
    assert (found["confidence"], found["seed"]) == (0.9, 4)
    assert found["provenance"]["classes"] in (1, [1, 1])


def test_the_built_in_scenes_have_labels_and_boxes(here, capsys):
    assert run("evaluate", "--model", "digits", "--examples", 3, "--quick", *FAST) == 0
    found = numbers()
    assert "3 built-in held-out scenes: their true digits, known boxes" in found["title"]
    assert found["provenance"]["boxes"] is True
    assert found["provenance"]["examples"] == 3


def test_targets_and_boxes_from_files(here, pair):
    np.save("classes.npy", np.array([2, 0]))
    (here / "boxes.json").write_text(json.dumps({"other": [1, 2, 9, 8], "grey": [0, 0, 4, 4]}))
    given = ("--target", "classes.npy", "--boxes", "boxes.json")
    assert run("evaluate", *pair, *TINY, *FAST, *given) == 0
    assert numbers()["provenance"]["classes"] == [2, 0]
    assert numbers()["provenance"]["boxes"] is True


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1), (None, 2)])
def test_check_decides_the_exit_code(here, pair, monkeypatch, capsys, passed, code):
    from dataclasses import replace

    def evaluated(*args, **options):
        found = report(*args, **options)
        cells = found.outcomes["gradient"]
        return replace(
            found,
            outcomes=found.outcomes
            | {"gradient": {name: replace(one, passed=passed) for name, one in cells.items()}},
        )

    monkeypatch.setattr(command, "report", evaluated)
    assert run("evaluate", *pair, *TINY, *FAST, "--check") == code
    assert ("a check failed" in capsys.readouterr().err) == (code == 1)
    assert run("evaluate", *pair, *TINY, *FAST) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--metric", "magic"), "metric must be one of deletion"),
        (("--metric", "deletion", "--metric-arg", "pace=3"), "deletion has no field 'pace'"),
        (("--metric-arg", "steps=3"), "--metric-arg 'steps=3' does not say for which of"),
        (("--metric", "deletion", "--metric-arg", "insertion.steps=3"), "not asked for"),
        (("--metric", "deletion", "--metric-arg", "steps"), "--metric-arg must be field=value"),
        (("--method", "magic"), "method must be one of gradient"),
        (("--substrate", "noise"), "substrate must be one of"),
        (("--substrate", "none"), "--substrate must be zero"),
        (("--steps", "0"), "steps must be a whole number"),
        (("--confidence", "95"), "confidence must lie between 0 and 1"),
        (("--target", "9"), "target must lie in the model's 3 classes"),
        (("--target", "1,2"), "--target must be one class here"),
        (("--target", "three.npy"), "must hold 2 whole numbers"),
        (("--boxes", "absent.json"), "absent.json does not exist"),
        (("--examples", "3"), "--examples is for the built-in scenes"),
        (("--memory-budget", "lots"), "memory_budget"),
        (("--out", "grey.png"), "--out grey.png cannot be made"),
        (("--model", "tiny:colour"), "the model failed"),
    ],
)
def test_errors_are_one_line(here, pair, capsys, options, text):
    np.save("three.npy", np.array([2, 0, 1]))
    assert run("evaluate", *pair, *TINY, *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert text in lines[0]


def test_inputs_of_several_shapes_are_refused(here, pair, capsys):
    Image.new("L", (9, 9)).save("small.png")
    assert run("evaluate", *pair, "small.png", *TINY, *FAST) == 2
    error = capsys.readouterr().err
    assert "[1, 14, 12] of grey.png and [1, 9, 9] of small.png; use --size" in error


def test_models_without_scenes_need_inputs(here, capsys):
    assert run("evaluate", *TINY) == 2
    assert "inputs are missing" in capsys.readouterr().err


def test_metrics_are_listed_with_their_fields(capsys):
    assert run("metrics") == 0
    printed = capsys.readouterr().out
    assert "deletion" in printed
    assert "substrate='zero'" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100
    # Entries that are one class with other fields show their own.
    alone = printed[printed.index("sanity_independent") :]
    assert alone.index("order='independent'") < alone.index("max_sensitivity")


CORNERS = [[0, 1, 5, 6], [2, 2, 4, 9]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(CORNERS)),
        ("a.json", json.dumps({"b": CORNERS[1], "a": CORNERS[0]})),
        ("a.csv", "0,1,5,6\n2,2,4,9\n"),
        ("a.csv", "top,left,bottom,right\n0,1,5,6\n2,2,4,9\n"),
        ("a.csv", "name,top,left,bottom,right\nb,2,2,4,9\na, 0, 1, 5, 6\n"),
    ],
)
def test_boxes_from_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_boxes(str(tmp_path / name), ["a", "b"]).tolist() == CORNERS


def test_boxes_from_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.array(CORNERS, dtype=np.float32))
    assert read_boxes(str(tmp_path / "a.npy"), ["a", "b"]).tolist() == CORNERS
    masks = np.zeros((2, 4, 4), dtype=bool)
    np.save(tmp_path / "m.npy", masks)
    assert read_boxes(str(tmp_path / "m.npy"), ["a", "b"]).dtype == torch.bool


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", json.dumps(CORNERS[:1]), "a box for each example: got 1 for 2"),
        ("a.json", json.dumps({"a": CORNERS[0]}), "has no box for b"),
        ("a.json", "[", "cannot be read"),
        ("a.json", "3", "cannot be read"),
        ("a.json", '[[0,1,5],["x",2,3]]', "holds no boxes"),
        ("a.json", "[[0.5,1,5,6],[2,2,4,9]]", "must hold whole numbers"),
        ("a.csv", "0,1,5,6\n2,x,4,9\n", "cannot be read"),
        ("a.txt", "", "of no known kind"),
    ],
)
def test_wrong_boxes(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        read_boxes(str(tmp_path / name), ["a", "b"])
