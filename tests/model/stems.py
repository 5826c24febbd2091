"""Models whose first calls are affine, or look it: what the prefix must take once, and what not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.models import randn

Shape = tuple[int, ...]
CLASSES = 4


class Net(nn.Module):
    """`stem(self, *inputs)`, then GELU and a linear layer to 4 classes; `parts` are its layers and
    buffers, float64, seeded, in evaluation mode.
    """

    def __init__(self, stem: Callable[..., Tensor], *shapes: Shape, **parts: Any) -> None:
        super().__init__()
        self.stem = stem
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)
        self.double().eval()
        with torch.no_grad():
            width = stem(self, *[torch.zeros(1, *one, dtype=torch.float64) for one in shapes])
        self.head = nn.Linear(width[0].numel(), CLASSES).double()

    def forward(self, *inputs: Tensor) -> Tensor:
        found = functional.gelu(self.stem(self, *inputs))
        return self.head(found.reshape(len(found), -1))


class Linear(Net):
    """Wholly linear."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.stem(self, *inputs).flatten(1))


@dataclass(frozen=True)
class Stem:
    """hoisted: the calls that are taken once, () where there are none, None where either is right.

    shapes: of an example's inputs; further: of its further arguments. smooth: without kinks.
    """

    make: Callable[[], Net]
    shapes: tuple[Shape, ...]
    hoisted: tuple[str, ...] | None
    further: tuple[Shape, ...] = ()
    smooth: bool = True

    def model(self, seed: int = 0) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = self.make()
            for module in net.modules():
                if hasattr(module, "running_var"):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
        return net

    def inputs(self, batch: int = 3, seed: int = 0) -> Tensor | tuple[Tensor, ...]:
        found = tuple(randn(batch, *one, seed=seed + 7 * i) for i, one in enumerate(self.shapes))
        return found if len(found) > 1 else found[0]

    def arguments(self, batch: int = 3) -> tuple[Tensor, ...]:
        return tuple(randn(batch, *one, seed=50 + i) for i, one in enumerate(self.further))


STEMS: dict[str, Stem] = {}
IMAGE, VOLUME, SOUND, TABLE = (3, 6, 6), (1, 5, 6, 5), (2, 16), (7,)


def stem(
    name: str,
    hoisted: tuple[str, ...] | None,
    function: Callable[..., Tensor],
    *shapes: Shape,
    further: tuple[Shape, ...] = (),
    smooth: bool = True,
    net: type[Net] = Net,
    **parts: Callable[[], Any],
) -> None:
    shapes = shapes or (IMAGE,)

    def make() -> Net:
        made = {key: part() for key, part in parts.items()}
        return net(function, *shapes, *further, **made)

    STEMS[name] = Stem(make, shapes, hoisted, further, smooth)


