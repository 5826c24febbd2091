"""Manipulation: its direction is the gradient of the map's similarity, and methods differ in it."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from saliency_fast import explain, ops, zoo
from saliency_fast.engines import Engine
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.evaluate.attacks import (
    Manipulation,
    Steering,
    correlation_slope,
    steerable,
)
from saliency_fast.evaluate.controls import edge_detector
from saliency_fast.evaluate.inputs import read_evaluation_input
from saliency_fast.evaluate.maps import correlation, overlap, rank_correlation
from saliency_fast.methods.cam import GradCAM
from saliency_fast.methods.gradient import Gradient, InputXGradient
from saliency_fast.methods.paths import IntegratedGradients
from saliency_fast.methods.perturbation import Occlusion
from saliency_fast.methods.sampling import SmoothGrad
from tests.evaluate import naive_adversarial as naive

QUICK = {"steps": 4, "points": 4}


@pytest.fixture(scope="module")
def smooth():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Softplus(),
        nn.Linear(8, 3),
    )
    return model.double().eval(), torch.randn(3, 2, 6, 6, dtype=torch.float64)


@pytest.fixture(scope="module")
def digits():
    model, samples = zoo.digits_cnn(), zoo.held_out()
    return model, samples.images[20:28], samples.labels[20:28]


def _subject(model, x, method, **further):
    maps = (
        method(model, x, "predicted")
        if callable(method)
        else explain(model, x, method=method, target="predicted").values
    )
    return read_evaluation_input(model, x, maps, target="predicted", method=method, **further)


@pytest.mark.parametrize("name", ["gradient", "input_x_gradient", "ig", "smoothgrad"])
def test_steering_is_the_second_derivative(smooth, name) -> None:
    model, x = smooth
    label, base = 1, torch.full_like(x[:1], 0.3)
    direction = torch.randn(3, 1, 6, 6, dtype=torch.float64)

    def factor(free):
        return {"input_x_gradient": free, "ig": free - base}.get(name, torch.ones_like(x))

    points, alphas, weights = [x], [1.0], [1.0]
    if name == "ig":
        alphas, weights = [(k + 0.5) / 6 for k in range(6)], [1 / 6] * 6
        points = [base + alpha * (x - base) for alpha in alphas]
    if name == "smoothgrad":
        example, sigma = torch.arange(3), torch.full((3,), 0.4, dtype=torch.float64)
        seed = torch.full((3,), 5)
        points = [
            ops.noise_points(x, sigma, seed, example, torch.full_like(example, k), True, 0)
            for k in range(6)
        ]
        alphas, weights = [1.0] * 6, [1 / 6] * 6
    method = {
        "gradient": Gradient(),
        "input_x_gradient": InputXGradient(),
        "ig": IntegratedGradients(steps=6),
        "smoothgrad": SmoothGrad(samples=6, sigma=0.4, seed=5),
    }[name]
    expected = naive.steered(
        lambda at: model(at)[:, label], points, alphas, weights, factor, direction, x
    )
    steering = Steering(method.recipe(), direction, 100, 3, 10.0)
    found = Engine(model, steering)(x, label, base if name == "ig" else None).values
    assert torch.allclose(found, expected, atol=1e-12, rtol=1e-10)


def test_steering_takes_points_from_everywhere(smooth) -> None:
    model, x = smooth
    direction = torch.randn_like(x)
    recipe = IntegratedGradients(steps=64).recipe()
    whole = Engine(model, Steering(recipe, direction, 64, 0, 10.0))(x, 1).values
    for turn in range(3):
        part = Engine(model, Steering(recipe, direction, 16, turn, 10.0))(x, 1).values
        assert float(correlation(part, whole).min()) > 0.95


def test_slope_is_the_correlations_gradient() -> None:
    torch.manual_seed(2)
    a = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 30, dtype=torch.float64)
    centred = [one - one.mean(1, keepdim=True) for one in (a, b)]
    found = (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
    (expected,) = torch.autograd.grad(found.sum(), a)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(correlation_slope(a.detach(), b), expected, atol=1e-12)


@pytest.mark.parametrize("attack", ["gradient", "random"])
def test_inside_of_the_ball_and_decisions_kept(digits, attack) -> None:
    model, x, _ = digits
    how = Manipulation(epsilon=0.03, attack=attack, **QUICK)
    subject = _subject(model, x, "gradient")
    found = how.manipulate(subject)
    span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).double()
    far = (found.inputs.double() - x.double()).abs().flatten(1).amax(1)
    assert bool((far <= 0.03 * span + 2.0**-24).all())
    assert float(found.inputs.min()) >= float(x.min())
    assert float(found.inputs.max()) <= float(x.max())
    with torch.no_grad():
        assert torch.equal(model(found.inputs).argmax(1), model(x).argmax(1))
    assert bool(found.kept.all())
    # What is reported is what an explanation of the attacked inputs gives.
    classes = subject.classes
    before = explain(model, x, method="gradient", target=classes).values[:, 0]
    after = explain(model, found.inputs, method="gradient", target=classes).values[:, 0]
    outcome = how.evaluate(_subject(model, x, "gradient"))
    assert torch.allclose(outcome.values, rank_correlation(before, after), atol=1e-4)
    assert torch.allclose(outcome.details["overlap"], overlap(before, after, 0.1), atol=0.02)


def test_only_points_of_the_same_decision_count(digits) -> None:
    model, x, _ = digits
    # Far enough that most of what moves the map turns the decision, too.
    found = Manipulation(epsilon=0.3, attack="random", steps=6).manipulate(
        _subject(model, x, "gradient")
    )
    with torch.no_grad():
        assert torch.equal(model(found.inputs).argmax(1), model(x).argmax(1))
    assert bool(found.kept.all())


def test_smoothgrad_and_paths_are_harder_to_move_than_gradients(digits) -> None:
    model, x, _ = digits
    methods = {
        "gradient": Gradient(),
        "smoothgrad": SmoothGrad(samples=8),
        "ig": IntegratedGradients(steps=8),
    }
    how = Manipulation(epsilon=0.03, steps=6, points=4)
    found = {name: how.evaluate(_subject(model, x, one)) for name, one in methods.items()}
    # Less than half of what its map said is left.
    assert float(found["gradient"].values.mean()) < 0.5
    assert found["smoothgrad"].over(found["gradient"]).low > 0.0
    assert found["ig"].over(found["gradient"]).low > 0.0


def test_gradient_attack_is_stronger_than_random_and_grows_with_the_ball(digits) -> None:
    model, x, _ = digits
    subject = _subject(model, x, "gradient")
    strong = Manipulation(epsilon=0.02, steps=6).evaluate(subject)
    assert (
        Manipulation(epsilon=0.02, steps=6, attack="random").evaluate(subject).over(strong).low > 0
    )
    assert Manipulation(epsilon=0.002, steps=6).evaluate(subject).over(strong).low > 0


@pytest.mark.parametrize("method", [GradCAM(), Occlusion(window=16, stride=16), edge_detector])
def test_other_methods_and_functions(digits, method) -> None:
    model, x, _ = digits
    found = Manipulation(steps=2, points=2).evaluate(_subject(model, x[:3], method))
    assert found.parameters["through"] == "gradient"
    assert any("through the gradient's" in one for one in found.caveats)
    assert bool((found.values <= 1.0 + 1e-12).all())


def test_what_is_stated(digits) -> None:
    model, x, _ = digits
    found = Manipulation(steps=2, points=2, seed=7).evaluate(_subject(model, x[:1], "gradient"))
    fields = {"epsilon": 0.03, "steps": 2, "attack": "gradient", "points": 2, "seed": 7}
    assert fields.items() <= dict(found.parameters).items()
    assert found.parameters["through"] == "itself"
    assert any("proves nothing" in one for one in found.caveats)
    assert found.better == "higher"
    assert len(found.values) == 1


def test_same_seed_same_attack(digits) -> None:
    model, x, _ = digits
    found = [
        Manipulation(steps=2, seed=seed).manipulate(_subject(model, x[:2], "gradient")).inputs
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_constant_inputs_and_maps_have_no_value(digits) -> None:
    model, x, _ = digits
    x = torch.cat([x[:1], torch.full_like(x[:1], 0.5)])
    found = Manipulation(**QUICK).evaluate(_subject(model, x, "gradient"))
    assert not math.isnan(found.values[0])
    assert math.isnan(found.values[1])
    linear = nn.Linear(5, 3)
    table = torch.randn(4, 5)

    def flat(model, inputs, target):
        return torch.ones_like(inputs)

    found = Manipulation(**QUICK).evaluate(_subject(linear, table, flat))
    assert bool(found.values.isnan().all())
    assert any("constant" in one for one in found.caveats)


def test_decisions_that_are_not_kept_have_no_value(digits) -> None:
    model, x, _ = digits

    class Moody(nn.Module):
        """Decides otherwise after a while."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.turned = model, False
            with torch.no_grad():
                self.decided = nn.functional.one_hot(model(x[:2]).argmax(1), 10).sum(0)

        def forward(self, x):
            # Never for the classes that it decided for before.
            return self.inner(x) - 1e3 * self.turned * self.decided

    moody = Moody().eval()
    subject = _subject(moody, x[:2], "gradient")
    assert subject.first.decisions is not None
    subject.classes  # noqa: B018
    moody.turned = True
    found = Manipulation(**QUICK).evaluate(subject)
    assert bool(found.values.isnan().all())
    assert any("not kept" in one for one in found.caveats)


