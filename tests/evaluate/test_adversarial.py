"""FGSM and PGD: as written in the papers, inside of ball and bounds, and the model untouched."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from saliency_fast import zoo
from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.attacks import fgsm, pgd, uniform
from tests.evaluate import naive_adversarial as naive


class BrokenError(RuntimeError):
    """What a model raises half-way."""


@pytest.fixture(scope="module")
def digits():
    model, samples = zoo.digits_cnn(), zoo.held_out()
    return model, samples.images[:16], samples.labels[:16]


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    return model.eval(), x, torch.tensor([0, 4, 2])


ATTACKS = {"fgsm": fgsm, "pgd": lambda *given, **more: pgd(*given, steps=4, **more)}


def test_fgsm_is_one_step_along_the_sign(small) -> None:
    model, x, labels = small
    sign = naive.cross_entropy_gradient(model, x, labels).sign()
    expected = naive.clipped(x + 0.07 * sign, x, 0.07, float(x.min()), float(x.max()))
    assert torch.allclose(fgsm(model, x, labels, 0.07).inputs, expected, atol=1e-12, rtol=0)


def test_pgd_is_the_naive_loop(small) -> None:
    model, x, labels = small
    start = x + 0.1 * uniform(x, 3)
    expected = naive.pgd(model, x, labels, 0.1, 5, 0.03, start, 0.0, 1.0)
    found = pgd(model, x, labels, 0.1, 5, 0.03, 3, bounds=(0.0, 1.0))
    assert torch.allclose(found.inputs, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("epsilon", [0.02, 0.2])
def test_stays_in_ball_and_bounds(digits, attack, epsilon) -> None:
    model, x, labels = digits
    found = ATTACKS[attack](model, x, labels, epsilon).inputs
    # One rounding of x + epsilon, in units of at most 1.
    assert float((found.double() - x.double()).abs().max()) <= epsilon + 2.0**-24
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0


def test_bounds_of_each_channel(small) -> None:
    model, x, labels = small
    low = x.amin((0, 2, 3)).view(3, 1, 1) - 0.01
    high = x.amax((0, 2, 3)).view(3, 1, 1) + 0.02
    found = pgd(model, x, labels, 0.5, 3, bounds=(low, high)).inputs
    assert bool((found >= low).all())
    assert bool((found <= high).all())


@pytest.mark.parametrize("attack", ATTACKS)
def test_fools_the_digits_model(digits, attack) -> None:
    model, x, labels = digits
    found = ATTACKS[attack](model, x, labels, 0.1)
    with torch.no_grad():
        before, after = model(x).argmax(1), model(found.inputs).argmax(1)
    assert torch.equal(found.before, before)
    assert torch.equal(found.after, after)
    assert torch.equal(found.fooled, (before == labels) & (after != labels))
    assert float(found.fooled.double().mean()) > 0.7


def test_towards_a_class(digits) -> None:
    model, x, labels = digits
    aim = (labels + 1) % 10
    found = pgd(model, x, aim, 0.15, steps=20, targeted=True)
    assert float((found.after == aim).double().mean()) > 0.7
    assert torch.equal(found.fooled, (found.after == aim) & (found.before != aim))


def test_predicted_is_what_the_model_decides(digits) -> None:
    model, x, _ = digits
    with torch.no_grad():
        decided = model(x).argmax(1)
    assert torch.equal(
        fgsm(model, x, "predicted", 0.05).inputs, fgsm(model, x, decided, 0.05).inputs
    )


def test_deterministic_by_seed(small) -> None:
    model, x, labels = small
    runs = [pgd(model, x, labels, 0.1, 2, seed=seed).inputs for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_starts_are_uniform_and_apart() -> None:
    x = torch.zeros(4, 1, 100, 100)
    one, two = uniform(x, 0), uniform(x, 1)
    # A mean of n uniforms in [-1, 1] has deviation 1 / sqrt(3 n); five of them here.
    assert abs(float(one.mean())) < 5 / (3 * one.numel()) ** 0.5
    assert float(one.abs().max()) <= 1.0
    assert len({tuple(row.flatten()[:8].tolist()) for row in torch.cat([one, two])}) == 8


def _state(model: nn.Module) -> list[object]:
    return [
        [
            (name, one.clone(), one.grad, one.requires_grad)
            for name, one in model.named_parameters()
        ],
        [one.training for one in model.modules()],
        [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()],
        torch.random.get_rng_state(),
        torch.is_grad_enabled(),
    ]


def _same(a: list[object], b: list[object]) -> bool:
    for (name, value, grad, wants), (name_b, value_b, grad_b, wants_b) in zip(
        a[0], b[0], strict=True
    ):
        if name != name_b or grad is not grad_b or wants != wants_b:
            return False
        if not torch.equal(value, value_b):
            return False
    return a[1:3] == b[1:3] and torch.equal(a[3], b[3]) and a[4] == b[4]


@pytest.mark.parametrize("attack", ATTACKS)
def test_model_and_random_state_are_untouched(small, attack) -> None:
    model, x, labels = small
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, given = _state(model), x.clone()
    with torch.no_grad():
        ATTACKS[attack](model, x, labels, 0.1)
    assert _same(before, _state(model))
    assert torch.equal(x, given)
    assert not x.requires_grad


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_untouched_after_errors(small, error) -> None:
    model, x, labels = small
    left = [4]

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x):
            # Not of the module, whose attributes come back before each run.
            left[0] -= 1
            if left[0] < 0:
                raise error
            return self.inner(x)

    failing = Failing().train()
    before = _state(failing)
    with pytest.raises(error):
        pgd(failing, x, labels, 0.1, steps=50)
    assert _same(before, _state(failing))


def test_tables_and_models_with_softmax_inside() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3), nn.Softmax(1))
    x = torch.randn(7, 6)
    found = pgd(model, x, "predicted", 1.0, steps=10)
    assert found.inputs.shape == x.shape
    assert int(found.fooled.sum()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(small, dtype) -> None:
    model, x, _ = small
    half = deepcopy(model).float().to(dtype)
    for attack in (fgsm, pgd):
        found = attack(half, x.to(dtype), "predicted", 0.3)
        assert found.inputs.dtype == dtype
        assert torch.equal(half(found.inputs).argmax(1), found.after)
        # The ball's edge is rounded to the type of the model.
        far = (found.inputs.double() - x.to(dtype).double()).abs().amax()
        assert 0.0 < float(far) <= 0.3 + 2 * torch.finfo(dtype).eps * float(x.abs().max())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"epsilon": 0.0}, InputError, "epsilon"),
        ({"epsilon": float("nan")}, InputError, "epsilon"),
        ({"steps": 0}, InputError, "steps"),
        ({"step_size": -1.0}, InputError, "step_size"),
        ({"seed": 0.5}, InputTypeError, "seed"),
        ({"seed": (1, 2)}, InputTypeError, "one 64-bit int"),
        ({"targeted": 1}, InputTypeError, "targeted"),
        ({"target": 5}, InputError, "5 classes"),
        ({"target": [0, 1]}, InputError, "wrong length"),
        ({"target": None}, InputError, "target"),
        ({"bounds": (0.4, 0.6)}, InputError, "bounds do not hold"),
        ({"bounds": 1.0}, InputTypeError, "bounds must be two"),
        ({"bounds": (torch.zeros(7), 1.0)}, InputError, "broadcast"),
        ({"x": "image"}, InputTypeError, "one tensor"),
        ({"x": torch.zeros(0, 3, 8, 8)}, InputError, "empty"),
        ({"model": 3}, InputTypeError, "callable"),
    ],
)
def test_bad_arguments(small, change, error, says) -> None:
    model, x, labels = small
    given = {"model": model, "x": x, "target": labels, "epsilon": 0.1, "steps": 2} | change
    with pytest.raises(error, match=says):
        pgd(**given)


def test_one_number_per_example_has_no_classes(small) -> None:
    _, x, _ = small
    with pytest.raises(InputError, match="classes"):
        fgsm(lambda points: points.flatten(1).sum(1), x, 0, 0.1)
