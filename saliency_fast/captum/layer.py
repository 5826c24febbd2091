"""LayerActivation, LayerGradientXActivation and LayerGradCam: one run to a layer, one behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saliency_fast.captum.attribution import (
    GradientAttribution,
    InternalAttribution,
    LayerAttribution,
)
from saliency_fast.captum.contract import as_tuple, public
from saliency_fast.captum.inside import Inside

Layers = nn.Module | list[nn.Module]


class LayerActivation(LayerAttribution):
    """What a layer gives, or takes."""

    @public
    def attribute(
        self,
        inputs: Any,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """A tensor, or a tuple where the layer has several; in a list for a list of layers."""
        inside = Inside.of(self, attribute_to_layer_input)
        parts, further = as_tuple(inputs), additional_forward_args
        return inside.like_layers(inside.read(parts, further, whole=True))

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


class LayerGradientAttribution(LayerAttribution, GradientAttribution):
    """A method that takes gradients at a layer."""

    def __init__(
        self, forward_func: Callable[..., Any], layer: Layers, device_ids: list[int] | None = None
    ) -> None:
        GradientAttribution.__init__(self, forward_func)
        InternalAttribution.__init__(self, forward_func, layer, device_ids)


class LayerGradientXActivation(LayerGradientAttribution):
    """The gradient of the score at a layer times what the layer gives."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self._multiply_by_inputs, self._memory_efficient = multiply_by_inputs, memory_efficient

    @public
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Like the layer's tensors; on the CPU with memory_efficient."""
        inside = Inside.of(self, attribute_to_layer_input)
        values, gradients = inside.gradients(
            as_tuple(inputs), target, additional_forward_args, grad_kwargs
        )
        maps = [tuple(map(self._map, *pair)) for pair in zip(values, gradients, strict=True)]
        return inside.like_layers(maps)

    def _map(self, value: Tensor, gradient: Tensor) -> Tensor:
        found = gradient * value if self.multiplies_by_inputs else gradient
        return found.cpu() if self._memory_efficient else found

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs


class LayerGradCam(LayerGradientAttribution):
    """A layer's channels weighted by their mean gradient (Selvaraju, 2017), at the layer's size."""

    @public
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Maps [B, 1, *s]; [B, C, *s] without attr_dim_summation, which adds channels up."""
        inside = Inside.of(self, attribute_to_layer_input)
        (values,), (gradients,) = inside.gradients(
            as_tuple(inputs), target, additional_forward_args, grad_kwargs
        )
        maps = []
        for value, gradient in zip(values, gradients, strict=True):
            places = tuple(range(2, gradient.dim()))
            found = value * (gradient.mean(places, keepdim=True) if places else gradient)
            if attr_dim_summation:
                found = found.sum(1, keepdim=True)
            maps.append(found.relu() if relu_attributions else found)
        return inside.like_layers([tuple(maps)])
