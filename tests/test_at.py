"""Explaining at layers: against Captum's layer methods, and what goes wrong."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.bind import bind
from saliency_fast.errors import InputError, InputTypeError, ModelError
from saliency_fast.model.layers import Change, hooked, last_spatial
from tests.configured import RECORDED, configure
from tests.naive import relative_l2


def convolutional(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(512, 5),
    )


class Words(nn.Module):
    """Token ids and a mask to three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((torch.tanh(self.table(ids)) * mask[..., None]).sum(1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.recurrent = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.layer(self.layer(x))[None])[0][0]


class States(nn.Module):
    """A layer that gives its outputs [B, T, E], and its states [1, B, E] in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].tanh().mean(1))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("layer", ["0", "1", "2", "4"])
def test_integrated_gradients_at_a_layer(layer: str) -> None:
    model, x = convolutional().double(), images()
    start = torch.full_like(x, 0.1)
    method = sf.IntegratedGradients(9, "midpoint")
    found = sf.explain(model, x, target=2, at=layer, baseline=start, method=method)
    # A layer's output may be overwritten behind it, which Captum's leaf cannot be.
    over = convolutional(inplace=True).double()
    again = sf.explain(over, x, target=2, at=layer, baseline=start, method=method)
    torch.testing.assert_close(again.values, found.values)
    expected = LayerIntegratedGradients(model, model[int(layer)]).attribute(
        x, start, target=2, n_steps=9, method="riemann_middle"
    )
    # Captum rounds its weights to float32.
    assert relative_l2(found.values, expected) < 1e-6
    gain = model(x)[:, 2] - model(start)[:, 2]
    torch.testing.assert_close(found.delta, found.values.flatten(1).sum(1) - gain)
    assert found.provenance.at == [layer]


@pytest.mark.parametrize("of_input", [False, True])
def test_gradients_at_a_layer_by_object(of_input: bool) -> None:
    model, x = convolutional().double(), images()
    found = sf.explain(
        model, x, target=1, at=model[2], method="input_x_gradient", layer_input=of_input
    )
    layer = LayerGradientXActivation(model, model[2])
    expected = layer.attribute(x, target=1, attribute_to_layer_input=of_input)
    assert relative_l2(found.values, expected) < 1e-12


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).mean((2, 3)), self.right(x).mean((2, 3))
        return torch.cat([left.tanh(), right * left.sum(1, keepdim=True)], 1)


def test_several_layers_give_a_tuple() -> None:
    model, x = Branches().double(), images()
    found = sf.explain(model, x, target=3, at=["left", model.right], method="gradient")
    for values, name in zip(found.values, ("left", "right"), strict=True):
        alone = sf.explain(model, x, target=3, at=name, method="gradient")
        torch.testing.assert_close(values, alone.values)
    # What the first gives no longer reaches what the second gives.
    with pytest.raises(ModelError, match="not differentiable in input 0"):
        sf.explain(convolutional().double(), x, target=1, at=["0", "2"], method="gradient")


def test_a_recorded_model_leaves_out_what_leads_to_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(monkeypatch, **RECORDED)
    model = convolutional(inplace=True)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    found = sf.explain(model, x, target=2, at="2")
    plain = sf.explain(model, x, target=2, at="2", lean=False)
    assert "recorded, 4 calls" in found.provenance.strategy
    assert relative_l2(found.values, plain.values) < 1e-5


def test_a_function_around_a_model_takes_layers_themselves() -> None:
    model, x = convolutional().double(), images()
    found = sf.explain(lambda x: model(x)[:, 1], x, at=model[2], method="gradient")
    expected = sf.explain(model, x, target=1, at="2", method="gradient")
    torch.testing.assert_close(found.values, expected.values)


def test_what_points_took_is_known_to_later_engines_and_goes_with_the_model() -> None:
    model, x = convolutional(), images().float()
    sf.explain(model, x, target=1, at="2")
    (found,) = (one for key, one in sf.Engine(model)._location.caches.items() if key)
    probes = list(found.values())
    sf.explain(model, x, target=1, at="2")
    assert all(one is other for one, other in zip(probes, found.values(), strict=True))
    gone = weakref.ref(model)
    del model, found, probes
    gc.collect()
    assert gone() is None


def test_auto_looks_again_where_its_layer_was_replaced() -> None:
    model, x = convolutional(), images().float()
    engine = sf.Engine(model, "gradient", at="auto")
    (before,) = engine._location._layers("auto", bind(x, 1, (), None))
    name = engine(x, 1).provenance.at[0]
    assert isinstance(before, nn.ReLU)
    model[int(name)] = nn.ReLU()
    (after,) = engine._location._layers("auto", bind(x, 1, (), None))
    assert after is not before
    assert engine(x, 1).values.isfinite().all()


class Overwriting(nn.Module):
    """What a layer gives is changed through views behind it, and so is what leads there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, 0].add_(1.0)
        z = self.second(y)
        z[:, :2].mul_(0.5)
        z.flatten(2)[:, :, 3].sigmoid_()
        return z.tanh().mean((2, 3))


