"""Classes that take one gradient: at the input, under other rules for rectifiers, or at a layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saliency_fast import methods
from saliency_fast.captum.arguments import as_tuple, like_inputs, like_types, public
from saliency_fast.captum.attribute_call import explained
from saliency_fast.captum.attribution import (
    GradientAttribution,
    LayerAttribution,
    LayerGradientAttribution,
)
from saliency_fast.captum.layers import Layers
from saliency_fast.engine.recipe import Method
from saliency_fast.errors import ContractError


class _InputGradient(GradientAttribution):
    """A method of the engine that takes the gradient at the input."""

    method: ClassVar[Method]

    @public
    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """Attributes to the inputs; see `Attribution` for the arguments.

        Returns:
            Attributions of the inputs' shape.
        """
        return self._explained(self.method, inputs, target, additional_forward_args)

    def _explained(self, method: Method, inputs: Any, target: Any, further: Any) -> Any:
        call = self._call(inputs, target, further)
        return like_inputs(inputs, like_types(explained(method, call), call.inputs))


class Saliency(_InputGradient):
    """The gradient of the score at the input (Simonyan, 2013).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import Saliency
        >>> Saliency(lambda x: (x**2).sum(1)).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[2., 4.]])
    """

    @public
    def attribute(  # type: ignore[override]
        self, inputs: Any, target: Any = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Any:
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            abs: whether the gradients' absolute values are returned.

        Returns:
            Attributions of the inputs' shape.
        """
        method = methods.Gradient(absolute=bool(abs))
        return self._explained(method, inputs, target, additional_forward_args)


class InputXGradient(_InputGradient):
    """The input times the gradient there (Shrikumar, 2016).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import InputXGradient
        >>> InputXGradient(lambda x: (x**2).sum(1)).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[2., 8.]])
    """

    method = methods.InputXGradient()
    _multiply_by_inputs = True


class _RectifierRule(_InputGradient):
    """Gradients of a module whose ReLUs, also those in functions, have another backward rule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        if not isinstance(model, nn.Module):
            raise ContractError(
                "Given model must be an instance of torch.nn.Module to properly hook ReLU layers: "
                f"got {type(model).__name__}; pass the module whose function this is"
            )


class GuidedBackprop(_RectifierRule):
    """Gradients whose ReLUs pass what is positive, where their input is (Springenberg, 2015).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import GuidedBackprop
        >>> GuidedBackprop(torch.nn.ReLU()).attribute(torch.tensor([[1.0, -2.0]]), target=0)
        tensor([[1., 0.]])
    """

    method = methods.GuidedBackprop()


class Deconvolution(_RectifierRule):
    """Gradients whose ReLUs pass what is positive, whatever their input (Zeiler, 2014).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import Deconvolution
        >>> Deconvolution(torch.nn.ReLU()).attribute(torch.tensor([[1.0, -2.0]]), target=1)
        tensor([[0., 1.]])
    """

    method = methods.Deconvolution()


class LayerActivation(LayerAttribution):
    """The output of a layer, or its input.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import LayerActivation
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> LayerActivation(model, model[0]).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 0.]])
    """

    _multiply_by_inputs = True

    @public
    def attribute(
        self,
        inputs: Any,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Reads a layer; see `Attribution` for the arguments.

        Returns:
            A tensor, or a tuple where the layer has several; in a list for a list of layers.
        """
        layers = Layers.of(self, attribute_to_layer_input)
        return layers.formatted(layers.read(as_tuple(inputs), additional_forward_args, to_end=True))


class LayerGradientXActivation(LayerGradientAttribution):
    """The gradient of the score at a layer times the layer's output.

    Args:
        forward_func: see `Attribution`, as for `layer`, `device_ids` and `multiply_by_inputs`.
        memory_efficient: whether attributions are moved to the CPU.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import LayerGradientXActivation
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Softmax(1))
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> LayerGradientXActivation(model, model[0]).attribute(x, target=1).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
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
        """Attributions of the shapes of the layer's tensors; for arguments see `Attribution`."""
        layers = Layers.of(self, attribute_to_layer_input)
        call = self._call(inputs, target, additional_forward_args)
        pairs = zip(*layers.gradients(call, grad_kwargs), strict=True)
        return layers.formatted([tuple(map(self._product, *pair)) for pair in pairs])

    def _product(self, value: Tensor, gradient: Tensor) -> Tensor:
        found = gradient * value if self.multiplies_by_inputs else gradient
        return found.cpu() if self._memory_efficient else found


class LayerGradCam(LayerGradientAttribution):
    """A layer's channels weighted by their mean gradients (Selvaraju, 2017), at the layer's size.

    Example:
        >>> import torch
        >>> from saliency_fast.captum import LayerGradCam
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> LayerGradCam(model, model[0]).attribute(torch.ones(1, 1, 5, 5), target=0).shape
        torch.Size([1, 1, 3, 3])
    """

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
        """Attributes to a layer; see `Attribution` for the other arguments.

        Args:
            relu_attributions: whether negative attributions are set to zero.
            attr_dim_summation: whether channels are summed.

        Returns:
            Attributions [B, 1, *spatial], or [B, C, *spatial] without attr_dim_summation.
        """
        layers = Layers.of(self, attribute_to_layer_input)
        call = self._call(inputs, target, additional_forward_args)
        (values,), (gradients,) = layers.gradients(call, grad_kwargs)
        maps = []
        for value, gradient in zip(values, gradients, strict=True):
            spatial = tuple(range(2, gradient.dim()))
            found = value * (gradient.mean(spatial, keepdim=True) if spatial else gradient)
            if attr_dim_summation:
                found = found.sum(1, keepdim=True)
            maps.append(found.relu() if relu_attributions else found)
        return layers.formatted([tuple(maps)])


class GuidedGradCam(GradientAttribution):
    """Guided backpropagation times the positive part of Grad-CAM (Selvaraju, 2017).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import GuidedGradCam
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()
        ... )
        >>> GuidedGradCam(model, model[0]).attribute(torch.ones(1, 1, 5, 5), target=0).shape
        torch.Size([1, 1, 5, 5])
    """

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
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            interpolate_mode: by which Grad-CAM's map is resized to the inputs.

        Returns:
            Attributions of the inputs' shape; of inputs that the map cannot be resized to an empty
            tensor, with a warning.
        """
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
        maps = tuple(_resized_product(one, cam, interpolate_mode) for one in guided)
        return like_inputs(inputs, maps)


def _resized_product(guided: Tensor, cam: Tensor, mode: str) -> Tensor:
    try:
        return guided * LayerAttribution.interpolate(cam, tuple(guided.shape[2:]), mode)
    except Exception as error:
        warnings.warn(
            "Couldn't appropriately interpolate GradCAM attributions for some input tensors, "
            f"returning empty tensor for corresponding attributions: {error}",
            stacklevel=4,
        )
        return torch.empty(0)
