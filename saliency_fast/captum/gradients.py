"""Classes that take gradients: at the input or a layer, by other rules, or along a line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from saliency_fast import methods
from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import (
    AttributeCall,
    GradientAttribution,
    InternalAttribution,
    LayerAttribution,
    LayerGradientAttribution,
    NeuronAttribution,
    explained,
)
from saliency_fast.captum.layers import Layers
from saliency_fast.captum.shared_calls import calls_of, samples_at_once
from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Method, Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.parts import quadrature
from saliency_fast.methods.parts.quadrature import Array, Rule, level


class _InputGradient(GradientAttribution):
    """A method of the engine that takes the gradient at the input."""

    method: ClassVar[Method]

    @forms.with_parameters("inputs, target=None, additional_forward_args=None")
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape."""
        return self._explained(self.method, args)

    def _explained(self, method: Method, args: Any) -> Any:
        call = self._call(args)
        maps = forms.like_types(explained(method, call), call.inputs)
        return forms.like_inputs(args.inputs, maps)


class Saliency(_InputGradient):
    """The gradient of the score at the input (Simonyan, 2013).

    Example:
        >>> Saliency(lambda x: (x**2).sum(1)).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[2., 4.]])
    """

    @forms.with_parameters("inputs, target=None, abs=True, additional_forward_args=None")
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape."""
        return self._explained(methods.Gradient(absolute=bool(args.abs)), args)


class InputXGradient(_InputGradient):
    """The input times the gradient there (Shrikumar, 2016).

    Example:
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
        >>> GuidedBackprop(torch.nn.ReLU()).attribute(torch.tensor([[1.0, -2.0]]), target=0)
        tensor([[1., 0.]])
    """

    method = methods.GuidedBackprop()


class Deconvolution(_RectifierRule):
    """Gradients whose ReLUs pass what is positive, whatever their input (Zeiler, 2014).

    Example:
        >>> Deconvolution(torch.nn.ReLU()).attribute(torch.tensor([[1.0, -2.0]]), target=1)
        tensor([[0., 1.]])
    """

    method = methods.Deconvolution()


class LayerActivation(LayerAttribution):
    """The output of a layer, or its input.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> LayerActivation(model, model[0]).attribute(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 0.]])
    """

    _multiply_by_inputs = True

    @forms.with_parameters("inputs, additional_forward_args=None, attribute_to_layer_input=False")
    def attribute(self, args: Any) -> Any:
        """A tensor, or a tuple where the layer has several; in a list for a list of layers."""
        layers = Layers.of(self, args.attribute_to_layer_input)
        inputs, further = forms.as_tuple(args.inputs), args.additional_forward_args
        return layers.formatted(layers.read(inputs, further, to_end=True))


class LayerGradientXActivation(LayerGradientAttribution):
    """The gradient of the score at a layer times the layer's output.

    Args:
        forward_func: see `Attribution`, as for `layer`, `device_ids` and `multiply_by_inputs`.
        memory_efficient: whether attributions are moved to the CPU.

    Example:
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

    @forms.with_parameters(
        "inputs, target=None, additional_forward_args=None, attribute_to_layer_input=False, "
        "grad_kwargs=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the shapes of the layer's tensors."""
        layers = Layers.of(self, args.attribute_to_layer_input, args.grad_kwargs)
        pairs = zip(*layers.gradients(self._call(args)), strict=True)
        return layers.formatted([tuple(map(self._product, *pair)) for pair in pairs])

    def _product(self, value: Tensor, gradient: Tensor) -> Tensor:
        result = gradient * value if self.multiplies_by_inputs else gradient
        return result.cpu() if self._memory_efficient else result


class LayerGradCam(LayerGradientAttribution):
    """A layer's channels weighted by their mean gradients (Selvaraju, 2017), at the layer's size.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
        >>> LayerGradCam(model, model[0]).attribute(torch.ones(1, 1, 5, 5), target=0).shape
        torch.Size([1, 1, 3, 3])
    """

    @forms.with_parameters(
        "inputs, target=None, additional_forward_args=None, attribute_to_layer_input=False, "
        "relu_attributions=False, attr_dim_summation=True, grad_kwargs=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions [B, 1, *spatial], or [B, C, *spatial] without attr_dim_summation."""
        layers = Layers.of(self, args.attribute_to_layer_input, args.grad_kwargs)
        (values,), (gradients,) = layers.gradients(self._call(args))
        maps = []
        for value, gradient in zip(values, gradients, strict=True):
            spatial = tuple(range(2, gradient.dim()))
            result = value * (gradient.mean(spatial, keepdim=True) if spatial else gradient)
            if args.attr_dim_summation:
                result = result.sum(1, keepdim=True)
            maps.append(result.relu() if args.relu_attributions else result)
        return layers.formatted([tuple(maps)])


class GuidedGradCam(GradientAttribution):
    """Guided backpropagation times the positive part of Grad-CAM (Selvaraju, 2017).

    Example:
        >>> conv = torch.nn.Conv2d(1, 2, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten())
        >>> GuidedGradCam(model, conv).attribute(torch.ones(1, 1, 5, 5), target=0).shape
        torch.Size([1, 1, 5, 5])
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None
    ) -> None:
        super().__init__(model)
        self.grad_cam = LayerGradCam(model, layer, device_ids)
        self.guided_backprop = GuidedBackprop(model)

    @forms.with_parameters(
        "inputs, target=None, additional_forward_args=None, interpolate_mode='nearest', "
        "attribute_to_layer_input=False"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape; for inputs that the map cannot be resized to an empty
        tensor, with a warning.
        """
        of = forms.as_tuple(args.inputs), args.target, args.additional_forward_args
        cam = self.grad_cam.attribute(*of, args.attribute_to_layer_input, relu_attributions=True)
        if isinstance(cam, tuple):
            raise ContractError(
                "GuidedGradCAM attributions for layer with multiple inputs / outputs is not "
                f"supported: got {len(cam)} tensors; name a layer with one"
            )
        guided = self.guided_backprop.attribute(*of)
        maps = tuple(_resized_product(one, cam, args.interpolate_mode) for one in guided)
        return forms.like_inputs(args.inputs, maps)


def _resized_product(guided: Tensor, cam: Tensor, mode: str) -> Tensor:
    try:
        return guided * LayerAttribution.interpolate(cam, tuple(guided.shape[2:]), mode)
    except Exception as error:
        warnings.warn(
            "Couldn't appropriately interpolate GradCAM attributions for some input tensors, "
            f"returning empty tensor for corresponding attributions: {error}",
            stacklevel=6,
        )
        return torch.empty(0)


def _riemann(first: Callable[[int], float], last: Callable[[int], float]) -> Rule:
    """A rule of equal weights on evenly spaced nodes, which Captum rounds to float32."""

    def points(n: int) -> tuple[Array, Array]:
        nodes = torch.linspace(first(n), last(n), n, device="cpu").double().numpy()
        return nodes, np.full(n, 1.0 / n)

    return Rule(points, least=2)


def _trapezoid(n: int) -> tuple[Array, Array]:
    nodes, weights = _riemann(lambda n: 0.0, lambda n: 1.0).points(n)
    weights[[0, -1]] /= 2.0
    return nodes, weights


RULES = {
    "riemann_left": _riemann(lambda n: 0.0, lambda n: 1.0 - 1.0 / n),
    "riemann_right": _riemann(lambda n: 1.0 / n, lambda n: 1.0),
    "riemann_middle": _riemann(lambda n: 1.0 / (2 * n), lambda n: 1.0 - 1.0 / (2 * n)),
    # Its weights sum to (n - 1) / n, as Captum's do.
    "riemann_trapezoid": Rule(_trapezoid, least=2),
    "gausslegendre": quadrature.RULES["gauss_legendre"],
}


@dataclass(frozen=True)
class Steps:
    """Integrated Gradients by one of Captum's rules, as a method of the engine."""

    rule: str
    steps: int
    multiply: bool
    name = "integrated_gradients"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ContractError(
                f"The number of steps must be a positive integer. Given: {self.steps}"
            )
        if self.rule not in RULES:
            raise ContractError(
                f"Approximation method must be one for the following {list(RULES)}. Given "
                f"{self.rule}"
            )
        if self.steps < RULES[self.rule].least:
            least = "one" if RULES[self.rule].least == 2 else "zero"
            raise ContractError(
                f"The number of steps has to be larger than {least}: got {self.steps}, for "
                f"{self.rule}"
            )

    @cached_property
    def _rounded(self) -> tuple[Array, Array]:
        nodes, weights = RULES[self.rule].points(self.steps)
        return nodes, weights.astype(np.float32).astype(np.float64)

    def recipe(self) -> Recipe:
        levels = (level(Rule(lambda n: self._rounded), self.steps),)
        factor = "difference" if self.multiply else "none"
        return WeightedSum(Line(), levels, factor=factor, baseline="one")

    def maps(self, call: AttributeCall) -> Inputs:
        """The maps of a call. The engine divides by the weights' sum, which need not be one."""
        total = float(self._rounded[1].sum())
        return tuple(one.mul_(total) for one in explained(self, call))


class IntegratedGradients(GradientAttribution):
    """(x - x') times the mean gradient on the line from a baseline x' (Sundararajan, 2017).

    Example:
        >>> method = IntegratedGradients(lambda x: (x**2).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]])).round(decimals=4)
        tensor([[1., 4.]])
    """

    _has_delta = True

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @forms.with_parameters(
        "inputs, baselines=None, target=None, additional_forward_args=None, n_steps=50, "
        "method='gausslegendre', internal_batch_size=None, return_convergence_delta=False"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape, or (attributions, delta)."""
        steps = Steps(args.method, args.n_steps, self.multiplies_by_inputs)
        call = self._call(args, inputs=forms.floating(forms.as_tuple(args.inputs)))
        return self._result(args, call, steps.maps(call))


class _LayerPath(LayerGradientAttribution):
    """A method of a layer and a path between the model's baselines and inputs."""

    _has_delta = True
    _maps: Callable[..., list[Inputs]]
    _read = staticmethod(forms.as_tuple)

    @forms.with_parameters(
        "inputs, baselines=None, target=None, additional_forward_args=None, n_steps=50, "
        "method='gausslegendre', internal_batch_size=None, return_convergence_delta=False, "
        "attribute_to_layer_input=False, grad_kwargs=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the layer's shapes, or (attributions, delta)."""
        steps = Steps(args.method, args.n_steps, self.multiplies_by_inputs)
        layers = Layers.of(self, args.attribute_to_layer_input, args.grad_kwargs)
        call = self._call(args, inputs=self._read(args.inputs))
        maps = self._maps(layers, call, steps)
        return self._result(args, call, tuple(chain(*maps)), layers.formatted(maps))


class LayerIntegratedGradients(_LayerPath):
    """Integrated Gradients at a layer, or at several at once, on the line between the layers'
    tensors for baselines and for inputs (Sundararajan, 2017).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1))
        >>> LayerIntegratedGradients(model, model[0]).attribute(torch.ones(1, 4), target=0).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.ig = IntegratedGradients(forward_func, multiply_by_inputs)

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.ig.multiplies_by_inputs

    def _maps(self, layers: Layers, call: AttributeCall, steps: Steps) -> list[Inputs]:
        at, counts = layers.path(call)
        return layers.grouped(steps.maps(at), counts)


class LayerConductance(_LayerPath):
    """The gradient at a layer where each step begins times the layer's change (Dhamdhere, 2018).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1))
        >>> LayerConductance(model, model[0]).attribute(torch.ones(1, 4), target=0).shape
        torch.Size([1, 3])
    """

    _multiply_by_inputs = True
    _read = staticmethod(lambda inputs: forms.floating(forms.as_tuple(inputs)))

    def _maps(self, layers: Layers, call: AttributeCall, steps: Steps) -> list[Inputs]:
        nodes = RULES[steps.rule].points(steps.steps + 1)[0].tolist()
        at_once = samples_at_once(call.inputs, len(nodes))
        if call.points_per_launch is not None:
            at_once = call.points_per_launch // len(call.inputs[0])
        ends = list(zip(call.inputs, forms.filled(call.inputs, call.baselines or ()), strict=True))

        def points(chunk: list[float]) -> Inputs:
            """Copies [len(chunk), B, *] of the batch on the line."""
            return tuple(torch.stack([s + alpha * (x - s) for alpha in chunk]) for x, s in ends)

        def at(chunk: list[float]) -> tuple[Inputs, Inputs]:
            """The layer's tensors and the gradients there, step-major."""
            count = len(chunk)
            rows = tuple(x.flatten(0, 1) for x in points(chunk))
            further = forms.arguments_of(call.further, forms.tiled, count)
            one = AttributeCall(call.forward, rows, forms.tiled(call.target, count), further)
            values, gradients = layers.gradients(one)
            return values[0], gradients[0]

        # Chunks share a point: each change is between two points of one chunk.
        step = max(1, at_once - 1)
        chunks = [nodes[first : first + step + 1] for first in range(0, len(nodes) - 1, step)]
        shared = calls_of(call.forward, call.further, *layers.layers)
        apart = any(shared.depend(points(chunk)) for chunk in chunks)
        total, batch = list[Tensor](), len(call.inputs[0])
        for chunk in chunks:
            several = [at([one]) for one in chunk] if apart else [at(chunk)]
            values, gradients = (
                tuple(map(torch.cat, zip(*side, strict=True)))
                for side in zip(*several, strict=True)
            )
            result = [
                ((a[batch:] - a[:-batch]) * g[:-batch]).view(-1, batch, *a.shape[1:]).sum(0)
                for a, g in zip(values, gradients, strict=True)
            ]
            total = [a + b for a, b in zip(total, result, strict=True)] if total else result
        return [tuple(total)]


# DeepLIFT: of inputs, layers and neurons, with one baseline or a set.


class DeepLift(GradientAttribution):
    """(x - x') times DeepLIFT's multipliers by the rescale rule (Shrikumar, 2017).

    Args:
        model: see `Attribution`, as for `multiply_by_inputs`.
        eps: nonlinearities whose input differs less from the baseline's have their gradient.

    Example:
        >>> DeepLift(torch.nn.ReLU()).attribute(torch.tensor([[4.0, 2.0]]), -1.0, target=0)
        tensor([[4., 0.]])
    """

    _has_delta = True

    def __init__(
        self, model: Callable[..., Any], multiply_by_inputs: bool = True, eps: float = 1e-10
    ) -> None:
        super().__init__(model)
        self.model, self.eps = model, eps
        self._multiply_by_inputs = multiply_by_inputs

    @forms.with_parameters(
        "inputs, baselines=None, target=None, additional_forward_args=None, "
        "return_convergence_delta=False, custom_attribution_func=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape, or (attributions, delta)."""
        call = self._deep_lift_call(args)
        return self._result(args, call, self._maps(call, call.baselines, args))

    def _deep_lift_call(self, args: Any) -> AttributeCall:
        """A call with tensors for baselines. Softmax as a module makes the batch one example:
        Captum averages its multipliers over the batch.
        """
        model = self.forward_func
        model = model.model if isinstance(model, forms.Neuron) else model
        modules = model.modules() if isinstance(model, nn.Module) else ()
        call = self._call(args, one_example=any(type(one) is nn.Softmax for one in modules))
        return replace(call, baselines=forms.filled(call.inputs, call.baselines or ()))

    def _maps(self, call: AttributeCall, baselines: Any, args: Any) -> Inputs:
        """Maps by the multipliers of a call, of as many of its inputs as there are baselines."""
        method = methods.DeepLift(self.eps, multiply=False, captum=True)
        starts = tuple(one.detach() for one in baselines)
        parts = tuple(x.detach() for x in call.inputs[: len(starts)])
        multipliers = forms.like_types(explained(method, call)[: len(starts)], parts)
        if (custom := args.custom_attribution_func) is None:
            if not self.multiplies_by_inputs:
                return multipliers
            both = zip(multipliers, parts, starts, strict=True)
            return tuple((x - start) * one for one, x, start in both)
        if not callable(custom):
            raise ContractError(
                f"`custom_attribution_func` must be a callable function but {type(custom)} provided"
            )
        count = len(signature(custom).parameters)
        if not 1 <= count <= 3:
            raise ContractError(
                "`custom_attribution_func` must take at least one and at most 3 arguments: got "
                f"{count}; they are the multipliers, inputs and baselines"
            )
        maps: Inputs = custom(*(multipliers, parts, starts)[:count])
        return maps


def over_baselines(parameters: str, single: Callable[..., Any], name: str) -> Any:
    """`attribute` that averages over sets of baselines; single: that of one baseline for each."""

    def attribute(self: Any, args: Any) -> Any:
        parts = forms.as_tuple(args.inputs)
        of = parts if name == "LayerDeepLift" else args.inputs
        rows = _sets(forms.drawn_from(args.baselines, of), parts, name)
        count = len(rows[0])
        # Every example with every row of the set, example-major.
        pairs = tuple(x.detach().repeat_interleave(count, 0) for x in parts)
        args.inputs = forms.like_inputs(args.inputs, pairs)
        args.baselines = tuple(one.repeat(len(parts[0]), *(1,) * (one.dim() - 1)) for one in rows)
        further = args.additional_forward_args
        args.additional_forward_args = forms.arguments_of(further, forms.interleaved, count) or None
        if hasattr(args, "target"):
            args.target = forms.interleaved(forms.as_target(args.target), count)
        has_delta = getattr(args, "return_convergence_delta", False)
        found = single(self, **vars(args))
        maps, delta = found if has_delta else (found, None)
        several = maps if isinstance(maps, tuple) else (maps,)
        means = tuple(one.view(-1, count, *one.shape[1:]).mean(1) for one in several)
        result = means if isinstance(maps, tuple) else means[0]
        return (result, delta) if has_delta else result

    attribute.__doc__ = "The means of the attributions by every row of the baselines."
    attribute.__qualname__ = single.__qualname__
    return forms.with_parameters(parameters)(attribute)


def _sets(baselines: Any, inputs: Inputs, single: str) -> Inputs:
    """A set of baselines [M, *] for each input; single: the class for one baseline."""
    rows = forms.as_baselines(baselines, inputs)
    first = rows[0]
    if not isinstance(first, Tensor) or len(first) < 2:
        raise ContractError(
            "Baselines distribution has to be provided in form of a torch.Tensor with more "
            f"than one example but found: {first}. If baselines are provided in shape of "
            f"scalars or with a single baseline example, `{single}` approach can be used "
            "instead."
        )
    for one in rows:
        if not isinstance(one, Tensor):
            raise ContractError(
                "Baselines distribution has to be provided in form of a torch.Tensor: got "
                f"{one}; pass a tensor [M, ...] for each input"
            )
    return rows  # type: ignore[return-value]


class DeepLiftShap(DeepLift):
    """The mean of DeepLift's attributions over a set of baselines (Lundberg, 2017).

    Example:
        >>> x, baselines = torch.ones(1, 2), torch.zeros(3, 2)
        >>> DeepLiftShap(torch.nn.ReLU()).attribute(x, baselines, target=0)
        tensor([[1., 0.]])
    """

    def __init__(self, model: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(model, multiply_by_inputs)

    attribute = over_baselines(
        "inputs, baselines, target=None, additional_forward_args=None, "
        "return_convergence_delta=False, custom_attribution_func=None",
        *(DeepLift.attribute, "DeepLift"),
    )


class LayerDeepLift(LayerAttribution, DeepLift):
    """(a - a') times DeepLIFT's multipliers at a layer (Shrikumar, 2017).

    Of `grad_kwargs` only `materialize_grads` counts: zeros for a layer that the output does not
    use.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
        >>> LayerDeepLift(model, model[0]).attribute(torch.ones(1, 2), target=0).shape
        torch.Size([1, 2])
    """

    def __init__(
        self, model: Callable[..., Any], layer: nn.Module, multiply_by_inputs: bool = True
    ) -> None:
        InternalAttribution.__init__(self, model, layer)
        # Last: the other calls it with its defaults, on the way to the common base.
        DeepLift.__init__(self, model, multiply_by_inputs)

    @forms.with_parameters(
        "inputs, baselines=None, target=None, additional_forward_args=None, "
        "return_convergence_delta=False, attribute_to_layer_input=False, "
        "custom_attribution_func=None, grad_kwargs=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the layer's shapes, or (attributions, delta)."""
        call = self._deep_lift_call(args)
        layers = Layers.of(self, args.attribute_to_layer_input)
        at, counts = layers.path(call)
        zeros = bool((args.grad_kwargs or {}).get("materialize_grads"))
        maps = self._maps(layers.with_inputs(at, call, zeros), at.baselines, args)
        return self._result(args, call, maps, layers.formatted(layers.grouped(maps, counts)))


class LayerDeepLiftShap(LayerDeepLift, DeepLiftShap):
    """The mean of LayerDeepLift's attributions over a set of baselines (Lundberg, 2017).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
        >>> x, baselines = torch.ones(1, 2), torch.zeros(3, 2)
        >>> LayerDeepLiftShap(model, model[0]).attribute(x, baselines, target=0).shape
        torch.Size([1, 2])
    """

    attribute = over_baselines(
        "inputs, baselines, target=None, additional_forward_args=None, "
        "return_convergence_delta=False, attribute_to_layer_input=False, "
        "custom_attribution_func=None",
        *(LayerDeepLift.attribute, "LayerDeepLift"),
    )


class NeuronDeepLift(NeuronAttribution, GradientAttribution):
    """(x - x') times DeepLIFT's multipliers of a neuron (Shrikumar, 2017).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
        >>> NeuronDeepLift(model, model[0]).attribute(torch.ones(1, 2), 1)
        tensor([[0., 1.]])
    """

    def __init__(
        self, model: Callable[..., Any], layer: nn.Module, multiply_by_inputs: bool = True
    ) -> None:
        GradientAttribution.__init__(self, model)
        InternalAttribution.__init__(self, model, layer)
        self._multiply_by_inputs = multiply_by_inputs

    @forms.with_parameters(
        "inputs, neuron_selector, baselines=None, additional_forward_args=None, "
        "attribute_to_neuron_input=False, custom_attribution_func=None"
    )
    def attribute(self, args: Any) -> Any:
        """Attributions of the inputs' shape."""
        assert isinstance(self.layer, nn.Module)
        at = self.layer, args.attribute_to_neuron_input, args.neuron_selector
        method = DeepLift(forms.Neuron(self.forward_func, *at), self.multiplies_by_inputs)
        of = args.inputs, args.baselines, None, args.additional_forward_args
        return method.attribute(*of, custom_attribution_func=args.custom_attribution_func)


class NeuronDeepLiftShap(NeuronDeepLift):
    """The mean of NeuronDeepLift's attributions over a set of baselines (Lundberg, 2017).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sigmoid())
        >>> x, baselines = torch.ones(1, 2), torch.zeros(3, 2)
        >>> NeuronDeepLiftShap(model, model[0]).attribute(x, 1, baselines)
        tensor([[0., 1.]])
    """

    attribute = over_baselines(
        "inputs, neuron_selector, baselines, additional_forward_args=None, "
        "attribute_to_neuron_input=False, custom_attribution_func=None",
        *(NeuronDeepLift.attribute, "DeepLift"),
    )