def test_tables_and_random_search_where_nothing_is_differentiable() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    assert bool(
        Manipulation(**QUICK).evaluate(_subject(model, table, "gradient")).values.isfinite().all()
    )

    def steps(x):
        return torch.stack([x.round().sum(1), x.sign().sum(1)], 1).detach()

    subject = _subject(steps, table, lambda model, x, target: x * x)
    with pytest.raises(ModelError, match="attack='random'"):
        Manipulation(**QUICK).evaluate(subject)
    found = Manipulation(epsilon=0.3, steps=20, attack="random").evaluate(subject)
    assert float(found.values.mean()) < 1.0


def test_untouched(digits) -> None:
    model, x, _ = digits
    subject = _subject(model, x[:2], "gradient")
    state = torch.random.get_rng_state()
    modes = [one.training for one in model.modules()]
    Manipulation(**QUICK).evaluate(subject)
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [one.training for one in model.modules()]
    assert all(one.grad is None for one in model.parameters())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("epsilon", 0.0, InputError),
        ("epsilon", "much", InputTypeError),
        ("steps", 0, InputError),
        ("attack", "genetic", InputError),
        ("points", 0, InputError),
        ("softplus", -1.0, InputError),
        ("share", 1.5, InputError),
        ("seed", None, InputTypeError),
    ],
)
def test_bad_fields(field, value, error) -> None:
    with pytest.raises(error, match=field):
        Manipulation(**{field: value})


