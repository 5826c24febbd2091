"""Sentences: every number is a fact, removals are measured, and nothing is claimed too much."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import saliency_fast as sf
from saliency_fast.errors import InputError, InputTypeError, RecordError
from saliency_fast.summary import summarise
from saliency_fast.summary.sentences import replacements, share_text, value_at
from saliency_fast.zoo import digits_cnn, held_out

DIGITS = [str(number) for number in range(10)]


def seeded(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Blocks(nn.Module):
    """Class 0 is bright above, class 1 is bright below, class 2 always says .5: linear."""

    def forward(self, x):
        up, low = x[:, :, :10].mean((1, 2, 3)), x[:, :, 10:].mean((1, 2, 3))
        return 20 * torch.stack([up, low, torch.full_like(up, 0.025)], 1)


@pytest.fixture(scope="module")
def digits():
    samples, model = held_out(), digits_cnn()
    x, boxes = samples.images[:6], samples.boxes[:6]
    found = sf.explain(model, x, target="predicted")
    told = summarise(model, x, found, labels=DIGITS, boxes=boxes, object_name="digit", stability=1)
    return model, x, found, told


def test_every_number_of_a_text_is_a_fact(digits):
    for summary in digits[3]:
        for cited in summary.cited:
            value = value_at(summary.facts, cited.path)
            written = cited.written.replace("\N{MINUS SIGN}", "-")
            if written.endswith("%"):
                number = float(re.search(r"\d+", written).group())
                if written.startswith("less"):
                    assert 100 * value < number
                elif written.startswith("more"):
                    assert 100 * value > number
                else:
                    assert abs(100 * value - number) <= 0.5
            else:
                assert float(written) == pytest.approx(value, rel=5e-3)
        known = {one for cited in summary.cited for one in re.findall(r"[\d.]+", cited.written)}
        classes = set(DIGITS)
        told = {one.strip(".") for one in re.findall(r"[\d.]+", summary.text)} - {""}
        assert told - classes <= {one.strip(".") for one in known}


def test_facts_are_json_and_whole(digits):
    for summary in digits[3]:
        again = json.loads(json.dumps(summary.facts, allow_nan=False))
        assert again == summary.facts
        whole = [*again["regions"], again["rest"]]
        assert sum(one["amount"] for one in whole) == pytest.approx(1.0, abs=1e-12)


def test_facts_are_the_models_own(digits):
    model, x, found, told = digits
    with torch.no_grad():
        shares = model(x).double().softmax(1)
    for row, summary in enumerate(told):
        facts = summary.facts
        best, second = shares[row].topk(2).indices.tolist()
        assert facts["decision"]["class"] == best == facts["class"]
        assert facts["runner_up"]["class"] == second
        assert facts["probability"] == pytest.approx(float(shares[row, best]), abs=1e-5)
        assert facts["confidence"]["error"] == float(found.error[row])
        assert facts["confidence"]["delta"] == float(found.delta[row])
        assert str(summary) == summary.text
        assert summary.text.startswith(f"The model decides for {best} with a probability of ")


def test_it_is_the_same_every_time_and_in_any_batch(digits):
    model, x, found, told = digits
    boxes = held_out().boxes
    about = {"labels": DIGITS, "object_name": "digit", "stability": 1}
    again = summarise(model, x, found, boxes=boxes[:6], **about)
    assert [str(one) for one in again] == [str(one) for one in told]
    alone = sf.explain(model, x[3:4], target="predicted")
    assert str(summarise(model, x[3:4], alone, boxes=boxes[3:4], **about)[0]) == str(told[3])


def test_removal_is_measured():
    x = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    x[:, :, 2:6, 3:8] = 1.0
    model = Blocks()
    found = sf.explain(model, x, target="predicted")
    (one,) = summarise(model, x, found, labels=["up", "low", "other"])
    # A tenth of the upper half is bright: 20 * .1 = 2 against 0 and .5.
    expected = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64).softmax(0)
    assert one.facts["decision"]["name"] == "up"
    assert one.facts["probability"] == pytest.approx(float(expected[0]), abs=1e-12)
    # All evidence lies in the one region, and painted over from the dark around it, none is left.
    removed = one.facts["removal"]
    assert one.facts["regions"][0]["positive"] == pytest.approx(1.0)
    assert removed["inpainted"]["score"] == pytest.approx(0.0, abs=1e-12)
    assert removed["inpainted"]["change"] == pytest.approx(-2.0, abs=1e-12)
    after = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64).softmax(0)
    assert removed["inpainted"]["decision"]["name"] == "other"
    assert removed["inpainted"]["decision"]["probability"] == pytest.approx(float(after[2]))
    assert "100 % of the evidence for up lies in the upper left of the image." in one.text
    assert "changes the decision to other when it is inpainted (at 45 %)" in one.text
    assert "Nothing in the map speaks against up." in one.text


def test_a_linear_regression_has_a_known_answer():
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0, 0.5, 0.0]]))
        model.bias.fill_(0.25)
    x = torch.tensor([[3.0, 2.0, 1.0, 4.0]], dtype=torch.float64)
    (one,) = summarise(model, x, sf.explain(model, x), names=["age", "dose", "mass", "sex"])
    assert one.facts["score"] == pytest.approx(4.75)
    assert one.facts["decision"] is None
    assert one.facts["removal"]["set to zero"]["change"] == pytest.approx(-6.0)
    # The mean of the example is 2.5, half of a unit below its age.
    assert one.facts["removal"]["set to the mean"]["change"] == pytest.approx(-1.0)
    assert one.text.startswith(
        "The output is 4.75. 92 % of what raises the output lies in age, 8 % in mass. Removing age "
        "lowers the output by 1, to 3.75, when it is set to the mean and lowers it by 6, to "
        "\N{MINUS SIGN}1.25, when it is set to zero. Of all evidence, 24 % lowers the output; "
        "100 % of that lies in dose."
    )


def test_models_that_end_in_a_softmax_are_believed():
    class Shares(Blocks):
        def forward(self, x):
            return super().forward(x).softmax(1)

    x = seeded((2, 1, 20, 20)).abs()
    for model in (Blocks(), Shares()):
        found = sf.explain(Shares(), x, target="predicted")
        told = summarise(model, x, found.values, target=found.classes)
        probabilities = [one.facts["probability"] for one in told]
        expected = Shares()(x).gather(1, found.classes[:, None])[:, 0].tolist()
        assert probabilities == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("model", "shape", "target"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), (2, 30), 1),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3)), (1, 5, 6, 7), 1),
        (nn.Conv2d(3, 4, 3), (3, 9, 9), (1,)),
        (nn.Conv2d(3, 4, 3), (3, 9, 9), lambda out: out.mean((1, 2, 3))),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(1)), (1, 6, 6), None),
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.LazyLinear(3)), (1, 6, 6), "predicted"),
    ],
    ids=["signal", "volume", "segmentation", "function", "number", "training mode"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_kinds_of_models(model, shape, target, dtype):
    x = seeded((3, *shape), dtype=dtype)
    model = model.to(dtype)
    model(x)
    training = model.training
    found = sf.explain(model, x, target=target)
    again = target if callable(target) else None
    told = summarise(model, x, found, target=again)
    assert model.training == training
    assert len(told) == 3
    for one in told:
        assert one.sentences
        json.dumps(one.facts, allow_nan=False)
        assert (one.facts["decision"] is None) == (target not in (1, "predicted"))
    if callable(target):
        with pytest.raises(RecordError, match="target"):
            summarise(model, x, found)


def test_class_activation_maps():
    model, x = digits_cnn(), held_out().images[:1]
    (one,) = summarise(model, x, sf.explain(model, x, target="predicted", method="grad_cam"))
    assert one.facts["confidence"]["delta"] is None
    assert "Nothing in the map speaks against class 0." in one.text


def test_nothing_speaks_for():
    x = torch.ones(1, 1, 20, 20, dtype=torch.float64)
    (one,) = summarise(Blocks(), x, -x, target=0)
    assert "Nothing in the map speaks for class 0." in one.text
    assert "Of all evidence, 100 % speaks against class 0" in one.text
    assert one.facts["removal"] is None
    (zero,) = summarise(Blocks(), x, 0 * x, target=0)
    assert "The map is zero everywhere: it says nothing of class 0." in zero.text
    assert zero.facts["removal"] is None


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.634, "63 %"),
        (0.0, "0 %"),
        (1e-9, "less than 1 %"),
        (0.0099, "less than 1 %"),
        (0.01, "1 %"),
        (0.994, "99 %"),
        (0.997, "more than 99 %"),
        (1.0 - 1e-9, "more than 99 %"),
        (1.0, "100 %"),
        (1.0 - 2e-16, "100 %"),
        (2.94, "294 %"),
    ],
)
def test_shares_are_not_rounded_to_something_false(share, text):
    assert share_text(share) == text


def test_a_probability_is_never_certain():
    class Sure(Blocks):
        def forward(self, x):
            return 1000 * super().forward(x)

    x = torch.zeros(1, 1, 20, 20)
    x[:, :, 2:6, 3:8] = 1.0
    (one,) = summarise(Sure(), x, sf.explain(Sure(), x, target="predicted"))
    assert one.facts["probability"] == 1.0
    assert one.facts["runner_up"]["probability"] == 0.0
    assert "with a probability of more than 99 %; next is class 1 with less than 1 %" in one.text


def test_caveats_come_from_numbers():
    x = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    x[:, :, 2:6, 3:8] = 1.0
    x[:, :, 12:18, 3:8] = 0.3
    model = Blocks()
    (one,) = summarise(model, x, sf.explain(model, x, target=1))
    kinds = set(one.facts["caveats"])
    assert {"target", "baseline"} <= kinds
    assert one.facts["confidence"]["at_baseline"] == pytest.approx(1 - 50 / 400)
    assert "At 88 % of the positions the input equals the baseline" in one.text
    # A map of the wrong sign: removing what it points at does not lower the score.
    (lie,) = summarise(model, x, (x == 0.3).double(), target=0)
    assert "contradicted" in lie.facts["caveats"]
    signs = (x == 0.3).double() - 3 * (x == 1)
    assert "against" in summarise(model, x, signs, target=0)[0].facts["caveats"]


def test_uncertain_rough_and_unconverged():
    model, x = digits_cnn(), held_out().images[:4]
    method = sf.IntegratedGradients(steps=3, tolerance=1e-4, max_steps=5)
    found = sf.explain(model, x, target="predicted", method=method)
    for one in summarise(model, x, found):
        assert ("unconverged" in one.facts["caveats"]) == (
            one.facts["confidence"]["converged"] is False
        )
        assert ("error" in one.facts["caveats"]) == (one.facts["confidence"]["error"] > 0.1)
        assert ("uncertain" in one.facts["caveats"]) == (one.facts["decision"]["probability"] < 0.6)


def test_stability_is_a_correlation(digits):
    for one in digits[3]:
        assert -1.0 <= one.facts["confidence"]["stability"] <= 1.0
        assert f"maps of noisy inputs is {one.facts['confidence']['stability']:.3g}" in one.text
    x = seeded((2, 5))
    model = nn.Linear(5, 2).double()
    (one, _) = summarise(
        model, x, model.weight[:1].expand(2, 5), target=0, method="gradient", stability=2
    )
    assert one.facts["confidence"]["stability"] == pytest.approx(1.0)


def test_a_model_that_is_not_deterministic_is_told():
    class Noisy(Blocks):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.rand(1, dtype=x.dtype)

    x = seeded((1, 1, 20, 20))
    (one,) = summarise(Noisy(), x, x, target=0)
    assert "model" in one.facts["caveats"]
    assert "The model is not deterministic" in one.text


def test_what_is_painted_over_knows_nothing_of_what_was_there():
    x = seeded((2, 3, 15, 18))
    gone = torch.zeros(2, 15, 18, dtype=torch.bool)
    gone[0, 3:9, 4:12], gone[1] = True, True
    other = torch.where(gone[:, None], -7.0, x)
    assert torch.allclose(
        replacements(other, gone)["inpainted"][0], replacements(x, gone)["inpainted"][0]
    )
    flat, part = seeded((2, 4)), torch.ones(2, 4, dtype=torch.bool)
    assert torch.allclose(
        replacements(flat, part)["set to the mean"], flat.mean(1)[:, None].expand(2, 4)
    )
    assert not replacements(flat, part)["set to zero"].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"maps": math.nan * torch.ones(2, 1, 20, 20)}, InputError, "finite"),
        ({"maps": torch.ones(2, 1, 20, 21)}, InputError, "match the inputs"),
        ({"maps": "map"}, InputTypeError, "Attribution"),
        ({"target": 3}, InputError, "3"),
        ({"target": None}, InputError, "target"),
        ({"stability": -1}, InputError, "stability must be"),
        ({"stability": 1}, InputError, "method"),
        ({"how": "superpixels"}, InputError, "components"),
        ({"boxes": [[0, 0, 30, 3]] * 2}, InputError, "inside of the image"),
    ],
)
def test_errors_say_what_to_do(change, error, words):
    x = torch.rand(2, 1, 20, 20)
    about = {"maps": x, "target": 0} | change
    with pytest.raises(error, match=words):
        summarise(Blocks(), x, about.pop("maps"), **about)


def test_an_empty_batch():
    x = torch.rand(0, 1, 20, 20)
    with pytest.raises(InputError):
        summarise(Blocks(), x, x, target=0)


def test_the_page_about_summaries_says_what_comes_out():
    page = (Path(__file__).parents[2] / "docs" / "summary.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    quoted = re.search(r"\n((?:> .*\n)+)", page).group(1)
    given: dict[str, object] = {}
    exec(code, given)
    expected = " ".join(line.removeprefix("> ") for line in quoted.strip().splitlines())
    assert str(given["summary"]) == expected
