"""Relevance propagation where inputs and outputs of layers may be negative: residual networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.rules.lrp_operators import COMPOSITES
from tests.naive import relative_l2

SUMMED = ("epsilon", "z_plus", "epsilon_plus", "epsilon_plus_flat", "epsilon_gamma")
BOXED = "epsilon_gamma_box"
CONSERVING = (*SUMMED, BOXED, "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat")


class Sum(nn.Module):
    def forward(self, parts: Tensor) -> Tensor:
        return parts.sum(-1)


class Residual(nn.Module):
    """A block of a ResNet, its sum in a module that another library's rules can be set on."""

    def __init__(self, channels: int, norm: type[nn.Module], act: nn.Module) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.branch = nn.Sequential(first, norm(channels), act, second, norm(channels))
        self.sum, self.last = Sum(), type(act)()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sum(torch.stack([x, self.branch(x)], -1)))


class Narrow(nn.Module):
    """A block of a ConvNeXt: depthwise, a layer norm over channels, two linear layers, a scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.linspace(0.2, 0.6, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(nn.functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def _blocks(kind: str) -> list[nn.Module]:
    if kind == "convnext":
        return [Narrow(6), nn.Conv2d(6, 6, 2, 2), Narrow(6)]
    act = nn.SiLU if kind == "silu" else nn.ReLU
    return [Residual(6, nn.BatchNorm2d, act()), Residual(6, nn.BatchNorm2d, act())]


KINDS = ("resnet", "silu", "convnext")


def network(kind: str, biases: bool) -> nn.Sequential:
    """Random weights and statistics; its convolutions' outputs are of both signs."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        blocks = _blocks(kind)
        net = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), *blocks),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Merged by hand elsewhere, without the term that keeps roots off zero.
                module.eps = 0.0
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
                if biases:
                    module.running_mean.normal_(0, 0.1)
                    module.bias.data.normal_(0, 0.1)
            if not biases and getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
    return net.double().eval()


def _x() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()


def _lrp(name: str, epsilon: float) -> sf.LRP:
    return sf.LRP(name, epsilon=epsilon, bounds=(0.0, 1.0) if name == BOXED else None)


def test_every_composite_is_here() -> None:
    assert {*CONSERVING, "captum"} == set(COMPOSITES)


@pytest.mark.parametrize("name", CONSERVING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_conserved_without_biases(name: str, kind: str) -> None:
    """But for what z-plus rules lose at outputs without a positive contribution."""
    found = sf.explain(network(kind, False), _x(), target=1, method=_lrp(name, 1e-12))
    lost = 1 - float(found.values.sum() / found.scores)
    assert abs(lost) < (1e-6 if name in ("epsilon", "epsilon_gamma", BOXED) else 0.2)


@pytest.mark.parametrize("name", CONSERVING)
@pytest.mark.parametrize("kind", KINDS)
def test_relevance_stays_bounded_with_biases(name: str, kind: str) -> None:
    found = sf.explain(network(kind, True), _x(), target=1, method=_lrp(name, 1e-6))
    assert float(found.values.abs().sum()) < 100 * float(found.scores.abs())


ZENNITS = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_gamma_box": "EpsilonGammaBox",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
    "epsilon_alpha2_beta1_flat": "EpsilonAlpha2Beta1Flat",
}


@pytest.mark.parametrize("kind", ["resnet", "silu"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", ZENNITS)
def test_zennits_numbers(name: str, kind: str, biases: bool) -> None:
    composites = pytest.importorskip("zennit.composites")
    attribution = pytest.importorskip("zennit.attribution")
    canonizers = pytest.importorskip("zennit.canonizers")
    rules = pytest.importorskip("zennit.rules")
    model, x, epsilon = network(kind, biases), _x(), 1e-9
    box = {"low": torch.zeros_like(x), "high": torch.ones_like(x)} if name == BOXED else {}
    composite = getattr(composites, ZENNITS[name])(
        **box,
        epsilon=epsilon,
        stabilizer=epsilon,
        layer_map=[(Sum, rules.Norm(epsilon)), (nn.SiLU, rules.Pass())],
        canonizers=[canonizers.SequentialMergeBatchNorm()],
    )
    with attribution.Gradient(model=model, composite=composite) as found:
        expected = found(x, torch.eye(4).double()[[1]] * model(x).detach())[1]
    values = sf.explain(network(kind, biases), x, target=1, method=_lrp(name, epsilon)).values
    # The flat rule has an epsilon there, and none here.
    assert relative_l2(values, expected) < (1e-9 if name.endswith("flat") else 1e-11)
