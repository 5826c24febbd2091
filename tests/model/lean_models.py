"""Models that memory-efficient executors could get wrong, each with the way that serves it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.models import randn

WAYS = ("program", "watched", "off")


@dataclass(frozen=True)
class Case:
    """A model of points `inputs`, [3, *] each, and the way that serves it, one of WAYS.

    args, kwargs: its further arguments. launch: points per launch. target: of [3, *] outputs.
    """

    make: Callable[[], Any]
    way: str = "program"
    inputs: tuple[Tensor, ...] = (randn(3, 2, 6, 6, seed=3),)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Any = 1
    launch: int = 4


class Net(nn.Module):
    """`body(self, *inputs)`, pooled to [R, *] and mixed; layers of many kinds at hand."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.body = body

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor:
        y = self.body(self, *inputs, **named)
        return self.head(y.flatten(2).mean(2).tanh())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A float64 model in evaluation mode whose weights and statistics are not the trivial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = make().double().eval()
        for name, one in [*model.named_parameters(), *model.named_buffers()]:
            if one.is_floating_point() and not name.endswith(("_u", "_v")):
                one.data.uniform_(0.3, 2.0) if name.endswith("var") else one.data.normal_(0, 0.7)
    return model


CASES: dict[str, Case] = {}


def case(name: str, way: str = "program", **options: Any) -> Callable[[Any], Any]:
    """Enters the decorated body of a Net."""

    def enter(body: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name] = Case(lambda: seeded(lambda: Net(body)), way, **options)
        return body

    return enter


# In place, twice, and through views.
case("plain")(lambda m, x: m.relu(m.norm(m.first(x))))
case("input overwritten")(lambda m, x: m.first(x.mul_(2.0)))
case("input's slice overwritten")(
    lambda m, x: (x.__setitem__((slice(None), 0), 0.0), m.first(x))[1]
)
case("relu of the input in place")(lambda m, x: m.first(m.relu(x)) + m.first(x))
case("tensor used twice")(lambda m, x: (lambda y: y * y.sigmoid() + y)(m.first(x)))
case("shared module")(lambda m, x: m.second(m.relu(m.second(m.relu(m.norm(m.first(x)))))))
case("masked in place")(lambda m, x: (lambda y: y.masked_fill_(y > 0.5, 0.1) * y)(m.first(x) + 0))
case("returns its input", target=(0, 2, 3))(lambda m, x: x)
CASES["returns its input"] = Case(nn.Identity, target=(0, 2, 3))
CASES["plain function"] = Case(lambda: lambda x: (x.sin() * x.flip(1)).flatten(1))


@case("residual in place")
def _(m: Net, x: Tensor) -> Tensor:
    y = m.norm(m.first(x))
    kept = y
    y = m.second(m.relu(y))
    y += kept
    return m.relu(y)


@case("views overwritten")
def _(m: Net, x: Tensor) -> Tensor:
    y = m.first(x)
    y[:, 0].add_(1.0)
    y.flatten(2)[:, :, 3].mul_(0.2)
    y[y > 1] = 1.0
    y[:, 1:3].relu_()
    left, right = y.chunk(2, 1)
    return torch.cat([right, left * y[:, :2]], 1)


@case("buffer filled")
def _(m: Net, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 4, 6, 6, dtype=x.dtype)
    out[:, :2] = x.sin()
    out[:, 2:].copy_(x.exp())
    return out * m.first(x)


@case("views of views")
def _(m: Net, x: Tensor) -> Tensor:
    y = m.first(x).unfold(2, 2, 2).transpose(2, 3).reshape(len(x), 4, -1)
    return y.as_strided((len(x), 4, 5), (y.stride(0), y.stride(1), 2), 1)


# Stop-gradients.
case("detach")(lambda m, x: m.first(x) * m.first(x).detach().relu())
case("data")(lambda m, x: m.first(x) * m.second(m.first(x)).data)
case("norm of a detached")(lambda m, x: m.relu(m.norm(m.first(x.detach())) + m.first(x)))


