"""Whatever a model raises, in whatever method, becomes a ModelError that says what to change."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saliency_fast as sf
from saliency_fast import captum
from saliency_fast.errors import InputError, ModelCallError, ModelError
from tests.traces import Net, one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(1))


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gradient": (sf.Gradient(), {}),
    "integrated_gradients": (sf.IntegratedGradients(steps=4), {}),
    "at a layer": (sf.IntegratedGradients(steps=4), {"at": "body.0"}),
    "smoothgrad": (sf.SmoothGrad(samples=4), {}),
    "expected_gradients": (sf.ExpectedGradients(samples=4), {"baseline": image(2)}),
    "occlusion": (sf.Occlusion(3, 3), {}),
    "kernel_shap": (sf.KernelShap(samples=20), {"features": "grid:3"}),
    "guided": (sf.GuidedBackprop(), {}),
    "deeplift": (sf.DeepLift(), {}),
    "lrp": (sf.LRP(), {}),
    "grad_cam": (sf.GradCAM("body.2"), {}),
    "score_cam": (sf.ScoreCAM("body.2"), {}),
    "guided_ig": (sf.GuidedIG(steps=4), {}),
}
every_method = pytest.mark.parametrize("name", METHODS)


class OwnError(Exception):
    """An exception of the user's, whose constructor takes what it likes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


def own() -> None:
    raise OwnError(7, "stop")


RAISED: dict[str, Callable[[], object]] = {
    "RuntimeError": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "IndexError": lambda: torch.ones(2)[5],
    "KeyError": lambda: {}["colour"],
    "ValueError": lambda: int("five"),
    "TypeError": lambda: len(3),  # type: ignore[arg-type]
    "AssertionError": lambda: (_ for _ in ()).throw(AssertionError("five only")),
    "StopIteration": lambda: next(iter(())),
    "FileNotFoundError": lambda: open("/nowhere/at/all"),  # noqa: SIM115
    "UnicodeDecodeError": lambda: b"\xff".decode(),
    "OwnError": own,
}


def explained(model: Any, x: Tensor, name: str, **options: Any) -> sf.Attribution:
    method, more = METHODS[name]
    return sf.explain(model, x, **{"target": 1, "method": method} | more | options)


def caught(call: Callable[[], object], *words: str) -> ModelError:
    with pytest.raises(ModelError) as found:
        call()
    for word in words:
        assert word in str(found.value), f"{word!r} is not in {str(found.value)!r}"
    return found.value


@every_method
@pytest.mark.parametrize("raised", RAISED)
def test_what_a_model_raises(name: str, raised: str) -> None:
    def after(y: Tensor) -> Tensor:
        RAISED[raised]()
        return y

    model, x = Net(after), image()
    with unchanged(model, x):
        error = caught(lambda: explained(model, x, name), raised, "the model")
    assert isinstance(error, ModelCallError)
    assert type(error.__cause__).__name__ == raised
    if raised == "OwnError":
        assert isinstance(error, OwnError)
        assert error.code == 7
    else:
        assert type(error) is ModelCallError
        assert "the model itself fails on these inputs" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KeyError("weights")


@pytest.mark.parametrize(
    "name", [n for n in METHODS if n not in ("occlusion", "kernel_shap", "score_cam", "lrp")]
)
@pytest.mark.parametrize("lean", [True, False])
def test_what_a_backward_pass_raises(name: str, lean: bool) -> None:
    model = Net(_FailsBackward.apply)
    error = caught(lambda: explained(model, image(), name, lean=lean), "backward pass", "KeyError")
    assert isinstance(error.__cause__, KeyError)


@every_method
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes(name: str, error: type[BaseException]) -> None:
    def after(y: Tensor) -> Tensor:
        raise error

    model = Net(after)
    with unchanged(model), pytest.raises(error):
        explained(model, image(), name)


