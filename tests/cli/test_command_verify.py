"""saliency-fast verify: whole, cut, altered, of another schema, and computed again."""

from __future__ import annotations

import json

import pytest
import torch
from command import run
from safetensors import safe_open
from safetensors.torch import save_file

import saliency_fast as sf
from saliency_fast import record

RECORD = "out/grey.integrated_gradients.safetensors"


@pytest.fixture
def recorded(here, grey_png):
    """A record of grey.png by tiny:grey."""
    options = ("--method-arg", "steps=4", "--target", "1", "--baseline", "0.25")
    assert run("explain", "grey.png", "--model", "tiny:grey", *options) == 0
    return here / RECORD


def rewrite(path, change):
    """Writes the record again with `change` applied to (tensors, header)."""
    with safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, str(path), metadata=header)


def test_it_agrees(recorded, capsys):
    capsys.readouterr()
    assert run("verify", recorded, "--model", "tiny:grey") == 0
    printed = capsys.readouterr().out
    assert "record: whole" in printed
    assert "\nagrees: relative L2 distance 0.00e+00" in printed
    assert "input: the same" in printed
    assert "weights: the same" in printed


def test_code_named_by_a_record_is_not_run_unasked(recorded, capsys):
    assert run("verify", recorded) == 0
    assert "to allow it pass --model tiny:grey" in capsys.readouterr().out


def test_another_input_disagrees(recorded, grey_png, colour_png, capsys):
    from PIL import Image

    Image.open(grey_png).rotate(180).save("other.png")
    assert run("verify", recorded, "--model", "tiny:grey", "--input", "other.png") == 1
    printed = capsys.readouterr().out
    assert "DISAGREES" in printed
    assert "input: NOT the same" in printed


def test_other_weights_disagree(recorded, tiny, capsys):
    model = tiny.Net()
    torch.nn.init.ones_(model.head.weight)
    save_file(model.state_dict(), "w.safetensors")
    options = ("--model", "tiny:grey", "--weights", "w.safetensors")
    assert run("verify", recorded, *options) == 1
    assert "weights: NOT the same" in capsys.readouterr().out


def test_hash_only(recorded, capsys):
    assert run("verify", recorded, "--model", "tiny:grey", "--hash-only") == 0
    assert "not computed again: --hash-only" in capsys.readouterr().out


def test_a_record_of_the_library_alone(here, tiny, capsys):
    x = torch.rand(1, 1, 8, 8)
    sf.explain(tiny.grey(), x, target=0).save("r.safetensors")
    assert run("verify", "r.safetensors") == 0
    assert "pass --model and --input" in capsys.readouterr().out
    save_file({"x": x[0]}, "x.safetensors")
    options = ("--model", "tiny:grey", "--input", "x.safetensors::x")
    assert run("verify", "r.safetensors", *options) == 0
    assert "\nagrees" in capsys.readouterr().out


def test_a_truncated_record(recorded, capsys):
    recorded.write_bytes(recorded.read_bytes()[:-100])
    assert run("verify", recorded) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_altered_numbers(recorded, capsys):
    def change(tensors, header):
        tensors["values.0"][0, 0, 0, 0] += 1

    rewrite(recorded, change)
    assert run("verify", recorded) == 1
    assert "fails its hash" in capsys.readouterr().out


def test_altered_metadata(recorded, capsys):
    def change(tensors, header):
        header[record.KEY] = header[record.KEY].replace('"steps": 4', '"steps": 400')

    rewrite(recorded, change)
    assert run("verify", recorded) == 1
    assert "fails its hash" in capsys.readouterr().out


def test_another_schema(recorded, capsys):
    def change(tensors, header):
        metadata = json.loads(header[record.KEY]) | {"schema": 99}
        header[record.KEY] = json.dumps(metadata, sort_keys=True)

    rewrite(recorded, change)
    assert run("verify", recorded) == 1
    assert "another schema: got 99" in capsys.readouterr().out


def test_metadata_that_is_not_json(recorded, capsys):
    rewrite(recorded, lambda tensors, header: header.update({record.KEY: "{"}))
    assert run("verify", recorded) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_what_is_no_record(here, capsys):
    save_file({"x": torch.ones(2)}, "x.safetensors")
    assert run("verify", "x.safetensors") == 1
    assert "not written by Attribution.save" in capsys.readouterr().out


def test_wrong_use_is_neither(recorded, capsys):
    assert run("verify", "absent.safetensors") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run("verify", recorded, "--model", "nothing") == 2
    assert run("verify", recorded, "--model", "tiny:grey", "--input", "absent.png") == 2
