"""Maps do not depend on what surrounds a call: autograd's modes, defaults of the process, hooks,
threads and compilers, or changes of the model under an engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast import evaluate
from tests.traces import one_thread, unchanged


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
            )
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(6 * 16, 5)
            self.body[1].running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).flatten(1)))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "integrated_gradients": {"baseline": "mean"},
    "tolerance": {"method": sf.IntegratedGradients(steps=4, tolerance=0.1)},
    "smoothgrad": {},
    "expected_gradients": {"baseline": ROWS},
    "guided_ig": {},
    "hessian": {"method": sf.IntegratedHessians(steps=2, softplus=2.0), "features": "grid:4"},
    "deeplift": {},
    "lrp": {},
    "occlusion": {"method": sf.Occlusion(4, 4)},
    "kernel_shap": {"features": "grid:4"},
    "grad_cam": {"at": "body.2"},
    "score_cam": {"at": "body.2"},
    "at a layer": {"method": "integrated_gradients", "at": "body.0"},
}
every_method = pytest.mark.parametrize("name", METHODS)


def explained(model: Any, name: str, **more: Any) -> sf.Attribution:
    options = {"method": name, "target": 1} | METHODS[name] | more
    return sf.explain(model, options.pop("inputs", X), **options)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # Of which PyTorch 2.9 makes a default device that get_default_device() fails on.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def gradients_off() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "gradients off": gradients_off,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float32": lambda: default_dtype(torch.float32),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "another device": lambda: default_device("meta"),
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "within a device": lambda: torch.device("meta"),
}


@every_method
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_surrounds_a_call(name: str, around: str) -> None:
    model = Net().double().eval()
    expected = explained(model, name)
    fresh = Net().double().eval()
    for asked in (model, fresh):
        with SURROUNDINGS[around](), unchanged(asked, X):
            found = explained(asked, name)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
        assert found.values.dtype == torch.float64
        assert found.values.device == X.device


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_surrounds_requests_streams_plans_and_metrics(around: str) -> None:
    model = Net().double().eval()
    whole = explained(model, "integrated_gradients").values
    outcome = evaluate.Deletion(steps=4)(model, X, whole, target=1)
    with SURROUNDINGS[around]():
        with sf.Engine(model, "integrated_gradients") as engine:
            futures = [engine.submit(one, 1, "mean") for one in X.split(1)]
            several = torch.cat([one.result().values for one in futures])
            *_, last = engine.stream(X, 1, "mean")
            assert engine.plan(X, 1, "mean").points == 150
        again = evaluate.Deletion(steps=4)(model, X, whole, target=1)
    torch.testing.assert_close(last.values, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(several, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.values, outcome.values, rtol=1e-9, atol=1e-12)


def made_in_inference_mode() -> Net:
    with torch.inference_mode():
        return Net().double().eval()


def frozen() -> Net:
    return Net().double().eval().requires_grad_(False)


def hooked() -> Net:
    model = Net().double().eval()
    for one in model.modules():
        one.register_forward_hook(lambda m, x, y: None)
        one.register_forward_pre_hook(lambda m, x: None)
    return model


def watched_backward() -> Net:
    model = Net().double().eval()
    model.body[3].register_full_backward_hook(lambda m, a, b: None)
    model.head.register_full_backward_pre_hook(lambda m, a: None)
    return model


def parametrised() -> Net:
    model = Net().double().eval()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    return model


def _around(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)


MODELS: dict[str, Callable[[], Any]] = {
    "training": lambda: Net().double().train(),
    "made in inference mode": made_in_inference_mode,
    "frozen": frozen,
    "hooks": hooked,
    "backward hooks": watched_backward,
    "parametrised": parametrised,
    "copied": lambda: copy.deepcopy(Net().double().eval()),
    "function": lambda: Net().double().eval().forward,
    "lambda": lambda: _around(Net().double().eval()),
}


@every_method
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_model_is(name: str, kind: str) -> None:
    if kind in ("function", "lambda") and METHODS[name].get("at"):
        pytest.skip("layers have names in modules alone")
    if (kind, name) == ("backward hooks", "lrp"):
        pytest.skip("LRP refuses functions with a gradient of their own, as these hooks are")
    expected, model = explained(Net().double().eval(), name), MODELS[kind]()
    for _ in range(2):
        found = explained(model, name)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen script"])
def test_scripts(kind: str) -> None:
    model = Net().double().eval()
    makes: dict[str, Callable[[], Any]] = {
        "scripted": lambda: torch.jit.script(model),
        "traced": lambda: torch.jit.trace(model, X),
        "frozen script": lambda: torch.jit.freeze(torch.jit.script(model)),
    }
    script = makes[kind]()
    for name in ("gradient", "integrated_gradients", "smoothgrad", "occlusion"):
        expected = explained(model, name).values
        torch.testing.assert_close(explained(script, name).values, expected, rtol=1e-9, atol=1e-12)


@every_method
def test_eight_threads(name: str) -> None:
    model = Net().double().train()
    expected = [explained(model, name, target=k).values for k in range(5)]
    with ThreadPoolExecutor(8) as pool, unchanged(model):
        found = list(pool.map(lambda n: explained(model, name, target=n % 5).values, range(16)))
    for n, one in enumerate(found):
        torch.testing.assert_close(one, expected[n % 5], rtol=1e-9, atol=1e-12)


def loaded(model: Net) -> None:
    model.load_state_dict({n: one * 1.5 for n, one in model.state_dict().items()})


def written(model: Net) -> None:
    with torch.no_grad():
        model.head.weight.mul_(0.5)
        model.body[1].running_mean.add_(1.0)


def replaced(model: Net) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model.body[0] = nn.Conv2d(3, 6, 3, padding=1).double()


def reassigned(model: Net) -> None:
    model.head.bias = nn.Parameter(model.head.bias.detach() + 2)


CHANGES: dict[str, Callable[[Net], object]] = {
    "load_state_dict": loaded,
    "in place": written,
    "data": lambda m: setattr(m.head.weight, "data", m.head.weight.data * 2),
    "module replaced": replaced,
    "parameter replaced": reassigned,
    "rectifier": lambda m: m.body.__setitem__(2, nn.GELU()),
    "parametrised": lambda m: torch.nn.utils.parametrizations.weight_norm(m.head),
    "attribute": lambda m: setattr(m.body[1], "eps", 0.5),
    "frozen": lambda m: m.requires_grad_(False),
    "inference mode": lambda m: setattr(m, "head", made_in_inference_mode().head),
}


@pytest.mark.parametrize(
    "name", ["gradient", "integrated_gradients", "occlusion", "grad_cam", "lrp"]
)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_under_an_engine(name: str, change: str) -> None:
    options = {"method": name} | METHODS[name]
    baseline = options.pop("baseline", None)
    model = Net().double().eval()
    engine = sf.Engine(model, **options)
    engine(X, 1, baseline)
    CHANGES[change](model)
    fresh = Net().double().eval()
    CHANGES[change](fresh)
    found = engine(X, 1, baseline)
    expected = explained(fresh, name)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-12)
    assert found.provenance.weights_sha256 == expected.provenance.weights_sha256


def test_another_dtype_under_an_engine() -> None:
    model = Net().eval()
    engine = sf.Engine(model, "integrated_gradients")
    engine(X.float(), 1)
    model.double()
    expected = sf.explain(Net().eval().double(), X, target=1).values
    torch.testing.assert_close(engine(X, 1).values, expected, rtol=1e-9, atol=1e-12)


def test_inside_of_vmap() -> None:
    model = Net().double().eval()
    expected = explained(model, "gradient").values
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(explained(model, "gradient").values)
        return x * 2

    torch.func.vmap(inner)(torch.ones(3))
    torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=1e-12)


def test_surroundings_are_seen() -> None:
    """The helper is tested: a default device does reach what a call makes without naming one."""
    with default_device("meta"):
        assert torch.zeros(()).is_meta
    with nullcontext():
        assert not torch.zeros(()).is_meta