@pytest.mark.parametrize("at", [None, "first", "second"])
def test_what_is_written_through_views_is_not_left_out(
    at: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, **RECORDED)
    model, x = Overwriting(), torch.randn(1, 3, 128, 128)
    found = sf.explain(model, x, target=1, at=at)
    plain = sf.explain(model, x, target=1, at=at, lean=False)
    assert "recorded" in found.provenance.strategy
    assert relative_l2(found.values, plain.values) < 1e-5


def test_token_ids_are_explained_at_their_embeddings() -> None:
    model, ids = Words().double(), torch.randint(0, 30, (2, 7))
    mask = torch.ones(2, 7).double()
    mask[1, 5:] = 0
    method = sf.IntegratedGradients(rule="midpoint")
    explain = {"target": 1, "at": "embeddings", "forward_args": (mask,), "method": method}
    pad = torch.full((1, 7), 3)
    found = sf.explain(model, ids, baseline=pad, **explain)
    expected = LayerIntegratedGradients(model, model.table).attribute(
        ids, pad, target=1, additional_forward_args=(mask,), method="riemann_middle"
    )
    assert relative_l2(found.values, expected) < 1e-6
    assert not found.values[1, 5:].any()
    # Without a baseline: from zero vectors, not from whatever token 0 is.
    zero = sf.explain(model, ids, **explain)
    gain = model(ids, mask)[:, 1] - model.head.bias[1]
    torch.testing.assert_close(zero.values.sum((1, 2)), gain.detach(), rtol=1e-3, atol=1e-3)
    drawn = sf.ExpectedGradients(samples=8)
    with pytest.raises(InputError, match="a set is shared"):
        sf.explain(model, ids, baseline=torch.randint(0, 30, (5, 7)), **explain | {"method": drawn})


def test_further_methods_and_ways_of_asking() -> None:
    model, x = convolutional().double(), images()
    engine = sf.Engine(model, sf.SmoothGrad(samples=4, seed=3), at="2")
    alone = engine(x, 1).values
    assert "points" in str(engine.plan(x, 1))
    torch.testing.assert_close(engine.submit(x, 1).result().values, alone)
    *_, last = engine.stream(x, 1)
    torch.testing.assert_close(last.values, alone)
    found = sf.explain(
        model, x, target=1, at="2", method=sf.ExpectedGradients(samples=6), baseline=images(3)
    )
    assert found.values.shape == alone.shape


def test_records_replay(tmp_path: object) -> None:
    model, x = convolutional(), images().float()
    found = sf.explain(model, x, target=1, at="2", layer_input=True)
    path = found.save(f"{tmp_path}/one.safetensors")
    assert sf.replay(path, model, x)


def test_nothing_stays_behind_and_threads_do_not_mix() -> None:
    model, x = convolutional().double(), images()
    expected = [sf.explain(model, x, target=k, at="2").values for k in range(4)]
    plain, found = model(x), {}

    def ask(k: int) -> None:
        found[k] = sf.explain(model, x, target=k, at="2").values

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for one in threads:
        one.start()
    # Runs of this thread pass by the others' hooks.
    for _ in range(20):
        torch.testing.assert_close(model(x), plain)
    for one in threads:
        one.join()
    for k in range(4):
        torch.testing.assert_close(found[k], expected[k])
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_states_of_recurrent_layers_are_no_place() -> None:
    model, x = States().double(), torch.randn(2, 5, 4).double()
    found = sf.explain(model, x, target=1, at="recurrent", method="input_x_gradient")
    hidden = model.recurrent(x)[0].detach()
    slope = (1 - hidden.tanh() ** 2) * model.head.weight[1] / 5
    torch.testing.assert_close(found.values, (hidden * slope).detach())


