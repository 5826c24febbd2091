"""GuidedBackprop, Deconvolution and GuidedGradCam: gradients under other rules for ReLUs."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saliency_fast.captum.attribution import GradientAttribution, LayerAttribution
from saliency_fast.captum.contract import as_tuple, like_inputs, like_types, public
from saliency_fast.captum.layer import LayerGradCam
from saliency_fast.captum.run import explained
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import ContractError
from saliency_fast.methods import Deconvolution as Deconv
from saliency_fast.methods import GuidedBackprop as Guided


class _Rectified(GradientAttribution):
    """Gradients of a module whose ReLUs, also those in functions, have a rule of their own."""

    rule: ClassVar[Method]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        if not isinstance(model, nn.Module):
            raise ContractError(
                "Given model must be an instance of torch.nn.Module to properly hook ReLU layers: "
                f"got {type(model).__name__}; pass the module whose function this is"
            )

    def _maps(self, inputs: Any, target: Any, further: Any) -> Any:
        parts = as_tuple(inputs)
        maps = explained(self.rule, self._asked(parts, target, further))
        return like_inputs(inputs, like_types(maps, parts))


class GuidedBackprop(_Rectified):
    """ReLUs hand back what is positive, where their input was (Springenberg, 2015)."""

    rule = Guided()

    @public
    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Maps like the inputs."""
        return self._maps(inputs, target, additional_forward_args)


class Deconvolution(_Rectified):
    """ReLUs hand back what is positive, whatever their input was (Zeiler, 2014)."""

    rule = Deconv()

    @public
    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Maps like the inputs."""
        return self._maps(inputs, target, additional_forward_args)


class GuidedGradCam(GradientAttribution):
    """Guided backpropagation times the positive part of Grad-CAM (Selvaraju, 2017)."""

    def __init__(
        self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None
    ) -> None:
        super().__init__(model)
        self.grad_cam = LayerGradCam(model, layer, device_ids)
        self.guided_backprop = GuidedBackprop(model)

    @public
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Maps like the inputs; empty, with a warning, for those that Grad-CAM's do not fit."""
        parts, further = as_tuple(inputs), additional_forward_args
        cam = self.grad_cam.attribute(
            parts, target, further, attribute_to_layer_input, relu_attributions=True
        )
        if isinstance(cam, tuple):
            raise ContractError(
                "GuidedGradCAM attributions for layer with multiple inputs / outputs is not "
                f"supported: got {len(cam)} tensors; name a layer with one"
            )
        guided = self.guided_backprop.attribute(parts, target, further)
        maps = tuple(_times(one, cam, interpolate_mode) for one in guided)
        return like_inputs(inputs, maps)


def _times(guided: Tensor, cam: Tensor, mode: str) -> Tensor:
    try:
        return guided * LayerAttribution.interpolate(cam, tuple(guided.shape[2:]), mode)
    except Exception as error:
        warnings.warn(
            "Couldn't appropriately interpolate GradCAM attributions for some input tensors, "
            f"returning empty tensor for corresponding attributions: {error}",
            stacklevel=4,
        )
        return torch.empty(0)
