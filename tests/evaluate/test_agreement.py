"""Agreement of methods, pair by pair, against loops."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metrics.agreement import COMPARISONS, agreement
from tests.evaluate import naive_metrics as naive
from tests.models import Image, make, randn


@pytest.mark.parametrize("evidence", ["signed", "absolute"])
def test_every_pair_is_the_loop(evidence: str) -> None:
    maps = {name: randn(3, 2, 9, 8, seed=seed) for seed, name in enumerate("abc")}
    maps["c"] = maps["a"] + 0.2 * maps["c"]
    found = agreement(maps, share=0.2, evidence=evidence)
    places = [one.sum(1).numpy() for one in maps.values()]
    for example in range(3):
        for a in range(3):
            for b in range(3):
                one, other = signed = places[a][example], places[b][example]
                if evidence == "absolute":
                    one, other = np.abs(one), np.abs(other)
                peaks = one / np.abs(one).max(), other / np.abs(other).max()
                span = max(p.max() for p in peaks) - min(p.min() for p in peaks)
                expected = {
                    "rank_correlation": spearmanr(one.ravel(), other.ravel()).statistic,
                    "ssim": structural_similarity(*peaks, data_range=span, win_size=7),
                    "overlap": naive.iou_of_top(one, other, 0.2),
                    "sign_agreement": naive.sign_agreement(*signed, 0.2),
                }
                for name in COMPARISONS:
                    got = float(found.per_example[name][example, a, b])
                    assert got == pytest.approx(expected[name], abs=1e-10), name


def test_means_are_over_examples_that_say_something() -> None:
    maps = {name: randn(4, 6, 6, seed=seed) for seed, name in enumerate("ab")}
    maps["b"][1] = 0.0
    found = agreement(maps)
    each = found.per_example["rank_correlation"]
    assert bool(each[1, 0, 1].isnan())
    assert float(found.rank_correlation[0, 1]) == pytest.approx(
        float(each[[0, 2, 3], 0, 1].mean()), abs=1e-12
    )
    assert torch.equal(found.overlap, found.overlap.T)
    assert torch.equal(found.ssim.diagonal(), torch.ones(2, dtype=torch.float64))
    assert found.caveats == ("1 of 4 maps of 'b' are constant: no correlation",)


def test_attributions_tell_their_axes() -> None:
    model, x = make(Image), randn(2, 3, 12, 12)
    methods = ["gradient", "input_x_gradient", "integrated_gradients"]
    maps: dict[str, Any] = {one: sf.explain(model, x, target=1, method=one) for one in methods}
    found = agreement(maps)
    as_tensors = {name: one.values.sum(1) for name, one in maps.items()}
    for other in (agreement(as_tensors), agreement(as_tensors, x), agreement(maps, x)):
        for name in COMPARISONS:
            torch.testing.assert_close(other.per_example[name], found.per_example[name])


def test_features_have_no_structure() -> None:
    maps = {name: randn(3, 7, seed=seed) for seed, name in enumerate("ab")}
    found = agreement(maps)
    assert bool(found.ssim.isnan().all())
    assert "ssim" not in repr(found)
    assert found.to_dict()["ssim"] == [[None, None], [None, None]]


def test_signals_and_volumes() -> None:
    for shape in ((2, 3, 30), (2, 1, 8, 9, 7)):
        x = randn(*shape)
        found = agreement({"a": x, "b": x.sum(1)}, x)
        for name in COMPARISONS:
            torch.testing.assert_close(found.mean(name), torch.ones(2, 2, dtype=torch.float64))


def test_it_reads_well_and_is_json() -> None:
    maps = {name: randn(3, 1, 8, 8, seed=seed) for seed, name in enumerate(["ig", "rise"])}
    found = agreement(maps, share=0.25)
    text = repr(found)
    assert text.startswith("agreement of 2 maps over 3 examples")
    assert "overlap (top 25%)" in text
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["names"] == ["ig", "rise"]
    assert told["examples"] == 3
    assert told["rank_correlation"][0][1] == pytest.approx(float(found.rank_correlation[0, 1]))


@pytest.mark.parametrize(
    ("maps", "options", "raised", "words"),
    [
        ([1], {}, InputTypeError, "maps must be a mapping"),
        ({"a": torch.ones(1, 4)}, {}, InputError, "two or more"),
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 5)}, {}, InputError, "'b': maps must match"),
        (
            {"a": torch.ones(1, 4), "b": torch.full((1, 4), float("nan"))},
            {},
            InputError,
            "'b'.*NaN",
        ),
        ({"a": 3, "b": 4}, {}, InputError, "two to five axes"),
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, {"share": 0.0}, InputError, "above 0"),
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, {"share": 2}, InputError, "share"),
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, {"evidence": "x"}, InputError, "signed"),
    ],
)
def test_bad_input_is_told(
    maps: Any, options: dict[str, Any], raised: type[Exception], words: str
) -> None:
    with pytest.raises(raised, match=words):
        agreement(maps, **options)


def test_several_targets_are_told() -> None:
    model, x = make(Image), randn(2, 3, 12, 12)
    many = sf.explain(model, x, target=[[0, 1], [1, 2]], method="gradient")
    with pytest.raises(InputError, match="'g' are of several targets"):
        agreement({"g": many, "x": x})