def test_errors() -> None:
    model, x = convolutional(), images().float()
    with pytest.raises(InputError, match=r"no layer 'conv'; its layers are '0'"):
        sf.explain(model, x, target=0, at="conv")
    with pytest.raises(InputError, match="Linear is no layer of this Sequential"):
        sf.explain(model, x, target=0, at=nn.Linear(2, 2))
    with pytest.raises(InputTypeError, match="at must be a layer"):
        sf.explain(model, x, target=0, at=3)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match=r"at names layers of a torch\.nn\.Module"):
        sf.explain(lambda x: x.sum((1, 2, 3)), x, at="2")
    with pytest.raises(ModelError, match="the layer Linear did not run"):
        sf.explain(lambda x: x.sum((1, 2, 3)), x, at=model[6])
    with pytest.raises(InputError, match="at is empty"):
        sf.explain(model, x, target=0, at=[])
    with pytest.raises(InputError, match=r"no torch\.nn\.Embedding"):
        sf.explain(model, x, target=0, at="embeddings")
    with pytest.raises(InputError, match="region is of the inputs"):
        sf.explain(model, x, target=0, at="2", region=[slice(0, 3), slice(0, 3)])
    words = Words()
    named = nn.ModuleDict({"encoder": words})
    with pytest.raises(InputError, match=r"did you mean 'encoder\.table'"):
        sf.explain(named, x, target=0, at="table")
    twice = Twice()
    with pytest.raises(ModelError, match="runs more than once"):
        sf.explain(twice, torch.randn(2, 4), target=0, at="layer")
    with pytest.raises(ModelError, match="did not run"):
        sf.explain(twice, torch.randn(2, 4), target=0, at="unused")
    with pytest.raises(InputError, match="batch on its first axis"):
        sf.explain(twice, torch.randn(2, 4), target=0, at="recurrent")


@pytest.mark.parametrize("kind", ["layers", "auto"])
def test_runs_of_other_threads_while_hooks_come_and_go(kind: str) -> None:
    # Between its two dictionaries PyTorch calls a hook that asks for keywords without them.
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.rand(1, 1, 5, 5)
    expected, found = model(x), list[Tensor]()

    def halfway() -> None:
        for module in model.modules():
            module._forward_pre_hooks_with_kwargs.clear()
        other = threading.Thread(target=lambda: found.append(model(x)))
        other.start()
        other.join()

    if kind == "layers":
        with hooked([model[0]], lambda number, value: None, of_input=True):
            halfway()
    else:

        def run(number: int, change: Change | None) -> tuple[Tensor, Tensor]:
            given = x if change is None else change(x)
            pairs = [(one, dict(one._forward_pre_hooks_with_kwargs)) for one in model.modules()]
            halfway()
            for module, known in pairs:
                module._forward_pre_hooks_with_kwargs.update(known)
            out: Tensor = model(given).mean((2, 3))
            return out, out[:, :1]

        assert last_spatial(model, run, 1)[0] is model[1]
    assert torch.equal(found[0], expected)


class TimeFirst(nn.Module):
    """Series [B, T, 4], whose middle has the steps before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.mixed = nn.Identity(), nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mixed(self.turned(x.transpose(0, 1)))).mean(0))


@pytest.mark.parametrize("method", ["conductance", "gradient", "lrp", "integrated_gradients"])
@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (2, 2), (4, 4), (1, 51), (33, 32)])
def test_a_layer_whose_first_axis_is_time(method: str, batch: int, steps: int) -> None:
    # Where there are as many steps as examples or rows, the length of the axis tells nothing.
    model, x = TimeFirst().double(), torch.randn(batch, steps, 4).double()
    with pytest.raises(InputError, match=r"batch on its first axis: got \[\d+, \d+, 4\] for"):
        sf.explain(model, x, target=1, at="turned", method=method)


def test_conductance_of_one_step_whose_axis_comes_first() -> None:
    model, x = TimeFirst().double(), torch.randn(1, 1, 4).double()
    with pytest.raises(InputError, match="batch on its first axis"):
        sf.explain(model, x, target=1, at="turned", method="conductance")