@pytest.mark.parametrize("begin", ["call", "plan", "stream", "submit", "explain_many"])
def test_every_way_in(begin: str) -> None:
    engine, x = sf.Engine(nn.Linear(4, 2).double(), sf.Gradient()), torch.randn(3, 4)
    calls: dict[str, Callable[[], object]] = {
        "call": lambda: engine(x, 1),
        "plan": lambda: engine.plan(x, 1),
        "stream": lambda: list(engine.stream(x, 1)),
        "submit": lambda: engine.submit(x, 1).result(),
        "explain_many": lambda: engine.explain_many([{"inputs": x, "target": 1}]),
    }
    with engine:
        caught(
            calls[begin], "input is float32 and the model's weights are float64", "torch.float64"
        )


@pytest.mark.parametrize("raised", [IndexError, KeyError, ValueError, OwnError])
def test_the_captum_facade_keeps_the_class(raised: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        raise raised(3, "three")

    for method in (captum.Saliency, captum.IntegratedGradients, captum.GuidedBackprop):
        if method is captum.GuidedBackprop:
            explainer: Any = method(Net(forward))
        else:
            explainer = method(forward)
        with pytest.raises(raised) as caught:
            explainer.attribute(image(), target=1)
        assert isinstance(caught.value, ModelError)
        assert raised.__name__ in str(caught.value)


def fixed(x: Tensor) -> Tensor:
    return (x.reshape(6, 4) * torch.ones(6, 4)).sum(1)


def single(x: Tensor) -> Tensor:
    assert len(x) == 1, "one at a time"
    return x.sum(1)


CURES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no batch axis": (Net(), image()[0], {}, "with x[None] it works"),
    "channels last": (Net(), image().movedim(1, -1), {}, "x.movedim(-1, 1)"),
    "wrong channels": (Net(), torch.randn(2, 5, 9, 9), {}, "expected input|[2, 5, 9, 9]"),
    "float64": (
        nn.Linear(4, 2),
        torch.randn(2, 4).double(),
        {},
        "float64|x.float()|model.double()",
    ),
    "bfloat16": (nn.Linear(4, 2).bfloat16(), torch.randn(2, 4), {}, "x.to(torch.bfloat16)"),
    "another device": (nn.Linear(4, 2, device="meta"), torch.randn(2, 4), {}, "x.to('meta')"),
    "an argument too many": (
        nn.Linear(4, 2),
        torch.randn(2, 4),
        {"forward_args": (3,)},
        "forward_args|model(float32 [2, 4], int)",
    ),
    "an input missing": (nn.Bilinear(4, 4, 2), torch.randn(2, 4), {}, "as a tuple|forward_args"),
    "a fixed number of rows": (
        fixed,
        torch.randn(6, 4),
        {"target": None},
        "6 rows|x[None]|forward_args",
    ),
    "domain": (
        lambda x: torch.linalg.cholesky(torch.diag_embed(x)).sum((1, 2)),
        torch.rand(2, 3) + 1,
        {"target": None, "method": sf.IntegratedGradients(steps=4, rule="left")},
        "points that the method makes|baseline",
    ),
}


@pytest.mark.parametrize("case", CURES)
def test_the_cure(case: str) -> None:
    model, x, options, words = CURES[case]
    caught(lambda: sf.explain(model, x, **{"target": 1} | options), *words.split("|"))


def overwrites(y: Tensor) -> Tensor:
    y = y.sigmoid()
    y[:, 1:] = y[:, 1:] * 2 - 0.5
    return y


def out_of_place(y: Tensor) -> Tensor:
    y = y.sigmoid()
    return torch.cat([y[:, :1], y[:, 1:] * 2 - 0.5], 1)


OVERWRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "part": (overwrites, out_of_place),
    "whole": (lambda y: y.exp().add_(1.0), lambda y: y.exp() + 1.0),
    "what a product keeps": (lambda y: y.sin() * _doubled(y), lambda y: y.sin() * y),
    "by a mask": (
        lambda y: y.tanh().masked_fill_(y.detach() > 0, 0.5),
        lambda y: y.tanh().masked_fill(y.detach() > 0, 0.5),
    ),
}


def _doubled(y: Tensor) -> Tensor:
    part = y.clone()
    square = part * part
    part.mul_(3.0)
    return (square + part) / (y + 3.0)


