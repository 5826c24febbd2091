"""One call in the place of several, by switches: the same scores and input gradients."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from benchmarks.models import Attention
from saliency_fast import _torch_compat as compat
from saliency_fast.engine import config
from saliency_fast.graph.passes.fusion import OneCall, fused
from saliency_fast.graph.passes.half import in_half_type
from saliency_fast.graph.passes.invariant import with_invariants
from saliency_fast.graph.passes.scores_only import scoring
from saliency_fast.graph.program import Program
from tests.model.recording import record
from tests.models import randn
from tests.traces import one_thread

RELU, RESIDUAL, NORM = OneCall(relu=True), OneCall(residual_relu=True), OneCall(layer_norm=True)
BOTH = OneCall(relu=True, residual_relu=True)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


class Bottleneck(nn.Module):
    """A residual block; `turned` adds in the other order, out of place."""

    def __init__(
        self, conv: Any, norm: Any, wide: int, out: int, *, stride: int = 1, turned: bool = False,
        groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.first, self.last = conv(wide, 8, 1, bias=False), conv(8, out, 1, bias=False)
        self.middle = conv(8, 8, 3, stride, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList([norm(8), norm(8), norm(out)])
        same = stride == 1 and wide == out
        self.skip = None if same else nn.Sequential(conv(wide, out, 1, stride), norm(out))
        self.relu, self.turned = nn.ReLU(inplace=not turned), turned

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norms[0](self.first(x)))
        y = self.norms[2](self.last(self.relu(self.norms[1](self.middle(y)))))
        skipped = x if self.skip is None else self.skip(x)
        if self.turned:
            return self.relu(skipped + y)
        y += skipped
        return self.relu(y)


def residual(axes: int, **options: Any) -> nn.Module:
    """Like a ResNet of images or volumes."""
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d)
    blocks = [
        Bottleneck(conv, norm, 8, 16, stride=2, **options),
        Bottleneck(conv, norm, 16, 16, **options),
    ]
    stem = [conv(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU(inplace=True)]
    pool = (nn.AdaptiveAvgPool2d if axes == 2 else nn.AdaptiveAvgPool3d)(1)
    return nn.Sequential(*stem, *blocks, pool, nn.Flatten(), nn.Linear(16, 3))


def plain() -> nn.Module:
    """Biases, strides, dilation and an even padding by name, without normalisation."""
    layers = [nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 2)), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, dilation=2, padding="same"), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), *head(4))


def head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)


class Transformer(nn.Module):
    """Blocks with their normalisations before (a vision transformer's) or behind sums."""

    def __init__(self, *, before: bool, affine: bool = True) -> None:
        super().__init__()
        self.before, self.patches = before, nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.ModuleList(Attention(16, 2) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(16, elementwise_affine=affine) for _ in range(5))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, norms = self.patches(x).flatten(2).mT, iter(self.norms)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            for part in (attention, mlp):
                norm = next(norms)
                x = x + part(norm(x)) if self.before else norm(part(x) + x)
        found: Tensor = self.head(next(norms)(x)[:, 0])
        return found


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], OneCall, int]] = {
    "images": (lambda: residual(2), (3, 12, 11), BOTH, 7),
    "images, ReLU alone": (lambda: residual(2), (3, 12, 11), RELU, 5),
    "images, residual alone": (lambda: residual(2), (3, 12, 11), RESIDUAL, 2),
    "added the other way": (lambda: residual(2, turned=True), (3, 12, 11), BOTH, 7),
    "groups are left": (lambda: residual(2, groups=2), (3, 12, 11), BOTH, 5),
    "volumes": (lambda: residual(3), (3, 7, 6, 5), BOTH, 7),
    "without norms": (plain, (3, 9, 10), BOTH, 3),
    "norms before": (lambda: Transformer(before=True), (3, 8, 12), NORM, 4),
    "norms behind": (lambda: Transformer(before=False), (3, 8, 12), NORM, 4),
    "norms without weights": (lambda: Transformer(before=True, affine=False), (3, 8, 8), NORM, 4),
}
"""For each net its sizes, the switches, and how many calls stand for several."""


def net(name: str) -> tuple[nn.Module, Tensor, OneCall, int]:
    make, shape, one_call, count = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    for one in model.modules():
        if isinstance(one, (nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)):
            for key, value in one.state_dict().items():
                if value.is_floating_point():
                    middle = 0.0 if key in ("bias", "running_mean") else 1.0
                    value.uniform_(middle - 0.5, middle + 0.5)
    return model, randn(2, *shape, seed=1).float(), one_call, count


