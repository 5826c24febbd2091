"""Recurrent layers: every gradient method against the naive loop, and what cuDNN asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine import bind
from saliency_fast.model import executors
from saliency_fast.model.executors import Differentiable, EagerExecutor
from tests import naive
from tests.model.answers import always_lean
from tests.models import randn

FLOAT64 = 1e-12
KINDS = [nn.LSTM, nn.GRU, nn.RNN]


class Steps(nn.Module):
    """A series [B, T, 3] to classes at each step [B, T, 5], through packed sequences if wanted."""

    def __init__(self, kind: type[nn.RNNBase], **fields: Any) -> None:
        super().__init__()
        self.recurrent = kind(3, 4, 2, batch_first=True, dropout=0.5, bidirectional=True, **fields)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.recurrent(x)[0])
        options = {"batch_first": True, "enforce_sorted": False}
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), **options)
        found, _ = self.recurrent(packed)
        found, _ = nn.utils.rnn.pad_packed_sequence(
            found, batch_first=True, total_length=x.shape[1]
        )
        return self.head(found)


class Convolutions(nn.Module):
    """A temporal convolutional network (Bai, 2018): causal, dilated, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(nn.functional.pad(x.mT, (2, 0))).tanh()
        y = y + self.second(nn.functional.pad(y, (4, 0))).tanh()
        return self.head(y.mT)


def made(kind: type[nn.RNNBase], seed: int = 0) -> Steps:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Steps(kind).double().eval()


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("target", [(4, 2), (slice(1, 4), 0)])
def test_gradients_in_time(kind: type[nn.RNNBase] | None, target: Any, lean: bool) -> None:
    model = Convolutions().double() if kind is None else made(kind)
    x, start = randn(2, 6, 3), randn(2, 6, 3, seed=1)

    def pick(y: Tensor) -> Tensor:
        return y[(slice(None), *target)].reshape(len(y), -1).sum(1)

    with always_lean():
        for i in range(2):
            one, origin = (x[i : i + 1],), (start[i : i + 1],)
            expected = naive.integrated_gradients(model, pick, one, origin, "midpoint", 7)[0]
            found = sf.explain(
                *(model, x),
                target=target,
                baseline=start,
                method=sf.IntegratedGradients(7),
                lean=lean,
            )
            assert naive.relative_l2(found.values[i : i + 1], expected) < FLOAT64
            noisy = naive.noisy_gradients(model, pick, one, [0.3], 6, 4, True)
            expected = torch.stack([g[0] for g in noisy]).mean(0)
            method = sf.SmoothGrad(6, sigma=0.3, seed=4)
            found = sf.explain(model, x, target=target, method=method, lean=lean)
            assert naive.relative_l2(found.values[i : i + 1], expected) < FLOAT64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lean", [True, False])
def test_packed_sequences(kind: type[nn.RNNBase], lean: bool) -> None:
    model, x, lengths = made(kind), randn(3, 6, 3), torch.tensor([6, 2, 4])
    targets = [(5, 1), (1, 4), (3, 0)]
    with always_lean():
        found = sf.explain(
            *(model, x),
            target=targets,
            method=sf.IntegratedGradients(5),
            forward_args=(lengths,),
            lean=lean,
        )
    for i, (step, k) in enumerate(targets):
        one = x[i : i + 1, : lengths[i]]

        def pick(y: Tensor, step: int = step, k: int = k) -> Tensor:
            return y[:, step, k]

        zero = (torch.zeros_like(one),)
        expected = naive.integrated_gradients(model, pick, (one,), zero, "midpoint", 5)[0]
        assert naive.relative_l2(found.values[i : i + 1, : lengths[i]], expected) < FLOAT64
        assert not bool(found.values[i, lengths[i] :].any())


class Cudnn(torch.overrides.TorchFunctionMode):
    """Refuses what cuDNN does: gradients of recurrent layers that ran in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.met = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in executors.LAYERS and torch.is_grad_enabled():
            packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
            dropout, train = args[6:8] if packed else args[5:7]
            assert train is True, "cudnn RNN backward can only be called in training mode"
            assert dropout == 0.0, "what is explained is the model in evaluation mode"
            self.met += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lean", [True, False])
def test_cudnns_terms(
    kind: type[nn.RNNBase], packed: bool, lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU layers run as in training but for their dropout; here the CPU stands in for one."""
    model, x, lengths = made(kind), randn(3, 6, 3), torch.tensor([6, 2, 4])
    args = (lengths,) if packed else ()
    method = sf.IntegratedGradients(4)
    expected = sf.explain(model, x, target=(1, 2), method=method, forward_args=args)
    monkeypatch.setattr(
        bind,
        "for_recurrent_layers",
        lambda executor, device: executors.for_recurrent_layers(executor, torch.device("cuda")),
    )
    with always_lean(), Cudnn() as cudnn:
        found = sf.explain(model, x, target=(1, 2), method=method, forward_args=args, lean=lean)
    assert cudnn.met > 0
    assert naive.relative_l2(found.values, expected.values) < FLOAT64
    assert not model.recurrent.training
    assert model.recurrent.dropout == 0.5


def test_the_stand_in_refuses_what_is_not_rewritten() -> None:
    with Cudnn(), pytest.raises(sf.errors.ModelError, match="training mode"):
        sf.explain(made(nn.LSTM), randn(1, 6, 3), target=(1, 2), method="gradient", lean=False)


def test_training_stays_as_it_is() -> None:
    """A layer that trains keeps its dropout: nobody explains it."""
    layer = nn.GRU(3, 4, 2, dropout=0.5).double()
    x = randn(6, 2, 3)
    torch.manual_seed(0)
    expected = layer(x)[0]
    torch.manual_seed(0)
    with Differentiable():
        assert torch.equal(layer(x)[0], expected)


def test_other_models_are_not_watched() -> None:
    cuda = torch.device("cuda")
    plain = EagerExecutor(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert executors.for_recurrent_layers(plain, cuda) is plain
    assert (
        executors.for_recurrent_layers(EagerExecutor(made(nn.GRU)), torch.device("cpu")).__class__
        is EagerExecutor
    )
    for executor in (EagerExecutor(made(nn.GRU)), EagerExecutor(lambda x: x)):
        assert executors.for_recurrent_layers(executor, cuda) is not executor


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: type[nn.RNNBase]) -> None:
    model, x = made(kind), randn(2, 6, 3)
    found = sf.explain(model, x, target=(4, 2), method=sf.HessianVectorProduct())
    for i in range(2):
        _, expected = torch.autograd.functional.hvp(lambda p: model(p[None])[0, 4, 2], x[i], x[i])
        # A ReLU-free layer is smooth; what is left is rounding through two backward passes.
        assert naive.relative_l2(found.values[i], expected) < 1e-11
