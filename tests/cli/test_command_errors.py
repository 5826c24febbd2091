"""Errors are one line and exit code 2; the small commands; and a light import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from command import run

from saliency_fast.cli import main
from saliency_fast.cli.arguments import literal, read_target
from saliency_fast.errors import InputError
from saliency_fast.methods import METHODS

FAST = ("--method-arg", "steps=2")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--method", "magic"), "method must be one of gradient"),
        (("--method-arg", "pace=3"), "integrated_gradients has no field 'pace'"),
        (("--method-arg", "steps"), "must be field=value"),
        (("--method-arg", "steps=many"), "steps must be a whole number: got 'many'"),
        (("--method-arg", "smoothgrad.samples=2"), "not asked for"),
        (("--method", "gradient", "--method", "vargrad", "--method-arg", "samples=2"), "which of"),
        (("--target", "9"), "target out of range: got 9"),
        (("--target", "cat"), "--target must be none, predicted"),
        (("--target", "none"), "target is missing"),
        (("--baseline", "noise"), "the names are blur"),
        (("--baseline", "absent.npy"), "absent.npy does not exist"),
        (("--method", "gradient", "--baseline", "0"), "compares with nothing"),
        (("--memory-budget", "lots"), "memory_budget"),
        (("--memory-budget", "1KiB"), "smaller than one point"),
        (("--points-per-launch", "0"), "points_per_launch"),
        (("--size", "big"), "--size must be"),
        (
            ("--model", "tiny:colour"),
            "fails on these inputs, model(float32 [1, 1, 14, 12])",
        ),
        (("--out", "grey.png"), "--out grey.png cannot be made"),
    ],
)
def test_library_errors_are_one_line(here, grey_png, capsys, options, text):
    assert run("explain", "grey.png", "--model", "tiny:grey", *options) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("saliency-fast: ")
    assert text in lines[0]
    assert "Traceback" not in printed.out + printed.err


def test_debug_lets_the_traceback_through(here, grey_png):
    with pytest.raises(InputError, match="out of range"):
        run("--debug", "explain", "grey.png", "--model", "tiny:grey", "--target", "9")


def test_an_unreadable_input_stops_before_anything_is_written(here, grey_png, capsys):
    assert run("explain", "grey.png", "absent.png", "--model", "tiny:grey") == 2
    assert "absent.png does not exist" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_an_input_that_is_not_finite_is_named(here, capsys):
    np.save("bad.npy", np.full((1, 8, 8), np.nan))
    assert run("explain", "bad.npy", "--model", "tiny:grey", *FAST) == 2
    assert "bad.npy: the input holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["explain"], ["dance"], ["verify"]])
def test_wrong_usage(argv, capsys):
    assert main(argv) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["explain", "--help"], ["--version"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert "saliency-fast" in capsys.readouterr().out


def test_ctrl_c(here, grey_png, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("saliency_fast.cli.arguments.read_inputs", interrupt)
    assert run("explain", "grey.png", "--model", "tiny:grey") == 130
    assert capsys.readouterr().err == "saliency-fast: interrupted\n"


def test_methods_lists_them_all(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    for name in METHODS:
        assert name in printed
    assert "steps=50" in printed


def test_backends(capsys):
    assert run("backends") == 0
    assert "cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("True", True), ("None", None), ("midpoint", "midpoint")],
)
def test_literals(text, value):
    assert literal(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("none", None),
        ("Predicted", "predicted"),
        ("3", 3),
        ("3,5", [3, 5]),
        ("(1,)", (1,)),
        ("(1, 2)", (1, 2)),
        ("(0, ...)", (0, ...)),
    ],
)
def test_targets(text, value):
    assert read_target(text) == value


@pytest.mark.parametrize("text", ["True", "1.5", "a,b", "3,True", "()", "[1]", ""])
def test_targets_that_are_none(text):
    with pytest.raises(InputError, match="--target"):
        read_target(text)


def test_importing_the_library_stays_light():
    heavy = ("PIL", "rich", "transformers", "timm", "torchvision", "saliency_fast.cli")
    code = f"import sys, saliency_fast; print([n for n in {heavy} if n in sys.modules])"
    # What torch itself brings is not ours to count.
    bare = f"import sys, torch, tqdm.auto; print([n for n in {heavy} if n in sys.modules])"
    found, without = (
        subprocess.run([sys.executable, "-c", one], capture_output=True, text=True, check=True)
        for one in (code, bare)
    )
    assert found.stdout == without.stdout


def test_it_runs_as_a_program(here, grey_png):
    code = "import sys; from saliency_fast.cli import main; sys.exit(main())"
    argv = ["explain", "grey.png", "--model", "tiny:grey", "--method-arg", "steps=2"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("out/index.html")
    assert torch.is_tensor(torch.zeros(1))