def conv(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


def buffer(*shape: int, seed: int = 30) -> Callable[[], Tensor]:
    return lambda: randn(*shape, seed=seed)


def relu(x: Tensor) -> Tensor:
    return functional.relu(x, inplace=True)


CONV = conv(3, 4, 3, padding=1)
TWO = {"a": CONV, "b": CONV}

# Convolutions and what stands around them.
stem("conv", ("conv2d",), lambda m, x: m.a(x), a=conv(3, 5, 3, stride=2, padding=1))
stem("conv without bias", ("conv2d",), lambda m, x: m.a(x), a=conv(3, 6, 3, groups=3, bias=False))
stem(
    "conv, norm, relu",
    ("conv2d", "batch_norm"),
    lambda m, x: relu(m.norm(m.a(x))),
    smooth=False,
    a=CONV,
    norm=lambda: nn.BatchNorm2d(4),
)
stem("volume", ("conv3d",), lambda m, x: m.a(x), VOLUME, a=lambda: nn.Conv3d(1, 3, 3, padding=1))
stem("sound", ("conv1d",), lambda m, x: m.a(x), SOUND, a=lambda: nn.Conv1d(2, 4, 5, stride=2))
stem(
    "transposed", ("conv_transpose2d",), lambda m, x: m.a(x), a=lambda: nn.ConvTranspose2d(3, 2, 3)
)
stem(
    "pad, conv",
    ("pad", "conv2d"),
    lambda m, x: m.a(
        functional.pad(functional.pad(x, (1, 2, 0, 1), value=0.5), [1] * 4, "reflect")
    ),
    a=conv(3, 4, 3),
)
stem("average pool", ("avg_pool2d",), lambda m, x: functional.avg_pool2d(x, 2))
stem(
    "upsampling, conv",
    ("upsample_bilinear2d", "conv2d"),
    lambda m, x: m.a(functional.interpolate(x, scale_factor=2.0, mode="bilinear")),
    a=CONV,
)
stem("overwritten place", ("conv2d",), lambda m, x: functional.silu(m.a(x), True), a=CONV)
stem("overwritten view", ("flatten",), lambda m, x: functional.silu(x.flatten(1), True))

# Normalisation inside the model.
STATISTICS = {"mean": buffer(3, 1, 1), "std": lambda: randn(3, 1, 1).abs() + 0.5}
stem(
    "normalised",
    ("sub", "div", "conv2d"),
    lambda m, x: m.a((x - m.mean) / m.std),
    a=CONV,
    **STATISTICS,
)
stem(
    "normalised in place",
    ("sub_", "div_", "conv2d"),
    lambda m, x: m.a(x.sub_(m.mean).div_(m.std)),
    a=CONV,
    **STATISTICS,
)
stem(
    "table in place",
    ("mul_", "add_", "linear"),
    lambda m, x: m.a(x.mul_(2.0).add_(0.5)),
    TABLE,
    a=lambda: nn.Linear(7, 9),
)
stem(
    "centred by itself",
    ("mean", "sub", "conv2d"),
    lambda m, x: m.a(x - x.mean((1, 2, 3), keepdim=True)),
    a=CONV,
)
stem(
    "scaled by itself",
    (),
    lambda m, x: m.a(x / (1.0 + x.abs().mean((1, 2, 3), keepdim=True))),
    a=CONV,
)


# Tokens.
def patches(m: Net, x: Tensor) -> Tensor:
    tokens = m.a(x).flatten(2).transpose(1, 2)
    return m.norm(torch.cat([m.token.expand(len(x), -1, -1), tokens], 1) + m.positions)


stem(
    "patches",
    ("conv2d", "flatten", "transpose", "cat", "add"),
    patches,
    a=conv(3, 8, 2, stride=2),
    token=buffer(1, 1, 8),
    positions=buffer(1, 10, 8, seed=31),
    norm=lambda: nn.LayerNorm(8),
)
stem(
    "permuted tokens",
    ("permute", "reshape", "linear"),
    lambda m, x: m.a(x.permute(0, 2, 3, 1).reshape(len(x), 36, 3)),
    a=lambda: nn.Linear(3, 5),
)
stem(
    "flattened", ("flatten", "linear"), lambda m, x: m.a(x.flatten(1)), a=lambda: nn.Linear(108, 9)
)
stem("table", ("linear",), lambda m, x: m.a(x), TABLE, a=lambda: nn.Linear(7, 9))
stem("mixed channels", ("flatten", "matmul"), lambda m, x: m.mix @ x.flatten(2), mix=buffer(5, 3))
stem("one number", ("flatten", "mean"), lambda m, x: x.flatten(1).mean(1))
stem("linear", ("conv2d", "flatten", "linear"), lambda m, x: m.a(x), net=Linear, a=CONV)


# Branches.
def gated(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x), m.b(x)
    return torch.tanh(left) * torch.sigmoid(right)


def frozen_gate(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = m.b(x)
    return m.a(x) * gate


stem("two branches", ("conv2d",), gated, **TWO)
stem("sum of branches", ("conv2d", "add"), lambda m, x: m.a(x) + m.b(x), **TWO)
stem("detached branch", ("conv2d",), lambda m, x: m.a(x) * m.b(x).detach(), **TWO)
stem("branch without gradient", ("conv2d",), frozen_gate, **TWO)
stem("halves", None, lambda m, x: torch.mul(*m.a(x).chunk(2, 1)), a=CONV)
stem("skip", ("conv2d",), lambda m, x: torch.cat([torch.tanh(m.a(x)), x], 1), a=CONV)
stem(
    "image and table",
    ("conv2d",),
    lambda m, x, table: m.a(x).tanh() * table.square().sum(1)[:, None, None, None],
    IMAGE,
    TABLE,
    a=CONV,
)
stem("two images", ("conv2d", "add"), lambda m, x, y: m.a(x) + m.b(y), IMAGE, IMAGE, **TWO)
stem(
    "conditioned",
    ("conv2d", "mul", "add"),
    lambda m, x, scale, shift: m.a(x) * torch.exp(scale) + shift,
    further=((4, 1, 1), (4, 1, 1)),
    a=CONV,
)


# What only looks affine.
def looked_at_and_overwritten(m: Net, x: Tensor) -> Tensor:
    x = x * m.wide
    before = x.view(len(x), -1)
    looked = before.exp()
    x.mul_(2.0)
    return torch.cat([looked, (x * m.wide).flatten(1)], 1)


def train_norm(m: Net, x: Tensor) -> Tensor:
    return m.a(functional.batch_norm(x, None, None, training=True))


def frames(m: Net, x: Tensor) -> Tensor:
    return m.a(x.flatten(0, 1)).reshape(len(x), 4, -1)


stem("clamp", (), lambda m, x: m.a(x.clamp(-0.5, 0.5)), smooth=False, a=CONV)
stem("norm in training", (), train_norm, a=CONV)
stem("dropout in training", (), lambda m, x: functional.dropout(x, 0.0, True), a=CONV)
stem("dropout by keyword", (), lambda m, x: m.a(torch.dropout(x, p=0.0, train=True)), a=CONV)
stem("dropout in place", ("mul",), lambda m, x: functional.dropout(x * 2.0, 0.0, True, True))
stem("inverse", (), lambda m, x: m.one / x.exp(), one=buffer(1))
stem("inverse behind a sum", ("add",), lambda m, x: m.one / (x + 20.0), one=buffer(1))
stem("rounded down", (), lambda m, x: x * torch.div(x, 0.3, rounding_mode="floor"), smooth=False)
stem("square", (), lambda m, x: m.a(x * x), a=CONV)
stem("gram", (), lambda m, x: x.flatten(2) @ x.flatten(2).mT)
stem("frames in the batch", (), frames, (4, 3, 3, 3), a=CONV)
stem("looked at and overwritten", (), looked_at_and_overwritten, wide=buffer(*IMAGE))
stem("conv by keyword", None, lambda m, x: functional.conv2d(input=x, weight=m.a.weight), a=CONV)
stem("entry set", None, lambda m, x: (x.__setitem__((slice(None), 0), 1.0), m.a(x))[1], a=CONV)


# Random stems.

AFFINE: dict[str, Any] = {
    "norm": lambda c, axes, n: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](c),
    "scale": lambda c, axes, n: lambda x: x * (0.5 + n),
    "shift": lambda c, axes, n: lambda x: n - x,
    "divide": lambda c, axes, n: lambda x: x / (1.5 + n),
    "pad": lambda c, axes, n: lambda x: functional.pad(x, (1, 0) * axes, value=0.5),
    "pool": lambda c, axes, n: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1](2, 1, 1),
    "swap": lambda c, axes, n: lambda x: x.transpose(1, 2),
    "turn": lambda c, axes, n: lambda x: x.movedim(1, -1).flip(-1),
    "centre": lambda c, axes, n: lambda x: x - x.mean(-1, keepdim=True),
    "double": lambda c, axes, n: lambda x: torch.cat([x, -2 * x], 1),
    "in place": lambda c, axes, n: lambda x: x.mul_(2.0).add_(n),
    "half": lambda c, axes, n: lambda x: x[:, ::2],
    "line up": lambda c, axes, n: lambda x: x.roll(n, -1).contiguous(),
}
CURVED = {"tanh": torch.tanh, "softplus": functional.softplus, "square": torch.square}