def test_needs_a_method_and_a_decision(digits) -> None:
    model, x, labels = digits
    with pytest.raises(InputError, match="method"):
        Manipulation()(model, x, torch.rand_like(x), target=labels)
    with pytest.raises(InputError, match="decision"):
        Manipulation()(lambda x: x.flatten(1).sum(1), x, torch.rand_like(x), method="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "grad_cam"])
@pytest.mark.parametrize("attack", ["gradient", "random"])
def test_half_models(dtype, method, attack) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 49, 4)).eval()
        x = torch.rand(3, 3, 16, 16)
    half, metric = deepcopy(model).to(dtype), Manipulation(attack=attack, **QUICK)
    before = explain(half, x.to(dtype), method=method, target=1)
    found = metric(half, x.to(dtype), before)
    whole = metric(model, x, explain(model, x, method=method, target=1))
    assert bool(found.values.isfinite().all())
    # Points of the attacks part where a sign is rounded to the other; both move maps about as far.
    assert float((found.values - whole.values).abs().max()) < 0.15
    assert {one.dtype for one in half.parameters()} == {dtype}


def test_what_is_steerable() -> None:
    assert all(
        steerable(one.recipe())
        for one in (Gradient(), InputXGradient(), SmoothGrad(), IntegratedGradients())
    )
    others = (Gradient(absolute=True), GradCAM(), Occlusion(window=2))
    assert not any(steerable(one.recipe()) for one in others)
