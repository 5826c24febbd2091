"""Calls as Captum's users write them, for either library: `python -m benchmarks.methods`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.models import Workload

LONG = 4.0
"""Seconds from which a call is not warmed up twice."""
Call = Callable[[Any, nn.Module, Any, Tensor], Tensor]
"""From a library, a model, its target and its input to attributions, as Captum's users write it."""


def _occlusion(library: Any, model: nn.Module, target: Any, x: Tensor) -> Tensor:
    side = x.shape[-1] // 7
    window = (x.shape[1], *(side for _ in x.shape[2:]))
    found: Tensor = library.Occlusion(model).attribute(
        x, window, strides=window, target=target, perturbations_per_eval=16
    )
    return found


def _segments(x: Tensor) -> Tensor:
    """Blocks of an eighth of each side, numbered."""
    number = torch.zeros(x.shape[2:], dtype=torch.int64)
    for axis, size in enumerate(x.shape[2:]):
        shape = [-1 if one == axis else 1 for one in range(x.dim() - 2)]
        number = number * 8 + (torch.arange(size) * 8 // size).view(shape)
    return number[None, None]


def _ablation(library: Any, model: nn.Module, target: Any, x: Tensor) -> Tensor:
    found: Tensor = library.FeatureAblation(model).attribute(
        x, target=target, feature_mask=_segments(x), perturbations_per_eval=16
    )
    return found


def _last(model: nn.Module) -> nn.Module:
    """The last spatial layer: the usual choice for maps of a convolutional network."""
    for name in ("stages", "bottom", "4"):
        with suppress(AttributeError):
            return model.get_submodule(name)
    raise ValueError(f"no layer is known to take for a {type(model).__name__}")


def _layer_ig(library: Any, model: nn.Module, target: Any, x: Tensor) -> Tensor:
    layer = library.LayerIntegratedGradients(model, _last(model))
    found: Tensor = layer.attribute(x, target=target, n_steps=20)
    return found


def _grad_cam(library: Any, model: nn.Module, target: Any, x: Tensor) -> Tensor:
    raw = library.LayerGradCam(model, _last(model)).attribute(x, target=target)
    found: Tensor = library.LayerAttribution.interpolate(raw, tuple(x.shape[2:]), "nearest")
    return found


def _simple(name: str, **options: Any) -> Call:
    def call(library: Any, model: nn.Module, target: Any, x: Tensor) -> Tensor:
        found: Tensor = getattr(library, name)(model).attribute(x, target=target, **options)
        return found

    return call


CALLS: dict[str, Call] = {
    "Saliency": _simple("Saliency"),
    "InputXGradient": _simple("InputXGradient"),
    "IntegratedGradients, 50 steps": _simple("IntegratedGradients"),
    "GuidedBackprop": _simple("GuidedBackprop"),
    "Deconvolution": _simple("Deconvolution"),
    "DeepLift": _simple("DeepLift"),
    "LayerGradCam": _grad_cam,
    "LayerIntegratedGradients, 20 steps": _layer_ig,
    "Occlusion, 7 windows a side": _occlusion,
    "FeatureAblation, 8 segments a side": _ablation,
}


class Named(Protocol):
    """A setting, of which only the call's name counts."""

    @property
    def method(self) -> str: ...


class Called:
    """A library at work on one model, as code written for Captum calls it."""

    def __init__(self, library: str, workload: Workload, model: nn.Module) -> None:
        self.library, self.model, self.target = import_module(library), model, workload.target
        if isinstance(workload.target, tuple):
            self.model, self.target = _Summed(model, workload.target), None

    def warm(self, x: Tensor, setting: Named) -> None:
        """Two calls: the first of a kind learns what points take, and compiles kernels."""
        begun = time.perf_counter()
        self(x, setting)
        if time.perf_counter() - begun < LONG:
            self(x, setting)

    def __call__(self, x: Tensor, setting: Named) -> Tensor:
        return CALLS[setting.method](self.library, self.model, self.target, x).detach()


class _Summed(nn.Module):
    """A map of classes as one number per example."""

    def __init__(self, model: nn.Module, index: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.index = model, (slice(None), *index)
        for name, layer in model.named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)[self.index].flatten(1).sum(1)
        return found
