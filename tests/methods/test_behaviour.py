"""What must hold for every method: launches, batches, targets, baselines, tolerances, streams."""

from __future__ import annotations

import pytest
import torch

import saliency_fast as sf
from saliency_fast.engine.recipe import RoundsRecipe
from saliency_fast.errors import ModelError
from saliency_fast.methods import METHODS
from saliency_fast.methods.cam import Cam
from tests import models, naive
from tests.models import make, randn

EVERY = (
    sf.Gradient(),
    sf.Gradient(absolute=True),
    sf.InputXGradient(),
    sf.IntegratedGradients(steps=11),
    sf.SmoothGrad(samples=11, seed=3),
    sf.SmoothGradSquared(samples=11, seed=3),
    sf.VarGrad(samples=11, seed=3),
    sf.ExpectedGradients(samples=11, seed=3),
    sf.GradientShap(samples=11, sigma=0.1, seed=3),
    sf.BlurIG(steps=11, max_sigma=3.0),
    sf.GuidedIG(steps=5, max_dist=0.1),
    sf.IDGI(steps=11),
    sf.HessianVectorProduct(softplus=10.0),
    sf.SmoothGrad(samples=17, seed=3, standard_error=True),
    sf.VarGrad(samples=17, seed=3, confidence=0.9),
    sf.GuidedBackprop(),
    sf.Deconvolution(),
    sf.DeepLift(),
    sf.LRP(),
)
ELSEWHERE = {
    # At a layer, of a series, of regions, of attention: with tests of their own.
    sf.AttentionRollout,
    sf.AttentionWeights,
    sf.GradientAttention,
    sf.Conductance,
    sf.TemporalRescaling,
    sf.IntegratedHessians,
}
PERTURBED = (
    sf.FeatureAblation,
    sf.FeaturePermutation,
    sf.KernelShap,
    sf.Lime,
    sf.Occlusion,
    sf.Rise,
    sf.ShapleySampling,
    sf.ShapleyValues,
)
every = pytest.mark.parametrize("method", EVERY, ids=str)


def baseline_for(method: object) -> torch.Tensor | None:
    if isinstance(method, (sf.ExpectedGradients, sf.GradientShap)):
        return randn(4, 3, 12, 12, seed=9)
    return randn(1, 3, 12, 12, seed=9) if isinstance(method, sf.HessianVectorProduct) else None


def test_every_method_is_covered() -> None:
    """Class activation maps look at layers, and are tested in test_cams.py; perturbations ask for
    scores alone, and are tested in tests/perturbation.
    """
    rest = {method for method in METHODS.values() if not issubclass(method, (Cam, *PERTURBED))}
    assert {type(method) for method in EVERY} | ELSEWHERE == rest


