"""DeepLIFT's rescale rule: sums to the difference, as written out by hand, and as Captum has it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saliency_fast as sf
from saliency_fast.errors import InputError, ModelError
from saliency_fast.rules.deeplift import Rescale
from tests.models import Tokens, make, randn
from tests.naive import relative_l2
from tests.rules.ruled import RELUS, SHAPES, Functional, Row, network, points, ruled, scores

EXACT = 1e-10
ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Softshrink),
]


def gap(model: Any, x: Tensor, baseline: Tensor, target: Any, rules: Any) -> float:
    """Of the sum of (x - baseline) * multipliers and the scores' difference, against its size."""
    found = ruled(model, rules, x, target, baseline) * (x - baseline)
    change = scores(model, x, target) - scores(model, baseline, target)
    return float((found.flatten(1).sum(1) - change).abs().max() / found.abs().sum().clamp_min(1e-3))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda one: one.__name__)
def test_summation_to_delta(kind: str, act: Any) -> None:
    model, x, baseline = network(kind, act), points(kind), points(kind, seed=1)
    assert gap(model, x, baseline, [0, 3, 1], Rescale()) < 1e-12


@pytest.mark.parametrize("form", [*RELUS, "exp", "square", "power", "arc tangent"])
def test_every_form(form: str) -> None:
    act = {
        "exp": lambda: Functional(torch.exp),
        "square": lambda: Functional(torch.square),
        "power": lambda: Functional(lambda x: x**3),
        "arc tangent": lambda: Functional(lambda x: x.atan_()),
    } | RELUS
    model, x, baseline = (
        network("residual", act[form]),
        points("residual"),
        points("residual", 3, 1),
    )
    assert gap(model, x, baseline, 1, Rescale()) < 1e-12
    if form in RELUS:
        expected = ruled(network("residual"), Rescale(), x, 1, baseline)
        assert relative_l2(ruled(model, Rescale(), x, 1, baseline), expected) < EXACT


def test_by_hand() -> None:
    """max(0, x) and tanh behind linear layers: multipliers are products of slopes."""
    model, x, baseline = network("mlp"), points("mlp"), points("mlp", seed=1)
    first, second, head = model[0], model[2], model[4]
    model = Row(first, nn.ReLU(), second, nn.Tanh(), head)
    found = ruled(model, Rescale(), x, 2, baseline)
    with torch.no_grad():
        for number in range(len(x)):
            a, b = first(x[number]), first(baseline[number])
            c, d = second(a.relu()), second(b.relu())
            expected = torch.zeros(7, dtype=torch.float64)
            for i in range(7):
                for j in range(9):
                    for k in range(8):
                        low = (a[j].relu() - b[j].relu()) / (a[j] - b[j])
                        high = (c[k].tanh() - d[k].tanh()) / (c[k] - d[k])
                        way = first.weight[j, i] * second.weight[k, j] * head.weight[2, k]
                        expected[i] += way * low * high
            assert relative_l2(found[number], expected) < EXACT


def test_where_nothing_changes_it_is_the_gradient() -> None:
    model, x = network("2-d"), points("2-d")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert relative_l2(ruled(model, Rescale(), x, 1, x.clone()), gradient) < EXACT


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dilated": lambda x: F.max_pool2d(x, 2, 1, 0, 2, ceil_mode=True),
    "with index": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    "method": lambda x: torch.max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_sum_to_delta(name: str) -> None:
    x, baseline = randn(3, 2, 9, 8), randn(3, 2, 9, 8, seed=1)
    width = POOLS[name](x).flatten(1).shape[1]
    model = Row(nn.Conv2d(2, 2, 1), Functional(POOLS[name]), nn.Linear(width, 4)).double()
    assert gap(model, x, baseline, 1, Rescale()) < 1e-12


