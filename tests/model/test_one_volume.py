"""Convolutions of one volume in float32, which go to oneDNN directly, against float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saliency_fast as sf
from saliency_fast.engine.arena import LEAST_TRACED, Arena
from saliency_fast.engine.bind import bind
from saliency_fast.engine.evaluation import SumEvaluation
from saliency_fast.engine.memory import MemoryMeter
from saliency_fast.graph.autograd import convolutions
from saliency_fast.model.executors import MetaTensors, shapes_only
from saliency_fast.together import Arguments
from tests import naive
from tests.models import randn

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here"
)
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    """Input, weight and bias of one row, and the options of a convolution."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    axes, groups = draw.choice((2, 3, 3, 3)), draw.choice((1, 1, 2, 4))
    taken, made = (groups * draw.choice((1, 2, 3)) for _ in range(2))
    kernel = [draw.choice((1, 2, 3, 4)) for _ in range(axes)]
    stride, dilation = ([draw.choice((1, 1, 2, 3)) for _ in range(axes)] for _ in range(2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [min(draw.choice((0, 0, 1, 2, 3)), one) for one in reach]
    transposed = draw.random() < 0.5
    extra = [draw.choice((0, 1)) if transposed else 0 for _ in range(axes)]
    sizes = [draw.choice((1, 4, 5, 9)) for _ in range(axes)]
    x = torch.randn(1, taken, *(2 * size for size in sizes), generator=numbers)
    x = x[(..., *(slice(None, None, 2),) * axes)]
    if draw.random() < 0.6:
        x = x.contiguous(memory_format=draw.choice((torch.contiguous_format, LAYOUTS[axes])))
    shape = (taken, made // groups) if transposed else (made, taken // groups)
    weight = torch.randn(*shape, *kernel, generator=numbers)
    if draw.random() < 0.3:
        # Part of a larger one, as where a concatenation is taken apart.
        larger = torch.randn(shape[0], 2 * shape[1], *kernel, generator=numbers)
        weight = larger.narrow(1, shape[1], shape[1])
    bias = torch.randn(made, generator=numbers) if draw.random() < 0.5 else None
    return x, weight, bias, (stride, padding, dilation, transposed, extra, groups)


@needs_onednn
def test_any_convolution() -> None:
    found = 0
    for seed in range(400):
        x, weight, bias, options = drawn(seed)
        wide = None if bias is None else bias.double()
        try:
            expected = torch.ops.aten.convolution(x.double(), weight.double(), wide, *options)
        except RuntimeError:
            continue  # no such convolution
        result = convolutions.convolved(x, weight, bias, *options)
        assert result.shape == expected.shape, seed
        assert naive.relative_l2(result, expected) < 1e-5, seed
        found += 1
    assert found > 200


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_large_weights_keep_their_format(transposed: bool) -> None:
    weight = randn(16, 16, 5, 5, 5).float().contiguous(memory_format=LAYOUTS[3])
    x, options = randn(1, 16, 3, 4, 5).float(), ([1] * 3, [2] * 3, [1] * 3, transposed, [0] * 3, 1)
    with MemoryMeter() as meter:
        found = convolutions.convolved(x, weight, None, *options)
    expected = torch.ops.aten.convolution(x.double(), weight.double(), None, *options)
    assert naive.relative_l2(found, expected) < 1e-5
    # A copy of the weights in every launch would count as a part of each point.
    assert meter.largest < weight.nbytes


def test_what_is_no_convolution_is_told_by_pytorch() -> None:
    x, weight = randn(1, 2, 4, 4).float(), randn(3, 2, 5, 5).float()
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        convolutions.convolved(x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    with pytest.raises(RuntimeError, match="channels"):
        convolutions.convolved(x, weight[:, :1], None, [1, 1], [2, 2], [1, 1], False, [0, 0], 1)


def test_shapes_alone() -> None:
    x = randn(1, 2, 6, 6, 6).float()
    weight = randn(3, 2, 3, 3, 3).float()
    with MetaTensors(CPU):
        (points,) = shapes_only((x,), 1)
        found = convolutions.convolved(
            points, weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1
        )
    assert found.shape == (1, 3, 6, 6, 6)


class Narrow(nn.Sequential):
    """Convolutions that PyTorch would unfold for one row."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU()),
            *(nn.ConvTranspose3d(8, 4, 2, 2), nn.Conv3d(4, 1, 3, padding=1)),
            *(nn.Flatten(), nn.LazyLinear(2)),
        )


@needs_onednn
def test_no_unfolded_copies() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Narrow().eval(), torch.randn(1, 1, 12, 40, 40)
        model(x)
    engine = sf.Engine(model, sf.Gradient(), hashes=False)
    found = engine(x, 1).values
    expected = sf.Engine(model.double(), sf.Gradient(), hashes=False)(x.double(), 1).values
    assert naive.relative_l2(found, expected) < 1e-4
    model.float()
    call = bind(x, 1, (), None)
    arena = Arena(CPU, LEAST_TRACED)
    job, _ = engine._prepare(call, Arguments(x))
    SumEvaluation(job, call, job.baselines[0]).trial(1, arena)
    trace = arena.trace()
    arena.close()
    if trace is not None:
        widest = 4 * 8 * x.nbytes  # channels, and twice the sides
        assert 0 < max(size for size, _, _ in trace.lives) <= 1.5 * widest