@case("no_grad")
def _(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = m.relu(m.norm(m.first(x)))
    return m.first(x) * weight


@case("inference mode", "watched")
def _(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        weight = m.first(x).mean((2, 3), keepdim=True)
        weight = weight.relu() + 1
    return m.first(x) + weight


@case("autocast", "watched")
def _(m: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.relu(m.norm(m.first(x)))


# Control flow and numbers read out: one row at a time, so that rows cannot take each other's.
@case("branch on a number", "watched", launch=1)
def _(m: Net, x: Tensor) -> Tensor:
    y = m.first(x)
    return y.sin() if x.sum() > 0 else m.second(y)


@case("loop on a number", "watched", launch=1)
def _(m: Net, x: Tensor) -> Tensor:
    y = m.first(x)
    for _ in range(1 + int(y.abs().sum()) % 3):
        y = m.second(y).tanh()
    return y


@case("count of a mask", "watched", launch=1)
def _(m: Net, x: Tensor) -> Tensor:
    return m.first(x) * (x > 0.3).nonzero().shape[0]


@case("selected by a mask", "watched", launch=1)
def _(m: Net, x: Tensor) -> Tensor:
    chosen = x[x > 0.3]
    return m.first(x) + chosen.sum() / (1 + len(chosen))


@case("unique numbers", "watched", launch=1)
def _(m: Net, x: Tensor) -> Tensor:
    return m.first(x) * x.round().unique().numel()


@case("numpy", "watched")
def _(m: Net, x: Tensor) -> Tensor:
    return m.first(x) * torch.from_numpy(x.detach().numpy().clip(-1, 1)[:, :1])


case("item", "watched", launch=1)(lambda m, x: m.first(x) * x.max().item())
case("where")(lambda m, x: torch.where(x > 0, x.sin(), -x).repeat(1, 2, 1, 1) * m.first(x))
case("iterated")(lambda m, x: (lambda a, b: torch.stack([a, b, a * b, a], 1))(*x.transpose(0, 1)))
case("rows iterated", "watched")(lambda m, x: torch.stack([m.first(one) for one in x]))
case("top k")(lambda m, x: m.first(x).flatten(2).topk(5).values)
case("sorted")(lambda m, x: m.first(x).flatten(2).sort(2).values * torch.arange(36))


# Numbers of rows.
case("rows' own size")(
    lambda m, x: m.first(x).view(len(x), 4, -1).reshape(x.shape[0] * 4, -1).view(len(x), 4, -1)
)
case("one row is special", "watched")(
    lambda m, x: m.first(x) if len(x) > 1 else m.first(x[0])[None]
)
case("in pairs of rows", "watched")(
    lambda m, x: torch.cat([m.relu(m.first(one)) for one in x.split(2)])
)
case("in fixed parts", "watched")(lambda m, x: torch.cat([m.first(x[:2]), m.first(x[2:])]))
case("by rows' share", "watched")(
    lambda m, x: m.first(x) * (len(x) / x.shape[0]) / (1 / len(x)) / len(x)
)


@case("tokens")
def _(m: Net, x: Tensor) -> Tensor:
    extra = m.table.weight[:2].expand(len(x), -1, -1)
    y = torch.cat([extra, m.first(x).flatten(2).mT], 1)
    return F.scaled_dot_product_attention(y, y, y).mT


# What runs outside of PyTorch's own calls, and gradients inside.
class Straight(torch.autograd.Function):
    """Rounds, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mul(4).round().div(4)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 1.5


class Doubled(torch.autograd.Function):
    """In place, and with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 3


case("custom function", "watched")(lambda m, x: m.first(Straight.apply(m.norm(m.first(x))[:, :2])))
case("small custom function", "watched")(
    lambda m, x: m.first(x) + 1e-9 * Straight.apply(m.first(x).sin())
)
case("custom function in place", "watched")(lambda m, x: Doubled.apply(m.first(x)).sin())


@case("backward hook", "watched")
def _(m: Net, x: Tensor) -> Tensor:
    y = m.first(x)
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 2)
    return y.sin()


case("checkpoint")(
    lambda m, x: checkpoint(lambda y: m.norm(m.first(y)).relu(), x, use_reentrant=False)
)
case("vmap", "off")(lambda m, x: torch.vmap(lambda one: m.first(one[None])[0].relu())(x))
case("vmap of sines", "watched")(lambda m, x: torch.vmap(torch.sin)(m.first(x)))
case("func.grad", "off")(
    lambda m, x: m.first(torch.func.grad(lambda y: m.first(y).sin().sum())(x) + x)
)
case("sparse", "watched")(
    lambda m, x: m.first(x) * x[0, 0].detach().to_sparse().to_dense().shape[0]
)


@case("gradient inside", "off")
def _(m: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (inner,) = torch.autograd.grad(m.first(y).sin().sum(), y, create_graph=True)
    return m.first(inner * x)


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__(lambda m, x: m.norm(m.first(x)))
        self.norm.register_full_backward_hook(lambda _, grads, __: (grads[0] * 2,))


class Drawing(Net):
    """Takes numbers from Python's own generator, the same in every call."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.first(x) * random.Random(3).random())


CASES |= {
    "full backward hook": Case(lambda: seeded(Hooked), "watched"),
    "Python's generator": Case(lambda: seeded(Drawing)),
}


# Complex numbers.
case("fft")(lambda m, x: torch.fft.ifft2(torch.fft.fft2(m.first(x)) * (1 + 2j)).abs())
case("rfft")(lambda m, x: torch.fft.rfft(m.first(x)).conj().real)
case("complex convolution")(
    lambda m, x: torch.view_as_real(m.first(x) + 1j * m.first(x).relu()).sum(-1)
)
