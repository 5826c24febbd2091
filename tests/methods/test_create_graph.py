"""Maps inside of a loss: values on autograd's graph, against differences of plain maps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast.errors import InputError
from saliency_fast.methods import METHODS

CONSTANT = {"sigma": 0.3}
SUMS: dict[str, Any] = {
    "gradient": sf.Gradient(),
    "absolute gradient": sf.Gradient(absolute=True),
    "input x gradient": sf.InputXGradient(),
    "integrated gradients": sf.IntegratedGradients(steps=5),
    "gauss": sf.IntegratedGradients(steps=4, rule="gauss_legendre"),
    "smoothgrad": sf.SmoothGrad(samples=6, **CONSTANT),
    "smoothgrad squared": sf.SmoothGradSquared(samples=6, **CONSTANT),
    "vargrad": sf.VarGrad(samples=6, **CONSTANT),
    "expected gradients": sf.ExpectedGradients(samples=6),
    "gradient shap": sf.GradientShap(samples=6),
}
TAKE_BASELINES = ("integrated gradients", "gauss", "expected gradients", "gradient shap")


class Table(nn.Module):
    """Smooth, with what tells training and evaluation mode apart, and what works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, 3)
        self.norm.running_mean.normal_(), self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def made(kind: type[nn.Module] = Table) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def check(got: Tensor | None, call: Any, leaf: Tensor, step: float = 1e-6) -> None:
    """A gradient against central differences of `call()` along two random directions."""
    got = torch.zeros_like(leaf) if got is None else got
    generator = torch.Generator().manual_seed(leaf.numel())
    for _ in range(2):
        way = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
        kept, ends = leaf.detach().clone(), []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                leaf.copy_(kept + sign * step * way)
            ends.append(float(call().detach()))
        with torch.no_grad():
            leaf.copy_(kept)
        right = (ends[0] - ends[1]) / (2 * step)
        assert float((got * way).sum()) == pytest.approx(right, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_their_derivatives(name: str, training: bool) -> None:
    model, generator = made().train(training), torch.Generator().manual_seed(1)
    x, weight = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    own: dict[str, Any] = {"target": [0, 2, 1], "method": SUMS[name]}
    if name in TAKE_BASELINES:
        own["baseline"] = torch.randn(2, 4, dtype=torch.float64, generator=generator)
        if "shap" not in name and name != "expected gradients":
            own["baseline"] = own["baseline"][:1]
    plain = sf.explain(model, x, **own)
    leaf = x.clone().requires_grad_()
    found = sf.explain(model, leaf, **own, create_graph=True)
    torch.testing.assert_close(found.values, plain.values, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.scores, plain.scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.error, plain.error, rtol=1e-6, atol=1e-9, equal_nan=True)
    if plain.delta is not None:
        torch.testing.assert_close(found.delta, plain.delta, rtol=1e-6, atol=1e-12)
    assert model.training is training
    assert all(one.grad is None for one in model.parameters())
    assert leaf.grad is None
    # In training mode this writes to the statistics, between a map and its backward pass.
    model(x.clone()).sum().detach()
    model = made().train(training)
    found = sf.explain(model, leaf, **own, create_graph=True)
    model(x.clone())
    (found.values * weight).sum().backward()

    fresh = made().train(training)

    def loss() -> Tensor:
        return (sf.explain(fresh, x, **own).values * weight).sum()

    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        check(mine.grad, loss, theirs)
    check(leaf.grad, loss, x)


def test_several_targets_inputs_and_baselines() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 5).double(), nn.Linear(2, 5).double()

    def model(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(first(a) * second(b)) * c

    a, b = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    scale = torch.rand(2, 5).double().requires_grad_()
    own = {
        "target": [[0, 1], [3, 2]],
        "method": sf.IntegratedGradients(steps=4),
        "baseline": [0.0, (torch.full((3,), 0.2).double(), 0.1)],
    }
    found = sf.explain(model, (a, b), **own, forward_args=scale, create_graph=True)
    plain = sf.explain(model, (a, b), **own, forward_args=scale.detach())
    for got, right in zip(found.values, plain.values, strict=True):
        torch.testing.assert_close(got, right)
    sum(one.square().sum() for one in found.values).backward()

    def loss() -> Tensor:
        again = sf.explain(model, (a, b), **own, forward_args=scale.detach())
        return sum(one.square().sum() for one in again.values)

    for leaf in (first.weight, second.bias):
        check(leaf.grad, loss, leaf)
    check(scale.grad, loss, scale)


class Attends(nn.Module):
    """Fused attention and a recurrent layer, whose kernels have no second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.series = nn.Linear(4, 12), nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x)[:, None].chunk(3, -1)
        return self.series(functional.scaled_dot_product_attention(q, k, v)[:, 0])[0][:, -1]


def test_attention_and_recurrence() -> None:
    model, x = made(Attends), torch.randn(2, 5, 4).double()
    found = sf.explain(model, x, target=1, method="input_x_gradient", create_graph=True)
    found.values.square().sum().backward()

    def loss() -> Tensor:
        return sf.explain(model, x, target=1, method="input_x_gradient").values.square().sum()

    leaf = model.inner.weight
    check(leaf.grad, loss, leaf)


def test_examples_that_meet_in_the_model_are_explained_alone() -> None:
    inner = nn.Linear(4, 1).double()

    def model(x: Tensor) -> Tensor:
        return torch.tanh(inner((x - x.mean()) / x.std()))

    x = torch.randn(3, 4).double()
    own: dict[str, Any] = {"method": sf.IntegratedGradients(steps=4), "create_graph": True}
    start = torch.arange(4.0).double()
    with pytest.warns(UserWarning, match="depend on each other"):
        found = sf.explain(model, x, baseline=start, **own)
    for number in range(3):
        alone = sf.explain(model, x[number : number + 1], baseline=start, **own)
        torch.testing.assert_close(found.values[number], alone.values[0])
        torch.testing.assert_close(found.scores[number], alone.scores[0])


def test_training_with_a_prior_on_the_map() -> None:
    """A model learns to leave the second half of its input alone, and the task with the first."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    x[:, 3:] = x[:, :3] + 0.1 * torch.randn(64, 3)
    y = (x[:, 0] > 0).long()
    shares, errors = [], []
    for strength in (0.0, 3.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        engine = sf.Engine(model, sf.IntegratedGradients(steps=4), create_graph=True)
        for _ in range(60):
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            prior = engine(x, y).values[:, 3:].square().sum(1).mean()
            (loss + strength * prior).backward()
            optimiser.step()
            assert model.training
        values = sf.explain(model, x, target=y).values.abs()
        shares.append(float(values[:, 3:].sum() / values.sum()))
        errors.append(float((model.eval()(x).argmax(1) != y).float().mean()))
    assert shares[1] < 0.3 * shares[0]
    assert errors[1] < 0.1


def test_maps_of_such_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.rand(2, 3, 6, 6)
    found = sf.explain(model, x, target=1, method="gradient", create_graph=True)
    plain = sf.explain(model, x, target=1, method="gradient")
    for reduction in ("sum", "absmax", "l2"):
        own = found.map(reduction)
        assert own.requires_grad
        torch.testing.assert_close(own, plain.map(reduction))
    assert found.overlay(x).shape == (2, 6, 6, 3)
    assert "gradient" in repr(found)


def test_what_has_no_graph_says_what_has(tmp_path: Any) -> None:
    model, x = nn.Linear(4, 3), torch.rand(2, 4)
    sums = {one.name for one in SUMS.values()}
    for name in set(METHODS) - sums:
        with pytest.raises(InputError, match=r"create_graph=True is for .*expected_gradients"):
            sf.Engine(model, name, create_graph=True)
    for given, words in (
        ({"method": sf.IntegratedGradients(tolerance=0.1)}, "fixed number of steps"),
        ({"method": sf.SmoothGrad(standard_error=True)}, "plain fields"),
        ({"at": "0"}, "maps of the inputs"),
        ({"precision": "bfloat16"}, "the model as it is"),
    ):
        with pytest.raises(InputError, match=words):
            sf.explain(model, x, target=1, create_graph=True, **given)
    engine = sf.Engine(model, "gradient", create_graph=True)
    with pytest.raises(InputError, match=r"engine\.stream"):
        next(engine.stream(x, 1))
    with pytest.raises(InputError, match=r"engine\.submit"):
        engine.submit(x, 1)
    with torch.no_grad():
        found = engine(x, 1)
    assert found.values.requires_grad
    assert not sf.load(found.save(tmp_path / "map.safetensors")).values.requires_grad
