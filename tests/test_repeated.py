"""Calls like earlier ones: what is reused gives the same results, and is given up where it must."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import engines
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.record import tensor_sha256, weights_sha256

X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = ("gradient", "input_x_gradient")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*parts, nn.Linear(36, 5)).eval()


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    score = model(leaf).gather(1, target[:, None]).sum()
    return torch.autograd.grad(score, leaf)[0]


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From then on no call may be planned."""

    def forbid() -> None:
        def planned(*_: Any, **__: Any) -> Any:
            raise AssertionError("the call was planned")

        monkeypatch.setattr(engines, "prepare", planned)

    return forbid


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("several", [False, True])
def test_the_third_call_is_not_planned_and_has_the_same_result(
    method: str, batch: int, several: bool, unplanned: Any
) -> None:
    model, x = network(), X[:batch]
    target: Any = torch.arange(batch) % 5 if several else 2
    classes = target if several else torch.full((batch,), 2)
    first = [sf.explain(model, x, target=target, method=method) for _ in range(3)][1]
    unplanned()
    again = sf.explain(model, x, target=target, method=method)
    expected = gradient(model, x, classes) * (x if method == "input_x_gradient" else 1)
    torch.testing.assert_close(again.values, expected, rtol=1e-5, atol=1e-7)
    for one in fields(again):
        if one.name not in ("provenance", "layouts"):
            mine, theirs = getattr(again, one.name), getattr(first, one.name)
            same = torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
            assert same, one.name
    assert again.layout == first.layout
    for one in fields(again.provenance):
        if one.name not in ("seconds", "peak_bytes"):
            assert getattr(again.provenance, one.name) == getattr(first.provenance, one.name), one


def test_engines_of_one_model_share_it(unplanned: Any) -> None:
    model = network()
    for _ in range(3):
        sf.Engine(model, "gradient")(X[:1], 1)
    unplanned()
    other = 1 - X[:1]
    found = sf.Engine(model, "gradient")(other, 3).values
    torch.testing.assert_close(found, gradient(model, other, torch.tensor([3])))


def warmed(model: nn.Module, batch: int = 1) -> sf.Engine:
    engine = sf.Engine(model, "gradient")
    for _ in range(4):
        engine(X[:batch], 1)
    return engine


@pytest.mark.parametrize("target", [5, -1, True, torch.tensor([9])])
def test_targets_are_checked(target: Any) -> None:
    engine = warmed(network())
    with pytest.raises((InputError, InputTypeError)):
        engine(X[:1], target)


def test_inputs_are_checked() -> None:
    engine = warmed(network())
    with pytest.raises(InputError, match="NaN"):
        engine(torch.full_like(X[:1], torch.nan), 1)


def test_results_are_checked() -> None:
    model = network()
    engine = warmed(model)
    nn.init.zeros_(model[5].weight)
    with pytest.warns(UserWarning, match="zero everywhere"):
        engine(X[:1], 1)
    nn.init.constant_(model[5].weight, torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        engine(X[:1], 1)


@pytest.mark.parametrize("batch", [1, 16])
def test_another_model_is_planned_anew(batch: int) -> None:
    model = network()
    engine, target = warmed(model, batch), torch.full((batch,), 1)
    for number, other in ((2, nn.Tanh()), (5, nn.Linear(36, 7)), (3, nn.AvgPool2d(2))):
        model[number] = other
        found = engine(X[:batch], 1).values
        torch.testing.assert_close(found, gradient(model, X[:batch], target))


def test_rows_that_meet_later_are_noticed() -> None:
    class Meeting(nn.Module):
        meets = False

        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean(0) if self.meets else x * x.mean(1, keepdim=True)

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), Meeting(), nn.Linear(6, 5)).eval()
    engine = warmed(model, 16)
    model[2].meets = True
    with pytest.warns(UserWarning, match="depend on each other"):
        found = engine(X, 1).values
    alone = [gradient(model, x[None], torch.tensor([1]))[0] for x in X]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-6)


def test_the_surroundings_stay() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            torch.rand(1)
            return x

    model = nn.Sequential(*network(), Drawing()).train()
    engine, state = warmed(model), torch.get_rng_state()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        engine(X[:1], 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(one.training for one in model.modules())
    assert not hasattr(model[6], "seen")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_hashes_are_of_the_inputs_and_weights_at_the_call() -> None:
    model, x = network(), X[:1].clone()
    engine = warmed(model)
    inputs, weights = [tensor_sha256(x)], weights_sha256(model)
    first = engine(x, 1)
    x.zero_()
    assert first.provenance.input_sha256 == inputs
    assert first.provenance.weights_sha256 == weights
    # Not counted by PyTorch.
    model[5].weight.data.add_(1)
    second = engine(X[:1], 1)
    assert second.provenance.weights_sha256 == weights_sha256(model) != weights
    with torch.no_grad():
        model[5].weight.add_(1)
    late = sf.Engine(model, "gradient")(X[:1], 1)
    with torch.no_grad():
        model[5].bias.add_(1)
    assert late.provenance.weights_sha256 == weights_sha256(model)
    assert "have changed" in late.provenance.notes["weights_sha256"]


def test_a_result_copies_and_holds_no_model() -> None:
    model = network()
    engine = warmed(model)
    found = engine(X[:1], 1)
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert other.provenance == found.provenance
        assert torch.equal(other.values, found.values)
    fresh = engine(X[:1], 1)
    gone = weakref.ref(model)
    del model, engine
    gc.collect()
    assert gone() is None
    assert fresh.provenance.weights_sha256 == found.provenance.weights_sha256


def test_the_last_layer_is_looked_for_anew_in_another_model() -> None:
    model = network()
    for _ in range(3):
        assert sf.explain(model, X[:1], target=1, method="grad_cam").provenance.at == ["2"]
    model[2] = nn.Identity()
    changed = sf.explain(model, X[:1], target=1, method="grad_cam")
    fresh = sf.explain(copy.deepcopy(model), X[:1], target=1, method="grad_cam")
    assert changed.provenance.at == fresh.provenance.at
    torch.testing.assert_close(changed.values, fresh.values)


def test_importing_leaves_out_what_few_calls_need() -> None:
    names = "saliency_fast.engine.service", "saliency_fast.rules.lrp"
    code = f"import saliency_fast, sys; print([one for one in {names} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
