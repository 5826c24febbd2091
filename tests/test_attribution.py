"""The result: maps, overlays, provenance, records and replay."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import saliency_fast as sf
from saliency_fast import record
from saliency_fast.errors import InputError, RecordError
from tests import models
from tests.models import make, randn


def image_attribution(**options: object) -> tuple[torch.nn.Module, Tensor, sf.Attribution]:
    model, x = make(models.Image), randn(3, 3, 12, 12)
    return model, x, sf.explain(model, x, **{"target": 1, **options})


class TestMap:
    def test_reductions(self) -> None:
        _, _, found = image_attribution()
        torch.testing.assert_close(found.map(), found.values.sum(1))
        torch.testing.assert_close(found.map("absmax"), found.values.abs().amax(1))
        torch.testing.assert_close(found.map("l2"), found.values.square().sum(1).sqrt())
        torch.testing.assert_close(found.map(channel_axis=-1), found.values.sum(-1))

    def test_many_targets_keep_their_axis(self) -> None:
        _, _, found = image_attribution(target=[[0, 1], [2, 3], [4, 0]])
        assert found.map().shape == (3, 2, 12, 12)
        torch.testing.assert_close(found.map("l2"), found.values.norm(dim=2))

    def test_tables_are_their_own_map(self) -> None:
        found = sf.explain(make(models.Tabular), randn(2, 7), target=0)
        assert torch.equal(found.map(), found.values)
        assert torch.equal(found.map("absmax"), found.values.abs())

    def test_tuples(self) -> None:
        x = (randn(2, 3, 12, 12), randn(2, 7))
        found = sf.explain(make(models.Multimodal), x, target=0)
        assert [one.shape for one in found.map()] == [(2, 12, 12), (2, 7)]

    def test_bad_arguments(self) -> None:
        _, _, found = image_attribution()
        with pytest.raises(InputError, match=r"reduction must be one of sum, absmax, l2: got 'no'"):
            found.map("no")
        with pytest.raises(InputError, match="channel_axis must name an axis behind the batch"):
            found.map(channel_axis=7)


def test_it_prints_in_one_line() -> None:
    _, _, found = image_attribution(method=sf.IntegratedGradients(4, tolerance=1e-9, max_steps=9))
    assert repr(found).startswith("<Attribution integrated_gradients [3, 3, 12, 12]; error <= ")
    assert "|delta| <= " in repr(found)
    assert repr(found).endswith("; 3 not converged>")


class TestOverlay:
    @pytest.mark.parametrize("style", ["signed", "heat"])
    def test_frames(self, style: str) -> None:
        _, x, found = image_attribution()
        frames = found.overlay(x, style)
        assert frames.shape == (3, 12, 12, 3)
        assert frames.dtype == torch.uint8
        assert torch.equal(frames, found.overlay(x, style))
        bare = found.overlay(x, style, opacity=0.0)
        assert not torch.equal(frames, bare)

    def test_signs_have_their_own_colours(self) -> None:
        x = torch.zeros(1, 1, 1, 3).double()
        x[..., 0] = 1e-9  # so that the picture itself is black
        weight = torch.tensor([0.0, 1.0, -1.0]).double()
        found = sf.explain(lambda z: (z * weight).flatten(1).sum(1), x, method="gradient")
        middle, warm, cool = found.overlay(x, percentile=100.0)[0, 0].int()
        assert warm[0] > warm[2]
        assert cool[2] > cool[0]
        assert int(middle.max() - middle.min()) == 0

    def test_videos_volumes_and_many_targets(self) -> None:
        x = randn(2, 2, 5, 7, 6)
        found = sf.explain(make(models.Video), x, target=[[0, 1], [2, 3]], method="gradient")
        assert found.overlay(x).shape == (2, 2, 5, 7, 6, 3)

    def test_what_has_no_picture(self) -> None:
        x = randn(2, 7)
        found = sf.explain(make(models.Tabular), x, target=0)
        with pytest.raises(InputError, match="only images, videos and volumes have a picture"):
            found.overlay(x)
        _, x, found = image_attribution()
        with pytest.raises(InputError, match="the input is not the one explained"):
            found.overlay(x[..., :5])


class TestProvenance:
    def test_says_what_was_done(self) -> None:
        _, _, found = image_attribution(method=sf.SmoothGrad(samples=6, seed=5))
        past = found.provenance
        assert past.method == "smoothgrad"
        assert past.parameters == {
            "samples": 6,
            "noise_level": 0.15,
            "sigma": None,
            "seed": 5,
            "antithetic": True,
            "standard_error": False,
            "shared_axis": None,
        }
        assert past.target == {"kind": "classes"}
        assert past.dtype == "float64"
        assert past.versions["saliency_fast"] == sf.__version__
        assert past.seconds > 0
        assert past.peak_bytes > 0
        assert not past.trained_mode
        assert len(past.input_sha256[0]) == len(past.weights_sha256) == 64

    def test_hashes_follow_what_they_stand_for(self) -> None:
        model, x, found = image_attribution(method="gradient")
        same = sf.explain(model, x.clone(), target=1, method="gradient").provenance
        assert same.input_sha256 == found.provenance.input_sha256
        assert same.weights_sha256 == found.provenance.weights_sha256
        moved = sf.explain(model, x + 1e-9, target=1, method="gradient").provenance
        assert moved.input_sha256 != found.provenance.input_sha256
        with torch.no_grad():
            model[0].bias[0] += 1e-9
        changed = sf.explain(model, x, target=1, method="gradient").provenance
        assert changed.weights_sha256 != found.provenance.weights_sha256
        model[1].running_mean[0] += 1e-9
        again = sf.explain(model, x, target=1, method="gradient").provenance
        assert again.weights_sha256 != changed.weights_sha256

    def test_a_hash_of_weights_that_changed_after_the_call_says_so(self) -> None:
        model, x, found = image_attribution(method="gradient")
        with torch.no_grad():
            model[0].bias[0] += 1e-9
        assert found.provenance.weights_sha256 == record.weights_sha256(model)
        assert "changed" in found.provenance.notes["weights_sha256"]
        again = sf.explain(model, x, target=1, method="gradient").provenance
        assert copy.deepcopy(again).weights_sha256 == found.provenance.weights_sha256
        assert "weights_sha256" not in again.notes

    def test_a_hash_outlives_its_model_and_keeps_none(self) -> None:
        model, _, found = image_attribution(method="gradient")
        expected = record.weights_sha256(copy.deepcopy(model))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert found.provenance.weights_sha256 == expected

    def test_hashing_can_be_turned_off(self) -> None:
        model, x, _ = image_attribution()
        past = sf.Engine(model, "gradient", hashes=False)(x, 1).provenance
        assert past.input_sha256 is None
        assert past.weights_sha256 is None


CASES = {
    "plain": (models.Image, {"target": "predicted", "baseline": "blur"}),
    "many": (models.Image, {"target": [[0, 1], [2, 3]], "baseline": randn(1, 3, 12, 12)}),
    "set": (
        models.Image,
        {"target": 1, "method": sf.ExpectedGradients(8), "baseline": randn(4, 3, 12, 12)},
    ),
    "seeds": (models.Image, {"target": 1, "method": sf.SmoothGrad(6, seed=(4, 9))}),
    "averaged": (models.Image, {"target": 2, "baseline": [None, "mean", randn(3, 12, 12)]}),
    "mask": (models.Segmenter, {"target": (1, slice(2, 9), ..., randn(7, 12) > 0)}),
    "places": (models.Segmenter, {"target": [(0, 1, 2), (3, 4, 5)], "method": "gradient"}),
    "tolerance": (models.Image, {"target": 1, "method": sf.IntegratedGradients(9, tolerance=0.1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_record_is_read_and_computed_again(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    model, x = make(kind), randn(2, 3, 12, 12)
    found = sf.explain(model, x, **options)
    path = found.save(tmp_path / "map.safetensors")
    read = sf.load(path)
    for name in ("values", "scores", "baseline_scores", "delta", "error", "classes", "converged"):
        one, other = getattr(found, name), getattr(read, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert read.provenance.parameters.keys() == found.provenance.parameters.keys()
    again = sf.replay(path, model, x)
    assert again
    assert again.input_matches
    assert again.weights_match
    assert again.error < 1e-12


def test_a_tuple_stays_one(tmp_path: Path) -> None:
    x = (randn(2, 3, 12, 12), randn(2, 7))
    model = make(models.Multimodal)
    found = sf.explain(model, x, target=0, baseline=(None, randn(7)))
    read = sf.load(found.save(tmp_path / "map.safetensors"))
    assert isinstance(read.values, tuple)
    assert sf.replay(read, model, x)


def test_replay_sees_what_changed(tmp_path: Path) -> None:
    model, x, found = image_attribution()
    other_input = sf.replay(found, model, x + 0.01)
    assert not other_input
    assert other_input.input_matches is False
    assert "NOT the same" in str(other_input)
    other_model = sf.replay(found, make(models.Image, seed=1), x)
    assert not other_model
    assert other_model.weights_match is False
    assert other_model.error > 0.1


def test_a_function_as_target_must_be_passed_again() -> None:
    model, x, found = image_attribution(target=lambda y: y[:, 0] - y[:, 1])
    with pytest.raises(RecordError, match=r"function .* which a record cannot hold"):
        sf.replay(found, model, x)
    assert sf.replay(found, model, x, target=lambda y: y[:, 0] - y[:, 1])


def test_the_hash_is_the_documented_one(tmp_path: Path) -> None:
    _, _, found = image_attribution()
    path = found.save(tmp_path / "map.safetensors")
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        digest = hashlib.sha256(header["saliency_fast"].encode())
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    assert header["sha256"] == digest.hexdigest()
    assert json.loads(header["saliency_fast"])["schema"] == 1


def test_the_strategy_has_its_old_name_in_records_and_as_an_alias(tmp_path: Path) -> None:
    _, _, found = image_attribution()
    path = found.save(tmp_path / "map.safetensors")
    with safe_open(str(path), framework="pt") as file:
        provenance = json.loads(file.metadata()["saliency_fast"])["provenance"]
    assert provenance["way"] == found.provenance.strategy == sf.load(path).provenance.strategy
    assert found.provenance.strategy
    with pytest.warns(DeprecationWarning, match=r"use Provenance\.strategy"):
        assert found.provenance.way == found.provenance.strategy