@every_method
@pytest.mark.parametrize("kind", OVERWRITES)
@pytest.mark.parametrize("lean", [True, False])
def test_models_that_overwrite_what_autograd_needs(name: str, kind: str, lean: bool) -> None:
    if name in ("deeplift", "lrp"):
        pytest.skip("their rules are about single calls, and differ between the two models")
    apart, whole = OVERWRITES[kind]
    x = image().double()
    found = explained(Net(apart).double(), x, name, lean=lean, **_baseline(name))
    expected = explained(Net(whole).double(), x, name, lean=lean, **_baseline(name))
    assert torch.allclose(found.values, expected.values, 1e-9, 1e-10)


def _baseline(name: str) -> dict[str, Any]:
    return {"baseline": image(2).double()} if "baseline" in METHODS[name][1] else {}


@pytest.mark.parametrize("squeeze", [Tensor.squeeze, lambda y: y[:, :1].squeeze()])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", [*METHODS])
def test_outputs_that_lose_the_batch_axis(name: str, batch: int, squeeze: Any) -> None:
    number = squeeze(torch.zeros(3, 5)).dim() == 1
    target = None if number else 1
    found = explained(Net(squeeze), image(batch), name, target=target)
    whole = Net(lambda y: y[:, 0]) if number else Net()
    expected = explained(whole, image(batch), name, target=target)
    assert torch.allclose(found.values, expected.values, 1e-5, 1e-6)


def test_a_mean_over_the_batch_is_no_lost_axis() -> None:
    caught(lambda: sf.explain(Net(Tensor.mean), image(1)), "one row per", "got []")
    caught(
        lambda: sf.explain(Net(lambda y: y.mean(0)), image(1), target=1), "one row per", "got [5]"
    )


LABELS = torch.tensor([0, 3, 1])
ONE_HOT = functional.one_hot(LABELS, 5).float()
HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": lambda y: y.gather(1, LABELS[:, None])[:, 0],
    "one hot": lambda y: (y * ONE_HOT).sum(1),
    "cross entropy": lambda y: functional.cross_entropy(y, LABELS, reduction="none"),
    "the first of them": lambda y: y[torch.arange(len(y)), LABELS[: len(y)]],
    "in turn": lambda y: y[torch.arange(len(y)), LABELS[torch.arange(len(y)) % 3]],
}


@every_method
@pytest.mark.parametrize("held", HELD)
def test_targets_that_hold_the_batch_are_refused(name: str, held: str) -> None:
    with pytest.raises((InputError, ModelError), match=r"lambda outputs, example"):
        explained(Net(), image(), name, target=HELD[held])


@pytest.mark.parametrize(
    "target",
    [
        lambda outputs, example: outputs.gather(1, LABELS[example][:, None])[:, 0],
        lambda y, *, example: y[torch.arange(len(y)), LABELS[example]],
        lambda y, example=None, scale=1.0: y[torch.arange(len(y)), LABELS[example]] * scale,
    ],
)
@every_method
def test_targets_that_take_the_examples(name: str, target: Any) -> None:
    found = explained(Net(), image(), name, target=target, points_per_launch=2)
    expected = explained(Net(), image(), name, target=LABELS, points_per_launch=2)
    assert torch.allclose(found.values, expected.values, 1e-5, 1e-6)


def test_targets_of_shared_tensors_are_no_labels() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    x, model = torch.randn(3, 4), nn.Linear(4, 3)
    found = sf.explain(model, x, target=lambda y: (y * weights).sum(1))
    parts = [sf.explain(model, x, target=c).values * weights[c] for c in range(3)]
    assert torch.allclose(found.values, torch.stack(parts).sum(0), 1e-5, 1e-6)


def test_masks_of_the_batch_inside_a_model() -> None:
    mask, net, x = torch.ones(3, 4), nn.Linear(4, 2), torch.randn(3, 4)
    caught(lambda: sf.explain(lambda x: net(x * mask), x, target=1), "forward_args")
    caught(
        lambda: sf.explain(lambda x: net(torch.cat([x, mask], 1)[:, :4]), x, target=1),
        "forward_args",
    )


def test_quantised_layers_are_named() -> None:
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear})
    caught(lambda: sf.explain(net, torch.randn(2, 4), target=1), "quantised layers", "sf.Occlusion")
