"""Concepts: planted directions come back, shares add up, seeds reproduce."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.summary import concepts
from saliency_fast.summary.concepts import amounts, directions
from saliency_fast.zoo import digits_cnn, digits_vit, held_out

ONE = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.5], dtype=torch.float64)
TWO = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0], dtype=torch.float64)


class Planted(nn.Module):
    """A layer whose channels are sums of two directions, one for each channel of the input; class 0
    reads both, the first three times as much.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 5, 1, bias=False).double()
        self.relu = nn.ReLU()
        self.head = nn.Linear(5, 2, bias=False).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.stack([ONE, TWO], 1)[:, :, None, None])
            self.head.weight.zero_()
            self.head.weight[0, 0], self.head.weight[0, 3] = 3.0, 1.0

    def forward(self, x):
        return self.head(self.relu(self.layer(x)).mean((2, 3)))


def planted_inputs():
    """Four images [4, 2, 6, 6]: the first concept above in two, the second below in all."""
    x = torch.zeros(4, 2, 6, 6, dtype=torch.float64)
    x[:2, 0, :2, 1:4] = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None]
    x[:, 1, 4:, 2:] = 1.0
    return x


@pytest.mark.parametrize("method", ["auto", "nmf", "kmeans"])
def test_planted_concepts_are_found(method):
    x = planted_inputs()
    found = concepts(Planted(), x, 0, at="relu", count=2, method=method)
    expected = torch.stack([ONE / ONE.norm(), TWO / TWO.norm()])
    assert torch.allclose(found.directions, expected, atol=1e-4)
    # Of an image: 6 places of amount 1 or 2 at 3 a place, 8 of amount 1 at 1.
    shares = [[18 / 26, 8 / 26], [36 / 44, 8 / 44], [0.0, 1.0], [0.0, 1.0]]
    assert torch.allclose(found.shares, torch.tensor(shares, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(found.explained, torch.ones(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(found.rest, torch.zeros(4, dtype=torch.float64), atol=1e-4)
    assert found.layer == "relu"
    assert found.prototypes[0][0].example == 1
    assert found.prototypes[0][0].box == (0, 1, 2, 4)
    assert found.prototypes[1][0].box == (4, 2, 6, 6)
    assert torch.allclose(found.by_class()[0], found.shares.mean(0))
    assert torch.allclose(found.maps[0, 0, :2, 1:4], torch.full((2, 3), 3 / 36).double(), atol=1e-4)


def test_shares_are_the_naive_sums_and_add_up_to_the_evidence():
    model, x = digits_cnn(), held_out().images[:6]
    found = concepts(model, x, count=3)
    layer = dict(model.named_modules())[found.layer]
    kept = []
    handle = layer.register_forward_hook(lambda module, given, output: kept.append(output))
    output = model.eval()(x)
    handle.remove()
    (grads,) = torch.autograd.grad(output.gather(1, found.classes[:, None]).sum(), kept[0])
    vectors, slopes = kept[0].detach().double().flatten(2).mT, grads.double().flatten(2).mT
    evidence = (vectors * slopes).sum(2)
    total = evidence.sum(1) / evidence.abs().sum(1)
    assert torch.allclose(found.total, total, atol=1e-5)
    for row in range(6):
        parts = amounts(vectors[row].numpy(), found.directions.numpy(), found.method)
        given = torch.from_numpy(parts) * (slopes[row] @ found.directions.T)
        share = given.sum(0) / evidence[row].abs().sum()
        assert torch.allclose(found.shares[row], share, atol=1e-4)
        missed = (evidence[row] - given.sum(1)).abs().sum() / evidence[row].abs().sum()
        assert float(found.explained[row]) == pytest.approx(1 - float(missed), abs=1e-4)


@pytest.mark.parametrize("method", ["nmf", "kmeans"])
def test_the_same_seed_gives_the_same(method):
    model, x = digits_cnn(), held_out().images[:12]
    one, two = (concepts(model, x, count=4, method=method, seed=3) for _ in range(2))
    assert torch.equal(one.directions, two.directions)
    assert torch.equal(one.maps, two.maps)
    assert one.prototypes == two.prototypes
    assert one.maps.shape == (12, 4, 64, 64)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_more_concepts_explain_more():
    model, x = digits_cnn(), held_out().images[:12]
    few, many = (concepts(model, x, count=count).explained.mean() for count in (2, 20))
    assert many > few


def test_tokens_are_places():
    found = concepts(digits_vit(), held_out().images[:6], count=2)
    assert found.method == "kmeans"
    assert found.maps.shape == (6, 2, 64, 64)


def test_signals_and_regressions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 1)
    )
    found = concepts(model, torch.randn(4, 2, 20), None, count=2)
    assert found.maps.shape == (4, 2, 20)
    assert found.classes is None
    with pytest.raises(InputError, match="classes are unknown"):
        found.by_class()


def test_non_negative_amounts_solve_least_squares():
    from scipy.optimize import nnls

    draw = np.random.default_rng(0)
    units = np.abs(draw.normal(size=(3, 7)))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    vectors = np.abs(draw.normal(size=(20, 7)))
    expected = np.stack([nnls(units.T, one)[0] for one in vectors])
    assert np.allclose(amounts(vectors, units, "nmf"), expected, atol=1e-9)


@pytest.mark.parametrize("method", ["nmf", "kmeans"])
def test_weights_count(method):
    vectors = np.array([[1.0, 0.1], [0.1, 1.0]])
    for first in (0, 1):
        weights = np.full(2, 1e-6)
        weights[first] = 1.0
        (one,) = directions(vectors, weights, 1, method, 0)
        assert one[first] > 0.99


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"count": 0}, InputError, "count must be"),
        ({"method": "pca"}, InputError, "auto, nmf, kmeans"),
        ({"seed": -1}, InputError, "seed must be"),
        ({"at": "laser"}, InputError, "no layer 'laser'"),
        ({"at": "head"}, InputError, "no spatial output"),
        ({"target": [[0, 1]] * 4}, InputError, "one per example"),
        ({"count": 1000}, InputError, "fewer concepts"),
        ({"target": 1}, InputError, "evidence for the target"),
        ({"inputs": (planted_inputs(),)}, InputTypeError, "one tensor"),
        ({"inputs": planted_inputs()[:0]}, InputError, None),
    ],
)
def test_errors_of_concepts(change, error, words):
    about = {"inputs": planted_inputs(), "target": 0, "at": "relu", "count": 2} | change
    with pytest.raises(error, match=words):
        concepts(Planted(), about.pop("inputs"), about.pop("target"), **about)


def test_nmf_needs_activations_that_are_not_negative():
    x = planted_inputs()
    x[0] = -1.0
    with pytest.raises(InputError, match="behind a ReLU"):
        concepts(Planted(), x, 0, at="layer", count=2, method="nmf")
