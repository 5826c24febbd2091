"""Models with torch.utils.checkpoint give the maps that they give without it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import saliency_fast as sf
from saliency_fast.model.preserve import without_recomputation


def _twice(block: nn.Module, x: Tensor) -> Any:
    inner = lambda x: checkpoint(block[2:], x, use_reentrant=False)  # noqa: E731
    return checkpoint(lambda x: inner(block[:2](x)), x, use_reentrant=False)


KINDS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "saved": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda block, x: checkpoint_sequential(
        block, 2, x, use_reentrant=True
    ),
    "nested": _twice,
}


class Blocks(nn.Module):
    """A convolutional block and an attention block, each under a checkpoint."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.mixing = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, 0.0) for _ in range(3)))
        for layer in self.mixing:
            layer.self_attn.batch_first = True
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.block, self.stem(x))
        x = self.run(self.mixing, x.flatten(2).mT)
        return self.head(x.mean(1))


def _model(kind: str | None) -> nn.Module:
    torch.manual_seed(0)
    run = (lambda block, x: block(x)) if kind is None else KINDS[kind]
    return Blocks(run).eval().double()


def _x(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


CALLS: dict[str, dict[str, Any]] = {
    "gradient": {"method": sf.Gradient()},
    "ig": {"method": sf.IntegratedGradients(steps=4)},
    "ig as it is": {"method": sf.IntegratedGradients(steps=4), "lean": False},
    "ig at a layer": {"method": sf.IntegratedGradients(steps=4), "at": "block.1"},
    "ig at attention": {"method": sf.IntegratedGradients(steps=4), "at": "mixing.1.norm1"},
    "ig at what a layer takes": {
        **{"method": sf.IntegratedGradients(steps=4), "at": "block.2"},
        "layer_input": True,
    },
    "ig at a layer as it is": {
        **{"method": sf.IntegratedGradients(steps=4), "at": "block.1"},
        "lean": False,
    },
    "smoothgrad at a layer": {"method": sf.SmoothGrad(samples=4), "at": "block.0"},
    "grad_cam": {"method": sf.GradCAM(), "at": "block.2"},
    "grad_cam, auto": {"method": sf.GradCAM()},
    "eigen_cam": {"method": sf.EigenCAM(), "at": "block.2"},
    "guided": {"method": sf.GuidedBackprop()},
    "guided at a layer": {"method": sf.GuidedBackprop(), "at": "block.0"},
    "guided grad_cam": {"method": sf.GuidedGradCAM(), "at": "block.2"},
    "deconvolution": {"method": sf.Deconvolution()},
    "deeplift": {"method": sf.DeepLift()},
    "lrp": {"method": sf.LRP()},
    "gradient attention": {"method": sf.GradientAttention(grid=(8, 8))},
    "rollout": {"method": sf.AttentionRollout(grid=(8, 8))},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_maps_are_those_without_checkpoints(call: str, kind: str) -> None:
    expected = sf.explain(_model(None), _x(), target=3, **CALLS[call]).values
    found = sf.explain(_model(kind), _x(), target=3, **CALLS[call]).values
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs(kind: str) -> None:
    """Where a lean way pays, too: recorded, or call by call."""
    call: dict[str, Any] = {"method": sf.IntegratedGradients(steps=4), "at": "block.1"}
    # In float64 only what repeats the model's arithmetic bit for bit serves.
    x = _x(128)[:1].float()
    expected = sf.explain(_model(None).float(), x, target=3, **call)
    found = sf.explain(_model(kind).float(), x, target=3, **call)
    assert found.provenance.strategy != "off"
    gap = float((found.values - expected.values).norm())
    assert gap <= 1e-4 * float(expected.values.norm())


def test_threads() -> None:
    """Eight threads explain layers of one model while another trains one with checkpoints."""
    model, learner = _model("saved"), _model("reentrant").train()
    expected = sf.explain(model, _x(), target=3, at="block.1").values
    found: list[Tensor] = []
    counts: list[int] = []
    over = threading.Event()

    def explain() -> None:
        found.append(sf.explain(model, _x(), target=3, at="block.1").values)

    def train() -> None:
        runs = [0]

        def counted(x: Tensor) -> Tensor:
            runs[0] += 1
            return learner.block(x)

        while not over.is_set():
            runs[0] = 0
            x = torch.randn(1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
            checkpoint(counted, x, use_reentrant=len(counts) % 2 == 0).sum().backward()
            counts.append(runs[0])

    threads = [threading.Thread(target=explain) for _ in range(8)]
    trainer = threading.Thread(target=train)
    trainer.start()
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    over.set()
    trainer.join()
    assert len(found) == 8
    assert all(float((one - expected).norm()) <= 1e-9 * float(expected.norm()) for one in found)
    # The other thread's checkpoints still compute again.
    assert set(counts) == {2}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails: bool) -> None:
    def run(block: nn.Module, x: Tensor) -> Any:
        if fails:
            raise RuntimeError("the model fails")
        return checkpoint(block, x, use_reentrant=True)

    kinds = (torch_checkpoint.CheckpointFunction, torch_checkpoint._checkpoint_hook)
    before = [dict(vars(kind)) for kind in kinds]
    torch.manual_seed(0)
    try:
        sf.explain(Blocks(run).eval().double(), _x(), target=3, at="block.1")
    except RuntimeError:
        assert fails
    assert [dict(vars(kind)) for kind in kinds] == before


def test_a_context_of_the_users_runs_once() -> None:
    """The context that a checkpoint's forward pass asks for holds, and none for a second one."""
    entered: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            entered.append(self.name)

        def __exit__(self, *_: object) -> None:
            pass

    x = torch.ones(2, requires_grad=True)
    with without_recomputation():
        y = checkpoint(
            *(torch.exp, x),
            use_reentrant=False,
            context_fn=lambda: (Noted("forward"), Noted("again")),
        )
    torch.autograd.grad(y.sum(), x)
    assert entered == ["forward"]
