"""DeepLIFT in Captum's six classes: of inputs, layers and neurons, with one baseline or a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from saliency_fast import methods
from saliency_fast._types import Inputs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import (
    AttributeCall,
    GradientAttribution,
    InternalAttribution,
    LayerAttribution,
    NeuronAttribution,
    explained,
)
from saliency_fast.captum.layers import Layers
from saliency_fast.errors import ContractError


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
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        call = self._call(args, one_example=any(type(one) is torch.nn.Softmax for one in modules))
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
        self, model: Callable[..., Any], layer: torch.nn.Module, multiply_by_inputs: bool = True
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
        materialize = bool((args.grad_kwargs or {}).get("materialize_grads"))
        extended = layers.with_inputs(at, call, materialize=materialize)
        maps = self._maps(extended, at.baselines, args)
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
        self, model: Callable[..., Any], layer: torch.nn.Module, multiply_by_inputs: bool = True
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
        assert isinstance(self.layer, torch.nn.Module)
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
