"""Regions: shares that add up, planted parts that are found, words for where they lie."""

from __future__ import annotations

import math

import naive_regions
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.summary import regions
from saliency_fast.summary.regions import GAP, connected, location, with_preposition

SHAPES = [(3, 2, 9), (2, 3, 12, 10), (2, 1, 5, 6, 7), (3, 8)]
HOWS = ["components", "grid:3", "slic:12"]


def maps(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(*blocks, size=(40, 40)):
    """A map [1, 1, *size] with blocks (slices, value)."""
    values = torch.zeros(1, 1, *size)
    for place, value in blocks:
        values[(0, 0, *place)] = value
    return values


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    how=st.sampled_from(HOWS),
    seed=st.integers(0, 1000),
    most=st.integers(1, 6),
)
def test_shares_add_up_and_are_those_of_the_definition(shape, how, seed, most):
    x, values = maps(shape, seed + 1), maps(shape, seed)
    if how.startswith("slic") and len(shape) == 2:
        how = "grid:4"
    if how.startswith("slic") and math.prod(shape[2:]) < 12:
        how = "slic:5"
    layout = {2: "BF", 3: "BCT", 4: "BCHW", 5: "BCDHW"}[len(shape)]
    found = regions(x, values, how, most=most, layout=layout)
    places = values if len(shape) == 2 else values.sum(1)
    for row, parts in enumerate(found):
        assert len(parts) <= most
        whole = [*parts, found.rest[row]]
        positive, negative = float(found.positive[row]), float(found.negative[row])
        total = (positive - negative) / (positive + negative)
        assert math.isclose(sum(one.share for one in whole), total, abs_tol=1e-12)
        # Nothing has a share of what is not there.
        sums = {"amount": 1.0, "area": 1.0, "positive": positive > 0, "negative": negative > 0}
        for name, whole_share in sums.items():
            got = sum(getattr(one, name) for one in whole)
            assert math.isclose(got, whole_share, abs_tol=1e-12)
        expected = naive_regions.shares(places[row].numpy(), found.labels[row].numpy())
        for one in parts:
            got = (one.share, one.amount, one.positive, one.negative)
            assert got == pytest.approx(expected[one.label], abs=1e-12)
        assert [one.label for one in parts] == list(range(1, len(parts) + 1))
        assert [abs(one.share) for one in parts] == sorted(
            (abs(one.share) for one in parts), reverse=True
        )