class Chain(nn.Module):
    """Calls one after another, each made for what reaches it."""

    def __init__(self, kinds: list[tuple[str, int]], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.calls, self.layers = [], nn.ModuleList()
        x, axes = torch.zeros(1, *shape).double(), len(shape) - 1
        for kind, n in kinds:
            if kind in CURVED:
                call: Any = CURVED[kind]
            elif kind == "conv":
                make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
                call = make(x.shape[1], n + 1, 1 + n, stride=1 + n // 2, padding=n)
            else:
                call = AFFINE[kind](x.shape[1], axes, n)
            if isinstance(call, nn.Module):
                self.layers.append(call.double().eval())
            self.calls.append(call)
            with torch.no_grad():
                x = call(x.clone())
        self.head = nn.Linear(x.numel(), 3).double()

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return self.head(functional.gelu(x).flatten(1))


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, Tensor, int]:
    """(model, inputs, calls that are affine before the first that is not)."""
    shape = tuple(draw(st.lists(st.integers(3, 5), min_size=2, max_size=4)))
    kinds = draw(st.lists(st.sampled_from(["conv", *AFFINE]), min_size=1, max_size=4))
    affine = len(kinds)
    if draw(st.booleans()):
        affine = draw(st.integers(0, affine))
        # Autograd keeps what a curved call gives: nothing behind it may work in place.
        behind = ["scale" if one == "in place" else one for one in kinds[affine:]]
        kinds = [*kinds[:affine], draw(st.sampled_from(sorted(CURVED))), *behind]
    numbers, seed = [draw(st.integers(0, 2)) for _ in kinds], draw(st.integers(0, 99))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chain = Chain(list(zip(kinds, numbers, strict=True)), shape)
    return chain, randn(draw(st.integers(1, 3)), *shape, seed=seed), affine
