"""Sanity checks: gradients pass, edges fail, and the threshold is where half of a map is shared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.errors import InputError, ModelError
from saliency_fast.evaluate.controls import centre_map, edge_detector, random_map
from saliency_fast.evaluate.maps import correlation, rank_correlation, rank_ssim
from saliency_fast.evaluate.metrics.sanity import HALF, Randomised, SanityCheck, seed_of
from saliency_fast.zoo import digits_cnn, digits_vit, held_out
from tests.evaluate.naive_robustness import spearman, ssim_of_ranks
from tests.traces import Net, one_thread, unchanged

QUICK = SanityCheck(draws=2, stages=1)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    samples = held_out()
    return digits_cnn(), samples.images[:8], samples.labels[:8]


def signed_edges(model, inputs: Tensor, target) -> Tensor:
    found = torch.zeros_like(inputs)
    found[..., 1:-1] = inputs[..., 2:] - inputs[..., :-2]
    return found.sum(1)


def edges_by_score(model, inputs: Tensor, target) -> Tensor:
    with torch.no_grad():
        scores = model(inputs).softmax(1).gather(1, target[:, None])
    return edge_detector(model, inputs) * scores[:, :, None]


def edges_by_logit(model, inputs: Tensor, target) -> Tensor:
    """Of random models about half of the logits are negative: only the sign is the model's."""
    with torch.no_grad():
        return edge_detector(model, inputs) * model(inputs).gather(1, target[:, None])[:, :, None]


KNOWING = {
    "gradient": sf.Gradient(),
    "input_x_gradient": sf.InputXGradient(),
    "integrated_gradients": sf.IntegratedGradients(steps=8),
    "smoothgrad": sf.SmoothGrad(samples=8),
    "expected_gradients": sf.ExpectedGradients(samples=8),
    "grad_cam": sf.GradCAM(),
}


@pytest.mark.parametrize("method", KNOWING)
def test_methods_that_ask_the_model_pass(digits, method: str) -> None:
    model, x, target = digits
    maps = sf.explain(model, x, method=KNOWING[method], target=target)
    found = QUICK(model, x, maps)
    assert found.passed, found
    assert float(found.values.mean()) < 0.3
    assert found.details["again"]["rank_correlation"].tolist() == pytest.approx([1.0] * 8)


@pytest.mark.parametrize(
    "method",
    [edge_detector, signed_edges, edges_by_score, edges_by_logit, random_map, centre_map],
    ids=lambda one: one.__name__,
)
def test_methods_that_do_not_fail(digits, method) -> None:
    model, x, target = digits
    found = QUICK(model, x, method(model, x, target), target=target, method=method)
    assert found.passed is False
    assert float(found.values.min()) > 0.999
    assert found.details["unmoved"] == 1.0


def test_guided_backpropagation_hardly_notices_the_upper_layers(digits) -> None:
    model, x, target = digits
    check = SanityCheck(draws=1, stages=4)
    guided = check(model, x, sf.explain(model, x, method="guided_backprop", target=target))
    plain = check(model, x, sf.explain(model, x, method="gradient", target=target))
    # What is drawn last, the first layers, is what it shows: as an edge detector would.
    assert plain.details["unmoved"] == 0.0
    assert guided.details["unmoved"] >= 0.5
    assert float(guided.over(plain).low) > 0.2


def test_a_transformer() -> None:
    samples = held_out()
    model, x, target = digits_vit(), samples.images[:6], samples.labels[:6]
    found = QUICK(model, x, sf.explain(model, x, method="input_x_gradient", target=target))
    assert found.passed
    # Magnitudes share the zeros of the input; signed ranks do not mind.
    assert float(found.details["rank_correlation_of_magnitudes"][:, -1].mean()) > 0.6
    failed = QUICK(model, x, edge_detector(model, x), target=target, method=edge_detector)
    assert failed.passed is False


def test_like_the_loop(digits) -> None:
    model, x, target = digits
    x, target = x[:2, :, 20:36, 20:34], target[:2]
    check = SanityCheck(draws=2, stages=3, seed=4)
    found = check(model, x, sf.explain(model, x, method="gradient", target=target))
    maps = sf.explain(model, x, method="gradient", target=target).values.sum(1)
    order = Randomised(model, lambda copy: copy(x))
    ends = [len(order.layers) * one // 3 for one in range(1, 4)]
    for stage, end in enumerate(ends):
        ranked, alike = torch.zeros(2), torch.zeros(2)
        for draw in range(2):
            # A fresh copy each time, where the metric goes on with one.
            copy = Randomised(model, lambda copy: copy(x))
            for number in range(end):
                copy.draw(number, seed_of(4, draw, number))
            after = sf.explain(copy.model, x, method="gradient", target=target).values.sum(1)
            for b in range(2):
                ranked[b] += abs(spearman(maps[b], after[b])) / 2
                both = (ssim_of_ranks(maps[b], after[b]), ssim_of_ranks(maps[b], -after[b]))
                alike[b] += max(both) / 2
        got = found.details["rank_correlation"][:, stage].float()
        torch.testing.assert_close(got, ranked, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            found.details["rank_ssim"][:, stage].float(), alike, rtol=0, atol=1e-5
        )
    assert found.curve is not None
    assert found.curve.x.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(found.curve.y[:, -1], found.values)


def test_half_of_the_variance_scores_at_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, 48, 48, generator=generator, dtype=torch.float64)
    mixed = HALF * a + HALF * b
    # Of 40 x 2304 normals a correlation is known to about 0.002; Spearman's of normals is
    # 6 / pi asin(r / 2), .690 here (Pearson, 1907).
    assert float(correlation(a, mixed).mean()) == pytest.approx(HALF, abs=0.01)
    ranked = 6 / math.pi * math.asin(HALF / 2)
    assert float(rank_correlation(a, mixed).mean()) == pytest.approx(ranked, abs=0.01)
    # Means and variances of 49 places are not quite equal, which lowers SSIM a little.
    assert float(rank_ssim(a, mixed).mean()) == pytest.approx(ranked, abs=0.05)
    for share, below in ((0.4, True), (0.6, False)):
        more = math.sqrt(share) * a + math.sqrt(1 - share) * b
        assert bool(rank_correlation(a, more).mean() < HALF) is below
    # Nothing shared, and black around it: alike nowhere.
    a[:, :, 24:], b[:, :, 24:] = 0.0, 0.0
    assert abs(float(rank_correlation(a, b).mean())) < 0.01
    assert abs(float(rank_ssim(a, b).mean())) < 0.05
    assert rank_ssim(a, a).tolist() == pytest.approx([1.0] * 40)


