"""Integrated Gradients at nodes of each example's own: the rule, its error, and where it serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.engine.adaptive import refined, rule, weights
from saliency_fast.engine.config import DEFAULT
from saliency_fast.errors import InputError
from tests import models, naive, naive_paths
from tests.models import SHAPES, make, randn


def explain(model: object, x: object, method: object, target: object = 1, **options: object):
    return sf.Engine(model, method, **options)(x, target)


class TestRule:
    def test_weights_integrate_parabolas_between_nodes_and_lines_beyond(self) -> None:
        alpha = np.sort(np.random.default_rng(0).uniform(0.02, 0.97, 12))
        found = weights(alpha)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        assert found @ alpha == pytest.approx(0.5, abs=1e-12)
        # A parabola is off by what the straight ends miss: third order in their widths.
        missed = (alpha[0] ** 3 + (1 - alpha[-1]) ** 3) + alpha[0] ** 2 + (1 - alpha[-1]) ** 2
        assert abs(found @ alpha**2 - 1 / 3) < missed

    def test_order_of_nodes_does_not_matter(self) -> None:
        alpha = np.random.default_rng(1).uniform(0, 1, 9)
        order = np.random.default_rng(2).permutation(9)
        for one, other in zip(rule(alpha), rule(alpha[order]), strict=True):
            assert one[order] == pytest.approx(other)

    def test_errors_of_few_nodes_are_unknown(self) -> None:
        assert np.isnan(rule(np.array([0.2, 0.5, 0.8]))[1]).all()

    def test_nodes_go_where_the_change_is(self) -> None:
        alpha = (np.arange(8) + 0.5) / 8
        change = np.zeros(7)
        change[4] = 1.0
        more = refined(alpha, change, 3)
        assert ((more > alpha[4]) & (more < alpha[5])).all()
        assert np.diff(np.concatenate(([alpha[4]], more, [alpha[5]]))) == pytest.approx(1 / 32)

    def test_constant_gradients_get_nodes_too(self) -> None:
        more = refined((np.arange(8) + 0.5) / 8, np.zeros(7), 20)
        assert len(set(more.tolist())) == 20
        assert ((more > 0) & (more < 1)).all()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("n", [9, 24, 67])
def test_against_naive(kind: type[torch.nn.Module], n: int) -> None:
    model, x = make(kind), randn(2, *SHAPES[kind])
    start = randn(2, *SHAPES[kind], seed=1)
    method = sf.IntegratedGradients(n, rule="adaptive")
    found = sf.explain(model, x, target=[1, 4], method=method, baseline=start)
    assert found.points.tolist() == [n, n]
    for i, k in enumerate((1, 4)):
        score = lambda output, k=k: output[:, k]  # noqa: E731
        expected = naive_paths.adaptive(model, score, x[i : i + 1], start[i : i + 1], n)
        assert naive.relative_l2(found.values[i], expected[0]) < 1e-9


def test_few_points_are_the_midpoint_rule() -> None:
    model, x = make(models.Image), randn(2, 3, 12, 12)
    for n in (1, 8):
        found = explain(model, x, sf.IntegratedGradients(n))
        expected = explain(model, x, sf.IntegratedGradients(n, rule="midpoint"))
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("options", [{"points_per_launch": 7}, {"points_per_launch": 1}])
def test_launches_do_not_matter(options: dict[str, int]) -> None:
    model, x = make(models.Image), randn(3, 3, 12, 12)
    together = explain(model, x, sf.IntegratedGradients(40))
    found = explain(model, x, sf.IntegratedGradients(40), **options)
    assert naive.relative_l2(found.values, together.values) < 1e-12
    for tolerance in (None, 0.02):
        method = sf.IntegratedGradients(20, tolerance=tolerance)
        whole = explain(model, x, method)
        # A group of examples at a time: one, where two would keep too much.
        few = explain(model, x, method, config=replace(DEFAULT, kept_bytes=1))
        assert naive.relative_l2(few.values, whole.values) < 1e-12
        assert torch.equal(few.points, whole.points)
        for i in range(3):
            alone = explain(model, x[i : i + 1], method)
            assert naive.relative_l2(alone.values[0], whole.values[i]) < 1e-12


def test_targets_share_nodes() -> None:
    model, x = make(models.Image), randn(2, 3, 12, 12)
    several = explain(model, x, sf.IntegratedGradients(40), [[0, 1], [2, 1]])
    assert several.points.tolist() == [40, 40]
    for i, k, target in ((0, 0, 0), (0, 1, 1), (1, 0, 2)):
        exact = explain(model, x[i : i + 1], sf.IntegratedGradients(4096, "midpoint"), target)
        found = several.values[i, k]
        assert naive.relative_l2(found, exact.values[0]) < float(several.error[i, k])


def test_several_inputs_and_baselines() -> None:
    model, x = make(models.Multimodal), (randn(2, 3, 12, 12), randn(2, 7, seed=1))
    starts = [(torch.zeros(1, 3, 12, 12).double(), torch.zeros(1, 7).double()), x[::1]]
    starts[1] = (randn(1, 3, 12, 12, seed=4), randn(1, 7, seed=5))
    method = sf.IntegratedGradients(30)
    both = sf.explain(model, x, target=1, method=method, baseline=starts)
    each = [sf.explain(model, x, target=1, method=method, baseline=one) for one in starts]
    for number, values in enumerate(both.values):
        mean = sum(one.values[number] for one in each) / 2
        assert naive.relative_l2(values, mean) < 1e-12
    assert both.points.tolist() == [60, 60]


def test_parts_of_a_stream_come_nearer() -> None:
    model, x = zoo.MODELS["digits"]().double(), zoo.held_out().images[:1].double()
    engine = sf.Engine(model, sf.IntegratedGradients(50), points_per_launch=5)
    exact = explain(model, x, sf.IntegratedGradients(1000, "midpoint"), 0).values
    maps = [one.values for one in engine.stream(x, 0)]
    errors = [naive.relative_l2(one, exact) for one in maps]
    assert len(maps) >= 3
    assert errors[-1] < errors[0] / 2
    assert naive.relative_l2(maps[-1], engine(x, 0).values) < 1e-12


def test_requests_are_what_calls_are() -> None:
    model, x = make(models.Image), randn(4, 3, 12, 12)
    with sf.Engine(model, sf.IntegratedGradients(30)) as engine:
        asked = [engine.submit(one[None], 1) for one in x]
        for one, answer in zip(x, asked, strict=True):
            assert naive.relative_l2(answer.result().values, engine(one[None], 1).values) < 1e-12


def test_half_types() -> None:
    model, x = zoo.MODELS["digits-vit"](), zoo.held_out().images[:2]
    exact = explain(model, x, sf.IntegratedGradients(600, "midpoint"), 0).values
    found = explain(model, x, sf.IntegratedGradients(50), 0, precision="bfloat16")
    for i in range(2):
        assert naive.relative_l2(found.values[i], exact[i]) < float(found.error[i])
        assert float(found.precision_error[i]) > 0


@pytest.mark.parametrize("score", ["logits", "probabilities"])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_twice_the_points_of_a_fixed_rule(name: str, score: str) -> None:
    net, x = zoo.MODELS[name](), zoo.held_out().images[:4]
    model = net if score == "logits" else lambda x: net(x).softmax(1)
    target = model(x).argmax(1)
    exact = explain(model, x, sf.IntegratedGradients(1500, "midpoint"), target).values

    def errors(method: sf.IntegratedGradients) -> tuple[torch.Tensor, torch.Tensor]:
        found = explain(model, x, method, target)
        return sf_distance(found.values, exact), found.error

    def sf_distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)

    own, estimate = errors(sf.IntegratedGradients(50))
    fixed = torch.stack([errors(sf.IntegratedGradients(50, r))[0].median() for r in FIXED])
    assert float(own.median()) < 1.25 * float(fixed.min())
    assert bool((own <= estimate).all())
    if name == "digits":
        assert errors(sf.IntegratedGradients(25))[0].median() < fixed[0]


FIXED = ("midpoint", "gauss_legendre", "trapezoid", "left", "right")


class TestTolerance:
    def test_every_example_stops_by_itself(self) -> None:
        model, x = zoo.MODELS["digits"](), zoo.held_out().images[:6]
        method = sf.IntegratedGradients(tolerance=0.02)
        found = explain(model, x, method, 3)
        exact = explain(model, x, sf.IntegratedGradients(2000, "midpoint"), 3).values
        assert bool(found.converged.all())
        assert len(set(found.points.tolist())) > 1
        gain = (found.scores - found.baseline_scores).abs()
        assert bool((found.delta.abs() <= 0.02 * gain).all())
        for i in range(6):
            assert naive.relative_l2(found.values[i], exact[i]) < 0.02

    def test_what_is_not_reached_is_reported(self) -> None:
        model, x = make(models.Image), randn(2, 3, 12, 12)
        found = explain(model, x, sf.IntegratedGradients(9, tolerance=1e-12, max_steps=40))
        assert not bool(found.converged.any())
        assert found.points.tolist() == [40, 40]
        expected = explain(model, x, sf.IntegratedGradients(4096, "midpoint"))
        assert naive.relative_l2(found.values, expected.values) < float(found.error.max())


class TestWhereItServes:
    def test_the_record_names_the_rule(self, tmp_path: Path) -> None:
        model, x = make(models.Image), randn(1, 3, 12, 12)
        found = explain(model, x, sf.IntegratedGradients(30))
        assert found.provenance.parameters["rule"] == "adaptive"
        path = found.save(tmp_path / "map.safetensors")
        assert bool(sf.replay(path, model, x))

    def test_older_records_leave_open_that_nodes_are_fixed(self, tmp_path: Path) -> None:
        model, x = make(models.Image), randn(1, 3, 12, 12)
        for tolerance, fixed in ((None, "midpoint"), (0.05, "trapezoid")):
            method = sf.IntegratedGradients(30, fixed, tolerance=tolerance)
            found = explain(model, x, method)
            about = found.provenance
            older = replace(about, parameters={**about.parameters, "rule": None})
            path = replace(found, provenance=older).save(tmp_path / f"{fixed}.safetensors")
            assert bool(sf.replay(path, model, x))

    def test_large_gradients_are_not_kept(self) -> None:
        model, x = make(models.Image), randn(2, 3, 12, 12)
        expected = explain(model, x, sf.IntegratedGradients(30, "midpoint"))
        small = replace(DEFAULT, kept_most=10_000)
        found = explain(model, x, sf.IntegratedGradients(30), config=small)
        assert found.provenance.parameters["rule"] == "midpoint"
        assert naive.relative_l2(found.values, expected.values) < 1e-12
        # Asked for by name it is taken.
        named = explain(model, x, sf.IntegratedGradients(30, "adaptive"), config=small)
        assert named.provenance.parameters["rule"] == "adaptive"

    def test_budgets_decide(self) -> None:
        model, x = zoo.MODELS["digits"](), zoo.held_out().images[:1]
        for budget, chosen in (("1 MiB", "midpoint"), ("1 GiB", "adaptive")):
            engine = sf.Engine(model, sf.IntegratedGradients(30), memory_budget=budget)
            try:
                rule = engine(x, 1).provenance.parameters["rule"]
            except sf.BudgetError:
                pytest.skip("a point takes more than the small budget")
            assert rule == chosen

    def test_the_plan_says_so(self) -> None:
        engine = sf.Engine(make(models.Image), sf.IntegratedGradients(30))
        assert "then more where the gradient changes" in str(engine.plan(randn(1, 3, 12, 12), 1))

    def test_maps_on_the_graph_have_fixed_nodes(self) -> None:
        model, x = make(models.Image), randn(1, 3, 12, 12).requires_grad_()
        found = sf.Engine(model, sf.IntegratedGradients(9), create_graph=True)(x, 1)
        expected = explain(model, x.detach(), sf.IntegratedGradients(9, "midpoint"))
        assert naive.relative_l2(found.values.detach(), expected.values) < 1e-10
        with pytest.raises(InputError, match="adaptive"):
            sf.Engine(model, sf.IntegratedGradients(9, "adaptive"), create_graph=True)

    def test_layers(self) -> None:
        model, x = make(models.Image), randn(2, 3, 12, 12)
        found = explain(model, x, sf.IntegratedGradients(60), at="0")
        exact = explain(model, x, sf.IntegratedGradients(4096, "midpoint"), at="0")
        for i in range(2):
            assert naive.relative_l2(found.values[i], exact.values[i]) < float(found.error[i])
