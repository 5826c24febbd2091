"""The benchmark models: sizes, shapes, gradients that flow, and a global generator left alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.models import WORKLOADS, Workload

Case = tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]

# Small versions: the builder, an input shape [B, ...] and the output shape.
CASES: dict[str, Case] = {
    "resnet50": (models.resnet50, (2, 3, 64, 64), (2, 1000)),
    "vit_b16": (lambda: models.vit_b16(10, 64, depth=2), (2, 3, 64, 64), (2, 10)),
    "unet3d-batch": (lambda: models.unet3d(width=4), (2, 1, 16, 8, 12), (2, 4, 16, 8, 12)),
    "unet3d-instance": (
        lambda: models.unet3d(2, 3, width=4, norm="instance"),
        (2, 2, 16, 8, 12),
        (2, 3, 16, 8, 12),
    ),
    "mlp": (models.mlp, (2, 64), (2, 10)),
    "convnext_t": (models.convnext_t, (2, 3, 32, 32), (2, 1000)),
}


@cache
def built(name: str) -> nn.Module:
    return CASES[name][0]()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def input_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient [like x] of the sum of class 1."""
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y[:, 1].sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (models.ResNet, 25_557_032),
        (models.VisionTransformer, 86_567_656),
        (models.UNet3d, 339_620),
        (models.MLP, 150_794),
        (models.ConvNeXt, 28_589_128),
    ],
)
def test_parameter_count(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert parameters(make()) == count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_input_gradient(name: str, dtype: torch.dtype) -> None:
    _, shape, out_shape = CASES[name]
    model = built(name).to(dtype)
    try:
        generator = torch.Generator().manual_seed(1)
        y, gradient = input_gradient(model, torch.randn(shape, generator=generator).to(dtype))
    finally:
        model.float()
    assert y.shape == out_shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    # Neither dead nor exploding: logits of order one, and different for different inputs.
    assert 0.05 < y.std().item() < 20.0
    assert not torch.allclose(y[0], y[1], rtol=1e-3)
    assert gradient.shape == shape
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    per_item = gradient.flatten(1).norm(dim=1)
    assert (per_item > 1e-3).all()
    assert (per_item < 1e4).all()
    assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", CASES)
def test_built_in_eval_mode_on_the_cpu(name: str) -> None:
    model = built(name)
    assert not any(module.training for module in model.modules())
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet50", "unet3d-batch"])
def test_batch_norm_in_eval_mode_changes_its_input(name: str) -> None:
    norms = [m for m in built(name).modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))]
    assert norms
    for norm in norms:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        assert norm.momentum == 0.1
        assert (variance > 0).all()
        assert (variance - 1).abs().max() > 0.05
        assert mean.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["resnet50", "unet3d-batch"])
def test_running_statistics_fit_random_inputs(name: str) -> None:
    """With fitting statistics, eval mode and train mode give nearly the same output."""
    model = deepcopy(built(name))
    shape = (4, 3, 96, 96) if name == "resnet50" else (8, 1, 16, 16, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        in_eval = model(x)
        in_train = model.train()(x)
    # Batch noise alone is a few tenths; statistics left at their start differ by more than 1.
    assert (in_eval - in_train).norm() < 0.6 * in_train.norm()


@pytest.mark.parametrize("name", CASES)
def test_building_repeats_and_leaves_the_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    again = CASES[name][0]()
    assert torch.equal(torch.get_rng_state(), before)
    for key, parameter in built(name).named_parameters():
        assert torch.equal(parameter, again.get_parameter(key)), key


def test_seed_changes_the_weights() -> None:
    first, second = models.mlp(seed=0), models.mlp(seed=1)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_relu_is_in_place_as_in_torchvision() -> None:
    relus = [module for module in built("resnet50").modules() if isinstance(module, nn.ReLU)]
    assert len(relus) == 17
    assert all(relu.inplace for relu in relus)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="norm must be 'batch' or 'instance': got 'layer'"):
        models.unet3d(norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of patch: got image=50"):
        models.vit_b16(image=50)
    with pytest.raises(ValueError, match="batch must be at least 1: got 0"):
        WORKLOADS["mlp"].inputs(0)
    with pytest.raises(ValueError, match="shape must hold positive sizes"):
        Workload("empty", models.mlp, (), 0)


def test_workloads_are_named_by_their_key() -> None:
    assert list(WORKLOADS) == ["resnet50", "vit_b16", "unet3d", "mlp", "digits"]
    assert all(workload.name == key for key, workload in WORKLOADS.items())


@pytest.mark.parametrize("name", WORKLOADS)
def test_inputs_repeat_and_leave_the_global_generator(name: str) -> None:
    workload = WORKLOADS[name]
    before = torch.get_rng_state()
    x = workload.inputs(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == (3, *workload.shape)
    assert x.dtype == torch.float32
    assert torch.equal(workload.inputs(3), x)
    assert torch.equal(workload.inputs(1), x[:1])
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(workload.inputs(3, seed=1), x)
    assert torch.equal(workload.inputs(3, dtype=torch.float64), x.double())
    assert torch.equal(workload.inputs(3, dtype=torch.float16), x.half())


@pytest.mark.parametrize("name", ["resnet50", "vit_b16", "unet3d", "mlp"])
def test_targets_exist(name: str) -> None:
    makes: dict[str, Callable[[], nn.Module]] = {
        "resnet50": models.ResNet,
        "vit_b16": models.VisionTransformer,
        "unet3d": models.UNet3d,
        "mlp": models.MLP,
    }
    workload = WORKLOADS[name]
    with torch.device("meta"):
        y = makes[name]().eval()(torch.empty(1, *workload.shape))
    index = workload.target if isinstance(workload.target, tuple) else (workload.target,)
    picked = (slice(None), *index)
    assert y[picked].shape[0] == 1


def test_digits_workload() -> None:
    workload = WORKLOADS["digits"]
    before = torch.get_rng_state()
    model = workload.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    y, gradient = input_gradient(model, workload.inputs(2))
    assert y.shape == (2, 10)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient != 0).any()
