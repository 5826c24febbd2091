"""Paths other than the straight one, and other sums on it, against the papers and Captum."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerConductance
from scipy import ndimage
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import zoo
from saliency_fast.engine import points as paths
from saliency_fast.errors import InputError, InputTypeError
from tests import naive_paths as naive
from tests.model.answers import always_lean, way_of
from tests.models import SHAPES, Audio, Image, Multimodal, Tabular, Tokens, Video, make, randn
from tests.naive import gradient, relative_l2

# Rounding of sums of some hundred float64 terms.
FLOAT64, FLOAT32 = 1e-12, 1e-5
SPATIAL = [Audio, Image, Video]


def column(k: int):
    return lambda output: output[:, k]


class TestBlurIG:
    @pytest.mark.parametrize("kind", SPATIAL)
    @pytest.mark.parametrize("padding", ["zeros", "replicate"])
    @pytest.mark.parametrize(("rule", "spacing"), [("midpoint", 2.0), ("gauss_legendre", 1.0)])
    def test_exact(self, kind: type[nn.Module], padding: str, rule: str, spacing: float) -> None:
        model, x = make(kind), randn(2, *SHAPES[kind])
        method = sf.BlurIG(7, max_sigma=2.5, rule=rule, padding=padding, spacing=spacing)
        found = sf.explain(model, x, target=[3, 1], method=method)
        for i, k in enumerate([3, 1]):
            expected = naive.blur_ig(model, column(k), x[i], 2.5, rule, 7, padding, spacing)
            assert relative_l2(found.values[i], expected) < FLOAT64

    @pytest.mark.parametrize("kind", SPATIAL)
    def test_lean(self, kind: type[nn.Module]) -> None:
        model, x = make(kind), randn(19, *SHAPES[kind])
        method = sf.BlurIG(6, max_sigma=2.5)
        plain = sf.explain(model, x, target=[[0, 1]] * 19, method=method, lean=False)
        with always_lean():
            engine = sf.Engine(model, method, points_per_launch=7)
            found = engine(x, [[0, 1]] * 19)
            assert way_of(engine) == "program"
        assert relative_l2(found.values, plain.values) < FLOAT64
        torch.testing.assert_close(found.delta, plain.delta, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("kind", SPATIAL)
    def test_the_published_sum(self, kind: type[nn.Module]) -> None:
        model, x = make(kind), randn(1, *SHAPES[kind])
        # Its sigmas run from 0 up to the last but one: alphas from 1 down.
        method = sf.BlurIG(60, max_sigma=3.0, rule="right", spacing=1.0)
        found = sf.explain(model, x, target=2, method=method).values[0]
        expected = naive.published_blur_ig(model, column(2), x[0], 3.0, 60)
        # What differences of .01 pixel cost, to first order in them.
        assert relative_l2(found, expected) < 0.02

    @pytest.mark.parametrize("kind", [Audio, Video])
    def test_completeness_converges(self, kind: type[nn.Module]) -> None:
        model, x = make(kind), randn(3, *SHAPES[kind])
        deltas = []
        for steps in (16, 64, 256):
            found = sf.explain(model, x, target=1, method=sf.BlurIG(steps, max_sigma=4.0))
            deltas.append(float(found.delta.abs().max()))
        # The midpoint rule's error falls like the square of the step on smooth networks.
        assert deltas[1] < deltas[0] / 8
        assert deltas[2] < deltas[1] / 8
        starts = [naive.blurred(one, torch.tensor(4.0).double(), 16, "zeros") for one in x]
        torch.testing.assert_close(
            found.baseline_scores, model(torch.stack(starts))[:, 1].detach(), rtol=1e-12, atol=0
        )

    @pytest.mark.parametrize("padding", ["zeros", "replicate"])
    @pytest.mark.parametrize("size", [1, 5, 40, paths.BLOCK + 300, 3 * paths.BLOCK])
    def test_the_blur_is_scipys(self, padding: str, size: int) -> None:
        x = randn(2, 3, size)
        kernel, _ = paths.kernels(torch.tensor([2.0, 2.0]).double(), 8)
        mode = {"zeros": "constant", "replicate": "nearest"}[padding]
        expected = ndimage.gaussian_filter1d(x.numpy(), 2.0, mode=mode)
        torch.testing.assert_close(
            paths.along(x, 2, kernel, padding), torch.tensor(expected), rtol=0, atol=1e-14
        )

    def test_spacing_is_a_choice_of_points(self) -> None:
        model, x = make(Audio), randn(2, *SHAPES[Audio])
        maps = [
            sf.explain(model, x, target=1, method=sf.BlurIG(n, max_sigma=4.0, spacing=spacing))
            for n, spacing in ((800, 1.0), (200, 2.0), (200, 3.0))
        ]
        for one in maps[1:]:
            assert relative_l2(one.values, maps[0].values) < 1e-3

    def test_closer_points_where_detail_appears_cost_less(self) -> None:
        model, x = zoo.MODELS["digits"](), zoo.held_out().images[:2]
        target = model(x).argmax(1)

        def values(steps: int, spacing: float) -> Tensor:
            method = sf.BlurIG(steps, max_sigma=20.0, spacing=spacing)
            return sf.explain(model, x, target=target, method=method).values

        exact = values(512, 3.0)
        even, closer = (relative_l2(values(32, spacing), exact) for spacing in (1.0, 2.0))
        assert closer < 0.7 * even

    def test_a_kernel_without_width_changes_nothing(self) -> None:
        kernel, change = paths.kernels(torch.zeros(1).double(), 9)
        assert torch.equal(kernel[0], torch.eye(19).double()[9])
        assert not bool(change.any())

    def test_several_inputs_and_float32(self) -> None:
        model, x = make(Image).float(), randn(2, 3, 12, 12).float()
        found = sf.explain(model, x, target=1, method=sf.BlurIG(9, max_sigma=3.0))
        model.double()
        for i in range(2):
            expected = naive.blur_ig(model, column(1), x[i].double(), 3.0, "midpoint", 9, "zeros")
            assert relative_l2(found.values[i], expected) < FLOAT32

        def both(a: Tensor, b: Tensor) -> Tensor:
            return model(a) * model(b)

        a, b = randn(2, 3, 12, 12), randn(2, 3, 12, 12, seed=1)
        found = sf.explain(both, (a, b), target=1, method=sf.BlurIG(400, max_sigma=2.0))
        gain = found.scores - found.baseline_scores
        assert float((found.delta / gain).abs().max()) < 0.05

    def test_at_a_layer_that_others_write_over(self) -> None:
        model, x = make(Image), randn(2, 3, 12, 12)
        found = sf.explain(model, x, target=1, method=sf.BlurIG(6, max_sigma=2.0), at="1")
        parts = list(model)
        values, behind = nn.Sequential(*parts[:2])(x).detach(), nn.Sequential(*parts[3:])
        for i in range(2):
            expected = naive.blur_ig(
                lambda z: behind(z.relu()), column(1), values[i], 2.0, "midpoint", 6, "zeros"
            )
            assert relative_l2(found.values[i], expected) < FLOAT64

    def test_what_has_no_space_is_refused(self) -> None:
        model = make(Multimodal)
        with pytest.raises(InputError, match="input 1 \\[1, 7\\]"):
            sf.explain(model, (randn(1, 3, 12, 12), randn(1, 7)), target=1, method="blur_ig")
        with pytest.raises(InputError, match="got a baseline; leave it out"):
            sf.explain(make(Image), randn(1, 3, 12, 12), target=1, method="blur_ig", baseline=0.0)
        with pytest.raises(InputError, match="padding must be one of zeros, replicate"):
            sf.BlurIG(padding="reflect")
        with pytest.raises(InputError, match="max_sigma must be a positive"):
            sf.BlurIG(max_sigma=0)


class TestGuidedIG:
    @pytest.mark.parametrize("kind", [Tabular, Image, Tokens])
    @pytest.mark.parametrize(
        "fields", [(20, 0.25, 0.02), (15, 0.25, 0.3), (9, 0.1, 1.0), (8, 0.5, 0.0), (6, 1.0, 0.1)]
    )
    def test_published(self, kind: type[nn.Module], fields: tuple[int, float, float]) -> None:
        model, x = make(kind), randn(2, *SHAPES[kind])
        start = randn(2, *SHAPES[kind], seed=4)
        start.flatten(1)[:, ::3] = x.flatten(1)[:, ::3]  # what has no way to go
        target = [[0, 1], [4, 2]]
        found = sf.explain(model, x, target=target, baseline=start, method=sf.GuidedIG(*fields))
        for i in range(2):
            for k in range(2):

                def score(p: Tensor, c: int = target[i][k]) -> Tensor:
                    return model(p)[:, c]

                expected = naive.guided_ig(score, x[i], start[i], *fields)
                assert relative_l2(found.values[i, k], expected) < 1e-10

    def test_no_distance_is_the_straight_path(self) -> None:
        model, x = make(Image), randn(2, 3, 12, 12)
        guided = sf.explain(model, x, target=1, method=sf.GuidedIG(30, max_dist=0.0))
        straight = sf.explain(model, x, target=1, method=sf.IntegratedGradients(30, "left"))
        assert relative_l2(guided.values, straight.values) < FLOAT64

    def test_float32_ends(self) -> None:
        model, x = make(Image), randn(3, 3, 12, 12)
        method = sf.GuidedIG(50, 0.25, 0.1)
        exact = sf.explain(model, x, target=1, method=method)
        found = sf.explain(model.float(), x.float(), target=1, method=method)
        # A choice between features may fall the other way, after which paths part a little.
        assert relative_l2(found.values, exact.values) < 0.05
        torch.testing.assert_close(found.delta, exact.delta, rtol=0.1, atol=1e-3)

    def test_nothing_to_go(self) -> None:
        x = randn(2, 3, 12, 12)
        found = sf.explain(make(Image), x, target=1, method=sf.GuidedIG(3), baseline=x.clone())
        assert not bool(found.values.any())

    def test_several_inputs(self) -> None:
        model, x = make(Multimodal), (randn(2, 3, 12, 12), randn(2, 7, seed=1))
        found = sf.explain(model, x, target=1, method=sf.GuidedIG(200, 0.25, 0.02))
        gain = (found.scores - found.baseline_scores).abs()
        assert bool((found.delta.abs() < 0.1 * gain).all())

    def test_fields(self) -> None:
        with pytest.raises(InputError, match="fraction is a share"):
            sf.GuidedIG(fraction=1.5)
        with pytest.raises(InputTypeError, match="max_dist must be a number"):
            sf.GuidedIG(max_dist="far")


class TestIDGI:
    @pytest.mark.parametrize("kind", SHAPES)
    def test_published(self, kind: type[nn.Module]) -> None:
        model, x = make(kind), randn(2, *SHAPES[kind])
        start = randn(2, *SHAPES[kind], seed=4)
        target = [[0, 1], [4, 2]]
        for size in (1, 4, None):
            found = sf.explain(
                *(model, x),
                target=target,
                baseline=start,
                method=sf.IDGI(7),
                points_per_launch=size,
            )
            for i in range(2):
                for k in range(2):

                    def score(p: Tensor, c: int = target[i][k]) -> Tensor:
                        return model(p)[:, c]

                    expected = naive.idgi(score, x[i], start[i], 7)
                    assert relative_l2(found.values[i, k], expected) < FLOAT64
            assert float(found.delta.abs().max()) < 1e-14

    def test_the_gain_of_a_step_that_begins_flat_is_nobodys(self) -> None:
        x = torch.tensor([[2.0, -1.0]]).double()
        found = sf.explain(lambda z: (z - 1).relu().sum(1), x, method=sf.IDGI(4))
        # From .5 to 1 nothing rises; from 1 to 1.5 it does, and the gradient at 1 is zero.
        torch.testing.assert_close(found.values, torch.tensor([[0.5, 0.0]]).double())
        torch.testing.assert_close(found.delta, torch.tensor([-0.5]).double())


class TestConductance:
    # Captum holds the trapezoid's alphas in float32.
    @pytest.mark.parametrize(
        ("rule", "theirs", "close"),
        [("gauss_legendre", "gausslegendre", 1e-10), ("trapezoid", "riemann_trapezoid", 1e-6)],
    )
    @pytest.mark.parametrize("of_input", [False, True])
    @pytest.mark.parametrize(("kind", "at"), [(Tabular, "0"), (Image, "4"), (Audio, "1")])
    def test_captum(
        self, kind: type[nn.Module], at: str, of_input: bool, rule: str, theirs: str, close: float
    ) -> None:
        model, x = make(kind), randn(3, *SHAPES[kind])
        start = randn(3, *SHAPES[kind], seed=2)
        layer = model.get_submodule(at)
        expected = LayerConductance(model, layer).attribute(
            x, start, target=1, n_steps=9, method=theirs, attribute_to_layer_input=of_input
        )
        method = sf.Conductance(9, rule)
        for size in (1, 7, None):
            found = sf.explain(
                *(model, x),
                target=1,
                method=method,
                baseline=start,
                at=at,
                layer_input=of_input,
                points_per_launch=size,
            )
            assert relative_l2(found.values, expected.detach()) < close

    def test_the_papers_sum(self) -> None:
        model, x, start = make(Image), randn(2, 3, 12, 12), randn(2, 3, 12, 12, seed=2)
        found = sf.explain(
            model, x, target=[1, 3], method=sf.Conductance(8), baseline=start, at="4"
        )
        parts = list(model)
        before, behind = nn.Sequential(*parts[:5]), nn.Sequential(*parts[5:])
        for i, k in enumerate((1, 3)):
            total = 0.0
            for step in range(8):
                here, there = (
                    before((start[i] + j / 8 * (x[i] - start[i]))[None]).detach()
                    for j in (step, step + 1)
                )
                total = total + gradient(behind, column(k), (here,))[0] * (there - here)
            assert relative_l2(found.values[i : i + 1], total) < FLOAT64

    def test_several_targets_and_completeness(self) -> None:
        model, x = make(Tabular), randn(2, 7)
        method = sf.Conductance(400)
        both = sf.explain(model, x, target=[[0, 1], [2, 3]], method=method, at=model[0])
        assert both.values.shape == (2, 2, 16)
        assert float(both.delta.abs().max()) < 1e-2 * float((both.scores).abs().max())
        alone = sf.explain(model, x, target=[1, 3], method=method, at=model[0])
        assert relative_l2(both.values[:, 1], alone.values) < FLOAT64