@pytest.mark.parametrize("shape", [(60,), (50, 64), (7, 9, 50)])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.5])
def test_components_are_those_of_the_definition(shape, share):
    mask = np.random.default_rng(1).random(shape) < share
    found, reach = connected(mask), [round(GAP * size) for size in shape]
    expected = naive_regions.connected(mask, reach)
    assert np.array_equal(found > 0, mask)
    pairs = set(zip(found[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_a_long_winding_path_is_one_component():
    mask = np.zeros((41, 41), dtype=bool)
    mask[::4] = True
    for number, row in enumerate(range(0, 40, 4)):
        mask[row : row + 5, 40 if number % 2 == 0 else 0] = True
    assert len(np.unique(connected(mask)[mask])) == 1


@pytest.mark.parametrize("seed", range(6))
def test_merging_is_wards(seed):
    # Segments of 2 to 9 places.
    x, cells = maps((1, 1, 12, 12), seed), torch.arange(12) * 5 // 12
    parts = cells[:, None] * 5 + cells
    found = regions(x, x, "grid:5", most=4)
    groups = {}
    pairs = zip(parts.flatten().tolist(), found.labels[0].flatten().tolist(), strict=True)
    for number, label in pairs:
        groups.setdefault(label, set()).add(number)
    expected = naive_regions.merged(parts.numpy(), x[0, 0].numpy(), 4)
    assert {frozenset(one) for one in groups.values()} == expected


def test_planted_parts_are_found_with_their_signs_and_words():
    values = planted(
        ((slice(3, 9), slice(4, 10)), 2.0),
        ((slice(28, 34), slice(28, 36)), -1.0),
        ((slice(17, 20), slice(18, 22)), 2.0),
    )
    (found,) = regions(torch.rand(1, 1, 40, 40), values)
    words = [(one.where, one.share > 0) for one in found]
    assert words == [("upper left", True), ("lower right", False), ("middle", True)]
    assert [one.box for one in found] == [(3, 4, 9, 10), (28, 28, 34, 36), (17, 18, 20, 22)]
    # The corners of the weakest lie under the cut.
    assert [one.share for one in found] == pytest.approx([72 / 144, -44 / 144, 24 / 144])
    assert found[0].centre == pytest.approx((5.5, 6.5))
    assert found[0].positive == pytest.approx(0.75)
    assert found[0].negative == 0.0


def test_words_within_the_object():
    values = planted(((slice(12, 15), slice(20, 26)), 1.0), ((slice(34, 37), slice(2, 8)), 0.6))
    (found,) = regions(torch.rand(1, 1, 40, 40), values, boxes=[[10, 16, 30, 30]])
    assert found[0].inside == pytest.approx(1.0)
    assert found[0].within == "upper middle"
    assert found[1].inside == pytest.approx(0.0)
    assert found[1].within == ""


def test_near_parts_are_one_and_far_ones_are_not():
    near = planted(((slice(10, 14), slice(10, 14)), 1.0), ((slice(10, 14), slice(15, 19)), 1.0))
    far = planted(((slice(10, 14), slice(10, 14)), 1.0), ((slice(10, 14), slice(25, 29)), 1.0))
    x = torch.rand(1, 1, 40, 40)
    assert len(regions(x, near)[0]) == 1
    assert len(regions(x, far)[0]) == 2


@pytest.mark.parametrize("how", HOWS)
def test_a_map_of_zeros_has_no_regions(how):
    found = regions(torch.rand(2, 1, 9, 9), torch.zeros(2, 1, 9, 9), how)
    assert found.by_example == ((), ())
    with pytest.warns(DeprecationWarning, match="use Regions.by_example"):
        assert found.found == found.by_example
    assert found.rest[0].share == found.rest[0].amount == 0.0
    assert found.rest[0].area == 1.0


@pytest.mark.parametrize("how", HOWS)
def test_a_batch_changes_nothing(how):
    x, values = maps((4, 3, 14, 11), 5), maps((4, 3, 14, 11), 6)
    whole = regions(x, values, how, boxes=[[2, 2, 9, 9]] * 4)
    for row in range(4):
        own = slice(row, row + 1)
        alone = regions(x[own], values[own], how, boxes=[[2, 2, 9, 9]])
        assert torch.equal(alone.labels[0], whole.labels[row])
        assert alone[0] == whole[row]


def test_given_labels_keep_their_numbers_and_names():
    x = torch.rand(2, 1, 4, 6)
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[:, :, :2], labels[:, :, 4:] = 7, 3
    found = regions(x, x, labels, names={7: "the loop", 3: "the tail"})
    assert {one.label: one.where for one in found[0]} == {7: "the loop", 3: "the tail"}
    assert torch.equal(found.labels, labels.expand(2, 4, 6))


def test_features_are_named():
    x = torch.tensor([[1.0, -4.0, 0.5, 0.0]])
    (found,) = regions(x, x, names=["age", "height", "weight", "sex"])
    assert [one.where for one in found] == ["height", "age", "weight"]
    assert [one.where for one in regions(x, x)[0]] == ["feature 1", "feature 0", "feature 2"]


def test_features_that_go_together_are_counted_up():
    x = torch.ones(1, 12)
    labels = torch.tensor([[1, 1, 1, 1, 2, 0, 2, 3, 2, 2, 2, 2]])
    (found,) = regions(x, x, labels, names={7: "age"})
    words = {one.label: one.where for one in found}
    assert words == {1: "features 0 to 3", 2: "features 4, 6, 8 and 3 more", 3: "age"}


def test_an_attribution_is_a_map():
    model, x = torch.nn.Linear(5, 2).double(), maps((2, 5))
    found = sf.explain(model, x, target=1)
    assert regions(x, found)[0] == regions(x, found.values)[0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: regions(x[:0], x[:0]), InputError, "empty|no examples|at least one"),
        (lambda x: regions(x, x[:, :, :5]), InputError, "match the inputs"),
        (lambda x: regions(x, torch.full_like(x, math.nan)), InputError, "finite"),
        (lambda x: regions(x, x, "slick"), InputError, "components, grid, slic"),
        (lambda x: regions(x, x, "grid:0"), InputError, "count behind a colon"),
        (lambda x: regions(x, x, "grid:"), InputError, "count behind a colon"),
        (lambda x: regions(x, x, 3), InputTypeError, "how must be"),
        (lambda x: regions(x, x, torch.rand(2, 9, 9)), InputTypeError, "whole numbers"),
        (lambda x: regions(x, x, torch.ones(2, 3, 9).long()), InputError, "match the positions"),
        (lambda x: regions(x, x, -torch.ones(2, 9, 9).long()), InputError, "negative"),
        (lambda x: regions(x, x, most=0), InputError, "most must be"),
        (lambda x: regions(x, x, boxes=[[0, 0, 12, 3]] * 2), InputError, "inside of the image"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.rand(2, 1, 9, 9))


@pytest.mark.parametrize(
    ("box", "size", "words"),
    [
        ((0, 0, 10, 30), (30, 30), "upper part"),
        ((0, 0, 30, 30), (30, 30), "most"),
        ((0, 11, 4, 19), (30, 30), "top edge"),
        ((10, 27, 20, 30), (30, 30), "right edge"),
        ((26, 0, 30, 4), (30, 30), "lower left corner"),
        ((20, 6, 28, 9), (30, 30), "lower left"),
        ((11, 6, 19, 9), (30, 30), "middle left"),
        ((11, 11, 19, 19), (30, 30), "middle"),
        ((0, 5), (30,), "start"),
        ((2, 9), (30,), "early part"),
        ((12, 18), (30,), "middle"),
        ((20, 28), (30,), "late part"),
        ((5, 6, 6, 9, 9, 9), (30, 30, 30), "front, upper left"),
        ((20, 0, 0, 28, 30, 30), (30, 30, 30), "back"),
        ((0, 6, 6, 30, 9, 9), (30, 30, 30), "upper left"),
        ((0, 0, 0, 0, 2, 2, 2, 2), (4, 4, 4, 4), "places around (0, 0, 0, 0)"),
    ],
)
def test_locations(box, size, words):
    axes = len(size)
    start, stop = box[:axes], box[axes:]
    centre = [(a + b - 1) / 2 for a, b in zip(start, stop, strict=True)]
    assert location(start, stop, centre, size) == words
    assert with_preposition(words).endswith(words)
