"""Layers drawn anew: which, in which order, from what, and that the model stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from saliency_fast.errors import ModelError
from saliency_fast.evaluate.metrics.sanity import Randomised, seed_of
from saliency_fast.zoo import digits_cnn, digits_vit
from tests.traces import Net, one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def names(copy: Randomised) -> list[str]:
    return [layer.name for layer in copy.layers]


def drawn(model: nn.Module, x: Tensor | None = None) -> Randomised:
    return Randomised(model, None if x is None else lambda copy: copy.eval()(x))


class Backwards(nn.Module):
    """Defines its layers in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.unused, self.first = nn.Linear(4, 2), nn.Linear(3, 3), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x * self.scale))


def test_layers_in_the_order_in_which_they_run() -> None:
    x = torch.randn(1, 3)
    # What never runs stays behind its neighbour; the model's own parameter is where it begins.
    assert names(drawn(Backwards(), x)) == ["unused", "last", "first", ""]
    assert names(drawn(Backwards())) == ["first", "unused", "last", ""]
    assert names(drawn(digits_cnn(), torch.randn(1, 1, 64, 64)))[:3] == [
        *("head", "features.6.1", "features.6.0")
    ]


def test_everything_is_drawn_and_nothing_of_the_model() -> None:
    model = Net()
    x = torch.randn(2, 3, 9, 9)
    with unchanged(model, x):
        copy = drawn(model, x)
        changed = [copy.draw(number, 5) for number in range(len(copy.layers))]
    # The group norm has not learned: its reset gives what it has.
    assert dict(zip(names(copy), changed, strict=True)) == {
        "head": True,
        "norm": False,
        "body.1": True,
        "body.0": True,
    }
    assert copy.model.body[1].running_var.eq(1).all()
    for number in range(len(copy.layers)):
        copy.restore(number)
    for name, value in model.state_dict().items():
        assert torch.equal(value, copy.model.state_dict()[name]), name


def test_draws_depend_on_the_seed_alone() -> None:
    model = digits_vit()
    one, other = Randomised(model), Randomised(model)
    torch.manual_seed(1)
    for number in range(len(one.layers)):
        one.draw(number, seed_of(0, 0, number))
    torch.manual_seed(2)
    for number in reversed(range(len(other.layers))):
        other.draw(number, seed_of(0, 0, number))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other.draw(0, seed_of(0, 1, 0))
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(200)}
    assert len(seeds) == 3200


def test_parameters_that_no_reset_covers_are_normal() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(64, 4)
    with torch.no_grad():
        module.in_proj_weight.mul_(3.0).add_(0.5)
    copy = Randomised(module)
    assert names(copy) == ["out_proj", ""]
    before = module.in_proj_weight.detach()
    assert copy.draw(1, 0)
    after = copy.model.in_proj_weight.detach()
    # 12288 numbers tell mean and deviation to about 1 % of the deviation.
    assert float(after.mean() - before.mean()) == pytest.approx(0, abs=0.04 * float(before.std()))
    assert float(after.std()) == pytest.approx(float(before.std()), rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1])) < 0.05


class Odd(nn.Module):
    """Parameters of all kinds that a reset may miss, replace or reach by accident."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.replaced = nn.Parameter(torch.zeros(3))
        self.by_data = nn.Parameter(torch.zeros(3))
        self.missed = nn.Parameter(torch.full((3,), 2.0))
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)

    def reset_parameters(self) -> None:
        self.inner.reset_parameters()
        self.replaced = nn.Parameter(torch.full((3,), 7.0))
        self.by_data.data.fill_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.replaced + self.by_data + self.missed + self.complex.real)


def test_odd_resets() -> None:
    model, x = Odd(), torch.randn(1, 3)
    with unchanged(model, x):
        copy = drawn(model, x)
        assert names(copy) == ["inner", ""]
        ours = copy.model.replaced
        assert copy.draw(1, 0)
    assert copy.model.replaced is ours
    assert ours.eq(7.0).all()
    assert copy.model.by_data.eq(5.0).all()
    assert len(copy.model.missed.unique()) == 3
    assert not torch.equal(copy.model.complex, model.complex)
    assert torch.equal(copy.model.inner.weight, model.inner.weight)
    assert torch.equal(copy.model.whole, model.whole)


class Needy(nn.Linear):
    def reset_parameters(self, scale: float | None = None) -> None:  # type: ignore[override]
        if scale is None and hasattr(self, "ready"):
            raise TypeError("scale is missing")
        super().reset_parameters()


def test_a_reset_that_fails_is_done_without() -> None:
    model = Needy(3, 3)
    model.ready = True
    copy = Randomised(model)
    assert copy.draw(0, 0)
    assert not torch.equal(copy.model.weight, model.weight)


def test_tied_weights_are_drawn_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    model = Tied()
    copy = drawn(model, torch.randn(1, 3))
    assert [(one.name, list(one.parameters)) for one in copy.layers] == [
        ("head", ["weight", "bias"]),
        ("embedding", ["bias"]),
    ]
    copy.draw(0, 0)
    once = copy.model.head.weight.detach().clone()
    assert copy.draw(1, 1)
    assert torch.equal(copy.model.head.weight, once)
    assert copy.model.embedding.weight is copy.model.head.weight
    assert not torch.equal(once, model.head.weight)


def test_parametrised_weights_are_drawn() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    copy = drawn(model, torch.randn(1, 3))
    for number in range(len(copy.layers)):
        assert copy.draw(number, number)
    assert not torch.equal(copy.model[0].weight, model[0].weight)


def test_scripted_and_compiled_models() -> None:
    model = digits_cnn().features[0]
    scripted = torch.jit.script(model)
    copy = drawn(scripted, torch.randn(1, 1, 8, 8))
    assert all(copy.draw(number, 0) for number in range(len(copy.layers)))
    assert torch.equal(scripted[0].weight, model[0].weight)
    for number in range(len(copy.layers)):
        copy.restore(number)
    expected = scripted.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in copy.model.state_dict().items())
    compiled = torch.compile(model)
    assert names(drawn(compiled, torch.randn(1, 1, 8, 8))) == ["1", "0"]


def test_inference_mode() -> None:
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        copy = Randomised(model)
        assert copy.draw(0, 0)
    assert not any(one.is_inference() for one in copy.model.parameters())


class Stuck(nn.Linear):
    def __deepcopy__(self, memo: object) -> None:
        raise ValueError("holds a connection")


def test_errors() -> None:
    with pytest.raises(ModelError, match=r"nn\.Module, got function"):
        Randomised(lambda x: x)
    with pytest.raises(ModelError, match=r"nn\.Module, got method"):
        Randomised(nn.Linear(2, 2).forward)
    with pytest.raises(ModelError, match="it has none"):
        Randomised(nn.ReLU())
    with pytest.raises(ModelError, match=r"cannot be copied.*holds a connection"):
        Randomised(Stuck(2, 2))
    with pytest.raises(ModelError, match="has no numbers yet"):
        Randomised(nn.LazyLinear(2))
    frozen = nn.Linear(2, 2)
    frozen.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    frozen.bias = None
    with pytest.raises(ModelError, match=r"torch\.int8"):
        Randomised(frozen)


def test_a_model_that_cannot_run_counts_as_it_is_defined() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def fails(copy: nn.Module) -> None:
        raise ModelError("no")

    copy = Randomised(model, fails)
    assert names(copy) == ["1", "0"]
    assert not any(one._forward_pre_hooks for one in copy.model.modules())