def answers(run: Callable[[list[Tensor]], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and input gradients of all classes, each by other weights."""
    x = x.detach().requires_grad_()
    scores = run([x.clone()]).double()
    weights = torch.arange(1, scores.numel() + 1, dtype=torch.float64).view_as(scores).sin()
    (grads,) = torch.autograd.grad((scores * weights).sum(), x)
    return scores.detach(), grads.double()


def gap(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def fused_calls(program: Program) -> int:
    """Calls that stand for several, also with weights that are folded in every launch."""
    names = Counter(step.name for step in program.steps)
    names.update(
        step.args[3].__name__ for step in program.steps if step.name == "folded_convolution"
    )
    return names["convolution_relu"] + names["add_layer_norm"]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("last", [False, True])
def test_in_float64_to_rounding(name: str, last: bool) -> None:
    model, x, one_call, count = net(name)
    model, x = model.double(), x.double()
    expected = answers(lambda points: model(*points), x)
    program = fused(record(model, x), one_call)
    program = program.with_channels_last() if last else program
    assert fused_calls(program) == count
    once = with_invariants(program, {}).program
    assert fused_calls(once) == count
    for run in (program, once, program.in_segments(3)):
        found = answers(lambda points, run=run: run(points, ()), x)
        assert all(one < 1e-13 for one in map(gap, found, expected))
    with torch.no_grad():
        # Without gradients nothing is packed.
        assert gap(program([x.clone()], ()), expected[0]) < 1e-13
        assert gap(scoring(program)([x.clone()], ()), expected[0]) < 1e-13


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_in_half_types_within_their_own_error(name: str, half: torch.dtype) -> None:
    model, x, one_call, count = net(name)
    exact = copy.deepcopy(model).double()
    expected = answers(lambda points: exact(*points), x.double())
    program, errors = record(model, x), []
    for switches in (OneCall(), one_call):
        run = in_half_type(fused(program, switches), half).program
        assert fused_calls(run) == count * (switches is one_call)
        found = answers(lambda points, run=run: run(points, ()), x)
        errors.append([gap(one, other) for one, other in zip(found, expected, strict=True)])
    # Fewer roundings, in another place: a sign at 0 may differ.
    for off, on in zip(*errors, strict=True):
        assert on <= 2 * off + torch.finfo(half).eps


def test_layer_norms_round_for_products_alone() -> None:
    model, x, one_call, _ = net("norms before")
    run = in_half_type(fused(record(model, x), one_call), torch.bfloat16).program
    kinds = [step.args[-1] for step in run.steps if step.name == "add_layer_norm"]
    # The last one is indexed before its product.
    assert kinds == [torch.bfloat16] * 3 + [None]


class Left(nn.Module):
    """What no one call serves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(4, 4, 3, padding=1)
        self.even, self.head = nn.Conv2d(4, 4, 2, padding="same"), nn.Linear(4, 3)
        self.line, self.back = nn.Conv1d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1)
        self.norm, self.planes = nn.LayerNorm(4), nn.LayerNorm((5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.kind)(x * 1.5).flatten(2).sum(2))

    def leaky(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.conv(x))

    def bounded(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(self.conv(x))

    def uneven(self, x: Tensor) -> Tensor:
        return self.even(x).relu()

    def transposed(self, x: Tensor) -> Tensor:
        return self.back(x).relu()

    def one_axis(self, x: Tensor) -> Tensor:
        return self.line(x.flatten(2)).relu()

    def used_twice(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.relu() + y

    def its_input(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()

    def overwritten(self, x: Tensor) -> Tensor:
        y, z = self.conv(x), x * 2
        x += 1.0
        return (y + z).relu() * x

    def planes_of_two(self, x: Tensor) -> Tensor:
        return self.planes((x.sin() + x).mT).mT

    def changed_sum(self, x: Tensor) -> Tensor:
        y = (x.sin() + x).movedim(1, 3)
        y.mul_(2.0)
        return self.norm(y)

    def overwritten_sum(self, x: Tensor) -> Tensor:
        x = x.movedim(1, 3)
        y = x.sin() + x
        z = y * 2
        y.mul_(3.0)
        return self.norm(y) * z

    def a_constant(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, 3) + self.norm.weight)


@pytest.mark.parametrize(
    "kind", [name for name in vars(Left) if name != "forward" and not name.startswith("_")]
)
def test_what_does_not_fit_is_left(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Left(kind).double().eval(), randn(2, 4, 4, 5, seed=1).double()
    whole = record(model, x)
    program, off = fused(whole, OneCall(True, True, True)), fused(whole)
    assert fused_calls(program) == 0
    found = answers(lambda points: program(points, ()), x)
    # Not by autograd, which does not let the input of a convolution be overwritten.
    expected = answers(lambda points: off(points, ()), x)
    assert all(one < 1e-13 for one in map(gap, found, expected))


@pytest.mark.parametrize("name", ["images", "volumes", "norms before"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_maps_with_switches(name: str, precision: str) -> None:
    model, x, one_call, _ = net(name)
    maps, plans = [], []
    method = sf.IntegratedGradients(8)
    for on in (False, True):
        switches = {"fused_relu": one_call.relu and on,
                    "fused_residual_relu": one_call.residual_relu and on,
                    "fused_layer_norm": one_call.layer_norm and on}  # fmt: skip
        own = replace(config.DEFAULT, lean_from=0, direct_points=0, **switches)
        engine = sf.Engine(model, method, precision=precision, config=own)
        maps.append(engine(x, 1).values.double())
        plans.append(engine.plan(x, 1).lean)
    assert gap(maps[1], maps[0]) < (1e-5 if precision == "float32" else 0.02)
    calls = [int(plan.split(", ")[1].split(" ")[0]) for plan in plans]
    assert calls[1] < calls[0], plans


def test_switches_are_off() -> None:
    found = config.DEFAULT
    names = [one.name for one in fields(found) if one.name.startswith("fused_")]
    assert len(names) == 3
    assert not any(getattr(found, name) for name in names)


# cuDNN's calls, by stand-ins with its signatures.


def schema(name: str) -> list[str]:
    """The arguments of a call, as PyTorch has them."""
    (found,) = (one for one in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
                if not one.overload_name)  # fmt: skip
    return [one.name for one in found.arguments]


@pytest.mark.parametrize("last", [False, True])
def test_cudnn_is_called_as_it_is_declared(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def call(name: str) -> Callable[..., Tensor]:
        names = schema(name)

        def run(*args: Any) -> Tensor:
            given = dict(zip(names, args, strict=True))
            called.append(name)
            geometry = [given[one] for one in ("stride", "padding", "dilation", "groups")]
            y = torch.conv2d(given["self"], given["weight"], given["bias"], *geometry)
            return (y + given["alpha"] * given["z"] if "z" in given else y).relu()

        return run

    monkeypatch.setattr(compat, "cudnn_fuses", lambda x: True)
    monkeypatch.setattr(compat, "_cudnn_relu", call("cudnn_convolution_relu"))
    monkeypatch.setattr(compat, "_cudnn_add_relu", call("cudnn_convolution_add_relu"))
    model, x, one_call, _ = net("images")
    model, x = model.double(), x.double()
    program = fused(record(model, x), one_call)
    program = program.with_channels_last() if last else program
    found = answers(lambda points: program(points, ()), x)
    assert Counter(called) == {"cudnn_convolution_relu": 5, "cudnn_convolution_add_relu": 2}
    expected = answers(lambda points: model(*points), x)
    assert all(one < 1e-13 for one in map(gap, found, expected))


def test_where_cudnn_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.float16

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compat.cudnn_fuses(OnGpu())  # type: ignore[arg-type]
    assert not compat.cudnn_fuses(torch.ones(1))
    for target, name, value in (
        (OnGpu, "dtype", torch.float64),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "enabled", False),
        (torch.version, "cuda", None),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            assert not compat.cudnn_fuses(OnGpu())  # type: ignore[arg-type]


def test_nan_passes_and_infinity_counts() -> None:
    conv = nn.Conv2d(1, 1, 1).double()
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten()).eval()
    x = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0]).double().view(1, 1, 2, 3)
    program = fused(record(model, torch.cat([x, x])), BOTH)
    assert fused_calls(program) == 1
    points = x.clone().requires_grad_()
    found = program([points.clone()], ())
    (grads,) = torch.autograd.grad(found[:, [0, 1, 3, 4, 5]].sum(), points)
    assert grads.flatten().tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