@every
def test_launches_do_not_change_the_map(method: object) -> None:
    model, x = make(models.Image), randn(3, 3, 12, 12)
    maps = [
        sf.explain(
            model,
            x,
            target=2,
            method=method,
            baseline=baseline_for(method),
            points_per_launch=size,
        )
        for size in (1, 3, 7, None)
    ]
    for found in maps[1:]:
        assert naive.relative_l2(found.values, maps[0].values) < 1e-12
        error = maps[0].error
        torch.testing.assert_close(found.error, error, rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(found.scores, maps[0].scores)


@every
def test_a_map_does_not_depend_on_its_batch(method: object) -> None:
    model, x = make(models.Image).float(), randn(5, 3, 12, 12).float()
    rows = baseline_for(method)
    rows = None if rows is None else rows.float()
    engine = sf.Engine(model, method)
    alone = engine(x[2:3], "predicted", rows)
    for place in range(5):
        order = torch.arange(5).roll(place)
        together = engine(x[order], "predicted", rows)
        at = int((order == 2).nonzero())
        assert naive.relative_l2(together.values[at], alone.values[0]) < 1e-5
        assert int(together.classes[at]) == int(alone.classes[0])


@every
def test_many_targets_share_forward_passes(method: object) -> None:
    model, x = make(models.Image), randn(2, 3, 12, 12)
    calls = 0

    def counting(points: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(points)
        return model(points)

    engine = sf.Engine(counting, method, hashes=False)
    classes = [[0, 1, 2], [2, 1, 0]]
    for target in (0, classes):
        engine(x, target, baseline_for(method))
    calls = 0
    single = [engine(x, k, baseline_for(method)) for k in range(3)]
    one_by_one, calls = calls, 0
    together = engine(x, classes, baseline_for(method))
    # One row, picked at random, may be proved once more, of DeepLIFT with its baseline, and the
    # counter is a change of the model: three rows tell whether its rows meet now. Guided paths are
    # each target's own.
    proved = 6 if isinstance(method, sf.DeepLift) else 4
    assert isinstance(method, sf.GuidedIG) or (calls - proved) * 3 <= one_by_one
    assert together.values.shape == (2, 3, 3, 12, 12)
    if method == sf.IntegratedGradients(steps=11):
        # Nodes are those of all targets: see test_adaptive.
        return
    for k in range(3):
        assert naive.relative_l2(together.values[0, k], single[k].values[0]) < 1e-12
        assert naive.relative_l2(together.values[1, 2 - k], single[k].values[1]) < 1e-12
        torch.testing.assert_close(together.scores[0, k], single[k].scores[0])
        torch.testing.assert_close(together.error[0, k], single[k].error[0], equal_nan=True)


@every
def test_the_last_of_a_stream_is_the_answer(method: object) -> None:
    model, x = make(models.Image), randn(2, 3, 12, 12)
    engine = sf.Engine(model, method, points_per_launch=6)
    answer = engine(x, "predicted", baseline_for(method))
    partial = list(engine.stream(x, "predicted", baseline_for(method)))
    recipe = method.recipe()
    assert len(partial) >= (1 if recipe.at_input or isinstance(recipe, RoundsRecipe) else 2)
    assert naive.relative_l2(partial[-1].values, answer.values) < 1e-14
    torch.testing.assert_close(partial[-1].error, answer.error, equal_nan=True)


def test_a_stream_approaches_the_answer() -> None:
    model, x = make(models.Image), randn(2, 3, 12, 12)
    engine = sf.Engine(model, sf.IntegratedGradients(64), points_per_launch=8)
    partial = list(engine.stream(x, 1))
    distance = [naive.relative_l2(one.values, partial[-1].values) for one in partial]
    # The first launch has one point.
    assert distance[4] < 0.5 * distance[1]
    assert float(partial[8].error.max()) < float(partial[1].error.max())


def test_a_stream_does_not_end_in_nan() -> None:
    """One example stops early and the other is NaN: the end of the stream must say so."""
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double()
    method = sf.IntegratedGradients(4, tolerance=0.5, max_steps=40)
    engine = sf.Engine(lambda z: (z + 1e-3).sqrt().sum(1), method)
    with pytest.raises(ModelError, match="NaN or infinite"):
        list(engine.stream(x))


class TestTargets:
    x = randn(2, 3, 12, 12)

    def test_structured_outputs(self) -> None:
        model = make(models.Segmenter)
        mask = randn(12, 12, seed=4) > 0
        masks = torch.stack([mask, ~mask])
        places = [(1, 3, 4), (2, 0, 11)]
        cases = (
            ((1, 3, 4), lambda y, i: y[:, 1, 3, 4]),
            ((1,), lambda y, i: y[:, 1].sum((1, 2))),
            ((slice(0, 2), ..., 5), lambda y, i: y[:, :2, :, 5].sum((1, 2))),
            ((2, mask), lambda y, i: y[:, 2][:, mask].sum(1)),
            ((2, masks), lambda y, i: y[:, 2][:, masks[i]].sum(1)),
            (places, lambda y, i: y[(slice(None), *places[i])]),
            (lambda y: y.amax((1, 2, 3)), lambda y, i: y.amax((1, 2, 3))),
        )
        for target, score in cases:
            found = sf.explain(model, self.x, target=target, method="gradient")
            for i in range(2):
                one = naive.gradient(model, lambda y, s=score, i=i: s(y, i), (self.x[i : i + 1],))
                assert naive.relative_l2(found.values[i : i + 1], one[0]) < 1e-12
                exact = score(model(self.x[i : i + 1]), i)
                torch.testing.assert_close(found.scores[i : i + 1], exact.detach())

    def test_classes(self) -> None:
        model = make(models.Image)
        same = [
            sf.explain(model, self.x, target=target, method="gradient").values
            for target in (3, [3, 3], torch.tensor([3, 3]), torch.tensor(3), (3,), [(3,), (3,)])
        ]
        for other in same[1:]:
            assert torch.equal(other, same[0])
        top = model(self.x).argmax(1)
        found = sf.explain(model, self.x, target="predicted", method="gradient")
        assert torch.equal(found.classes, top)

    def test_scalar_outputs(self) -> None:
        model = models.Scalar()
        found = sf.explain(model, self.x)
        torch.testing.assert_close(found.scores, model(self.x))
        column = sf.explain(lambda x: model(x)[:, None], self.x)
        assert torch.equal(found.values, column.values)

    def test_outputs_with_logits(self) -> None:
        model = make(models.Image)
        plain = sf.explain(model, self.x, target=1, method="gradient")
        wrapped = sf.explain(lambda x: {"logits": model(x)}, self.x, target=1, method="gradient")
        assert torch.equal(plain.values, wrapped.values)


class TestBaselines:
    x = randn(2, 3, 12, 10)

    def ig(self, baseline: object) -> sf.Attribution:
        model = make(models.Segmenter)
        return sf.explain(model, self.x, target=(1,), baseline=baseline)

    def test_forms_that_mean_the_same(self) -> None:
        zero = self.ig(None)
        for baseline in (0, 0.0, torch.zeros(1).double(), torch.zeros_like(self.x), (None,), [0]):
            assert torch.equal(self.ig(baseline).values, zero.values)
        row = randn(3, 12, 10, seed=5)
        assert torch.equal(self.ig(row).values, self.ig(row.expand(2, 3, 12, 10)).values)

    def test_named(self) -> None:
        mean = self.x.mean((2, 3), keepdim=True)
        assert naive.relative_l2(self.ig("mean").values, self.ig(mean).values) < 1e-12
        for name in ("blur", "uniform"):
            found = self.ig(name)
            alone = sf.explain(
                make(models.Segmenter), self.x[1:], target=(1,), baseline=name
            ).values
            assert naive.relative_l2(found.values[1:], alone) < 1e-12

    def test_blur_keeps_the_mean_and_loses_detail(self) -> None:
        from saliency_fast.engine.baselines import blur, uniform

        x = torch.full((1, 2, 40, 40), 3.0, dtype=torch.float64)
        torch.testing.assert_close(blur(x, 0), x)
        noise = randn(1, 2, 40, 40)
        assert float(blur(noise, 0).std()) < 0.25 * float(noise.std())
        drawn = uniform(noise, 0)
        assert float(drawn.min()) >= float(noise.min())
        assert float(drawn.max()) <= float(noise.max())
        middle = float(noise.min() + noise.max()) / 2
        # The mean of 3200 uniforms lies within 5 of its standard deviations.
        spread = float(noise.max() - noise.min()) / (12 * 3200) ** 0.5
        assert abs(float(drawn.mean()) - middle) < 5 * spread
        assert not torch.equal(drawn, uniform(noise, 1))

    def test_a_list_is_averaged(self) -> None:
        parts = [self.ig(one) for one in (None, "mean", 1.5)]
        found = self.ig([None, "mean", 1.5])
        expected = sum(part.values for part in parts) / 3
        assert naive.relative_l2(found.values, expected) < 1e-12
        torch.testing.assert_close(found.delta, sum(part.delta for part in parts) / 3)
        assert found.points.tolist() == [150, 150]
        # The triangle inequality, also where the maps of the baselines cancel.
        gaps = sum(p.error * p.values.flatten(1).norm(dim=1) for p in parts) / 3
        torch.testing.assert_close(found.error, gaps / found.values.flatten(1).norm(dim=1))


class TestTolerance:
    def test_refines_until_the_map_is_good(self) -> None:
        model, x = make(models.Image), randn(3, 3, 12, 12)
        exact = sf.explain(
            model, x, target=1, method=sf.IntegratedGradients(8192, "midpoint")
        ).values
        for rule in ("trapezoid", "midpoint"):
            for tolerance in (0.1, 0.01):
                method = sf.IntegratedGradients(5, rule, tolerance=tolerance)
                found = sf.explain(model, x, target=1, method=method)
                assert bool(found.converged.all())
                gain = (found.scores - found.baseline_scores).abs()
                assert bool((found.delta.abs() <= tolerance * gain).all())
                for i in range(3):
                    # The estimate is what the last refinement changed, so it bounds the error of
                    # the rule before; the refined one is better still.
                    assert naive.relative_l2(found.values[i], exact[i]) < tolerance

    def test_easy_examples_stop_early_and_are_not_touched_again(self) -> None:
        model, x = make(models.Image), randn(6, 3, 12, 12)
        method = sf.IntegratedGradients(3, tolerance=0.02)
        together = sf.explain(model, x, target=1, method=method)
        assert len(set(together.points.tolist())) > 1
        for i in range(6):
            alone = sf.explain(model, x[i : i + 1], target=1, method=method)
            assert int(together.points[i]) == int(alone.points[0])
            assert naive.relative_l2(together.values[i], alone.values[0]) < 1e-12

    def test_what_is_not_reached_is_reported(self) -> None:
        model, x = make(models.Image), randn(2, 3, 12, 12)
        method = sf.IntegratedGradients(4, "trapezoid", tolerance=1e-9, max_steps=20)
        found = sf.explain(model, x, target=1, method=method)
        assert not bool(found.converged.any())
        assert float(found.error.min()) > 1e-9
        assert found.points.tolist() == [13, 13]

    def test_nested_levels_are_the_rule_itself(self) -> None:
        model, x = make(models.Image), randn(1, 3, 12, 12)
        for rule, reached in (("trapezoid", 33), ("midpoint", 45)):
            method = sf.IntegratedGradients(5, rule, tolerance=1e-12, max_steps=50)
            found = sf.explain(model, x, target=1, method=method)
            assert found.points.tolist() == [reached]
            plain = sf.IntegratedGradients(reached, rule)
            expected = sf.explain(model, x, target=1, method=plain)
            assert naive.relative_l2(found.values, expected.values) < 1e-12


def test_forward_arguments_follow_their_examples() -> None:
    model = make(models.Multimodal)
    image, table = randn(3, 3, 12, 12), randn(3, 7, seed=1)
    scale = torch.tensor([1.0, -2.0, 0.5]).double()
    found = sf.explain(model, (image, table), target=1, forward_args=(scale,))
    plain = sf.explain(model, (image, table), target=1)
    for part, other in zip(found.values, plain.values, strict=True):
        for i in range(3):
            assert naive.relative_l2(part[i], scale[i] * other[i]) < 1e-12
    by_name = sf.explain(model, (image, table), target=1, forward_kwargs={"scale": scale})
    assert torch.equal(by_name.values[0], found.values[0])
    fixed = sf.explain(model, image, target=1, method="gradient", forward_args=(table,))
    assert fixed.values.shape == image.shape
