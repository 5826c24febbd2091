"""Caveats and errors that must fit what is asked: classes that gain, one output, no picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.summary import animate, summarise


class Gains(nn.Module):
    """Of what is bright above, class 0 loses nothing, and class 1 loses a lot."""

    def forward(self, x):
        up, low = x[:, :, :10].mean((1, 2, 3)), x[:, :, 10:].mean((1, 2, 3))
        return torch.stack([5 * low - up, 2 - 9 * up], 1)


def _bright() -> torch.Tensor:
    x = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    x[:, :, 2:8, 3:17] = 1.0
    x[:, :, 12:18, 3:17] = 1.0
    return x


def test_a_probability_that_falls_without_its_score_is_told_apart():
    x = _bright()
    maps = torch.zeros_like(x)
    maps[:, :, 2:8, 3:17] = 1.0
    (one,) = summarise(Gains(), x, maps, target=0)
    assert all(told["change"] > 0 for told in one.facts["removal"].values())
    assert all(
        told["probability"] < one.facts["probability"] for told in one.facts["removal"].values()
    )
    assert (
        "Removing the strongest region lowers the probability of class 0 only because other classes"
        " gain: the score of class 0, which the map explains, does not fall"
    ) in one.text
    (flat,) = summarise(lambda x: Gains()(x)[:, :1] * 1.0, x, maps, target=None)
    assert "does not lower the output, so the map is not borne out" in flat.text


def test_evidence_against_one_output_lowers_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 1)).double()
    nn.init.constant_(model[1].weight, -0.1)
    x = _bright()
    (one,) = summarise(model, x, -x + 2 * x * (torch.arange(20) < 5), target=None)
    assert "More evidence lowers the output than raises it: " in one.text
    assert "speaks against the output" not in one.text


@pytest.mark.parametrize(
    ("shape", "cure"),
    [((1, 12), "have no pictures"), ((1, 2, 30), "have no pictures"), ((2, 1, 8, 8), r"x\[:1\]")],
)
def test_an_animation_says_what_it_can_draw(shape, cure, tmp_path):
    x = torch.rand(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    with pytest.raises(InputError, match=cure):
        animate(sf.Engine(model, sf.SmoothGrad(samples=4)), x, 0, tmp_path / "a.gif")