def test_independent_names_what_the_map_does_not_notice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    model.unused = nn.Linear(3, 3)

    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = model, nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body[2](self.body[1](self.body[0](x)))

    x = torch.randn(6, 12)
    whole = Used()
    maps = sf.explain(whole, x, method="gradient", target=0)
    found = SanityCheck(order="independent", draws=2)(whole, x, maps)
    assert found.passed is None
    assert sorted(found.details["unnoticed"]) == ["body.unused", "spare"]
    assert found.values.shape == (6,)
    below = SanityCheck(order="bottom_up", draws=1)(whole, x, maps)
    assert below.details["layers"][0] == "body.0"
    assert below.passed
    # A table's features have no neighbours.
    assert "ssim" not in below.details


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 2, 30), "BCT"), ((3, 1, 6, 7, 8), "BCDHW"), ((1, 3, 9, 9), "BCHW")],
)
def test_shapes(shape: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 4)).double().train()
    x = torch.randn(shape, dtype=torch.float64)
    maps = sf.explain(model, x, method="gradient", target=1, layout=layout)
    found = SanityCheck(draws=1)(model, x, maps, layout=layout)
    assert found.passed
    assert "rank_ssim" in found.details
    assert any("one example" in one for one in found.caveats) is (shape[0] == 1)


def test_constant_maps() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    with torch.no_grad():
        model[1].weight.abs_()
    x = torch.rand(3, 1, 5, 5) + 1.0

    def learned(found, inputs: Tensor, target) -> Tensor:
        same = torch.equal(found[1].weight, model[1].weight)
        return inputs[:, 0] if same else torch.zeros_like(inputs[:, 0])

    lost = QUICK(model, x, learned(model, x, 0), target=0, method=learned)
    assert lost.values.tolist() == [0.0, 0.0, 0.0]
    assert "6 of 6 maps" in lost.caveats[0]

    def nothing(found, inputs: Tensor, target) -> Tensor:
        return torch.zeros_like(inputs[:, 0])

    flat = QUICK(model, x, nothing(model, x, 0), target=0, method=nothing)
    assert flat.passed is False


def test_maps_of_another_method_get_no_verdict(digits) -> None:
    model, x, target = digits
    found = QUICK(model, x, edge_detector(model, x), target=target, method="gradient")
    assert found.passed is None
    assert "gives other maps" in " ".join(found.caveats)


def test_zeros_that_positive_maps_share(digits) -> None:
    model, x, target = digits

    def positive(found, inputs: Tensor, target) -> Tensor:
        maps = sf.explain(found, inputs, method="input_x_gradient", target=target).values
        return maps.sum(1).abs()

    found = QUICK(model, x, positive(model, x, target), target=target, method=positive)
    assert found.passed is False
    assert "where zeros are" in " ".join(found.caveats)


class Fixed(nn.Module):
    """Has a parameter, and asks it nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.flatten(1).sum(1), x.flatten(1).square().sum(1)], 1)


def test_errors(digits) -> None:
    x = torch.rand(2, 1, 6, 6)
    with pytest.raises(ModelError, match="scores stay the same"):
        QUICK(Fixed(nn.Linear(2, 2)), x, x, target=0, method="gradient")
    with pytest.raises(ModelError, match="changes none of them"):
        QUICK(Fixed(nn.LayerNorm(2)), x, x, target=0, method="gradient")
    with pytest.raises(ModelError, match="it has none"):
        QUICK(nn.Flatten(), x, x, target=0, method="gradient")
    with pytest.raises(ModelError, match="pass the module itself"):
        QUICK(lambda x: x.flatten(1), x, x, target=0, method="gradient")
    with pytest.raises(InputError, match="method"):
        QUICK(Fixed(nn.Linear(2, 2)), x, x, target=0)
    wrong = ({"order": "top"}, {"draws": 0}, {"stages": 0}, {"threshold": 1.5}, {"seed": -1})
    for fields in wrong:
        with pytest.raises(InputError, match=next(iter(fields))):
            SanityCheck(**fields)


def test_the_model_stays_as_it_is_also_after_errors() -> None:
    model = Net()
    x = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    maps = sf.explain(model, x, method="gradient", target=1)
    with unchanged(model, x):
        for order in ("cascading", "independent"):
            found = SanityCheck(order=order, draws=1)(model, x, maps)
            assert found.details["unchanged"] == ["norm"]
            assert any("norm" in one for one in found.caveats)

    def fails(found, inputs: Tensor, target) -> Tensor:
        if found is not model:
            raise KeyboardInterrupt
        return inputs

    with unchanged(model, x), pytest.raises(KeyboardInterrupt):
        QUICK(model, x, x, target=1, method=fails)