# --- Captum ---

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: network("mlp"), (7,)),
    "tokens": (lambda: network("tokens", nn.Tanh), (5, 6)),
    "activations apart": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.ELU(), nn.Conv1d(4, 4, 3), nn.LeakyReLU(0.2)),
            *(nn.Conv1d(4, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(40, 6), nn.Sigmoid()),
            nn.Linear(6, 4),
        ),
        (2, 16),
    ),
    "pool apart 1-d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(28, 4)),
        (2, 16),
    ),
    "pool apart 2-d": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4)),
        (2, 9, 9),
    ),
    "pool apart 3-d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(32, 4)),
        (2, 5, 5, 5),
    ),
}
ADJACENT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind: (lambda kind=kind: network(kind), SHAPES[kind]) for kind in ("1-d", "2-d", "3-d")},
    "pool, relu": (
        lambda: Row(nn.Conv2d(2, 4, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Linear(64, 4)),
        (2, 9, 9),
    ),
    "a chain": (
        lambda: Row(
            *(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Tanh()),
            *(nn.Dropout(), nn.Sigmoid(), nn.ReLU(), nn.Linear(64, 4)),
        ),
        (2, 9, 9),
    ),
    "gelu stays": (lambda: Row(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4)), (7,)),
    "softmax": (lambda: Row(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.Softmax(1)), (7,)),
}


def _captum(name: str, table: Any, rules: Rescale, dtype: torch.dtype = torch.float64) -> float:
    make_net, shape = table[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make_net().to(dtype).eval()
    x, baseline = randn(3, *shape).to(dtype), randn(3, *shape, seed=1).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = captum.attr.DeepLift(copy.deepcopy(model), multiply_by_inputs=False)
        expected = peer.attribute(x.clone(), baseline, target=[0, 3, 1])
    return relative_l2(ruled(model, rules, x, [0, 3, 1], baseline), expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETS)
def test_against_captum(name: str, dtype: torch.dtype, bound: float) -> None:
    """Where nonlinearities do not touch, Captum follows the paper."""
    for captums in (False, True):
        assert _captum(name, NETS, Rescale(captum=captums), dtype) < bound


@pytest.mark.parametrize("name", ADJACENT)
def test_captums_departures(name: str) -> None:
    """Where they do it sees the gradient of one for the other, and sums miss the difference."""
    assert _captum(name, ADJACENT, Rescale(captum=True)) < EXACT
    assert _captum(name, ADJACENT, Rescale()) > 1e-3


def test_softmax_of_one_example_is_captums() -> None:
    model = Row(nn.Linear(7, 4), nn.Softmax(1)).double()
    x, baseline = points("mlp"), points("mlp", seed=1)
    found = ruled(model, Rescale(), x, 1, baseline)
    for number in range(3):
        own = slice(number, number + 1)
        alone = ruled(model, Rescale(captum=True), x[own], 1, baseline[own])
        assert relative_l2(found[own], alone) < EXACT


def test_tokens_with_attention() -> None:
    """Products of two tensors have no rule; what there is stays finite and the model unchanged."""
    found = ruled(make(Tokens), Rescale(), randn(2, 6, 8), 1, randn(2, 6, 8, seed=1))
    assert found.isfinite().all()


def test_errors() -> None:
    x = points("tokens")
    model = network("tokens")
    turned = nn.Sequential(Functional(lambda x: x.transpose(0, 1)), model)
    with pytest.raises(ModelError, match="keep the batch on the first axis"):
        ruled(turned, Rescale(), x, 1, x + 1)
    with pytest.raises(InputError, match="epsilon must be a positive"):
        Rescale(0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_half_types(dtype: torch.dtype, batch: int) -> None:
    model = copy.deepcopy(network("2-d")).to(dtype)
    x = points("2-d")[:batch].to(dtype)
    expected = sf.explain(model.to(torch.float64), x.double(), target=1, method="deeplift")
    found = sf.explain(model.to(dtype), x, target=1, method="deeplift")
    # Seven bits of products, through some layers.
    assert relative_l2(found.values.double(), expected.values) < 0.05
