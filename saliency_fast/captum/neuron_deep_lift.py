"""NeuronDeepLift, NeuronDeepLiftShap: DeepLIFT of one neuron within a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from saliency_fast._types import Inputs
from saliency_fast.captum.attribution import (
    GradientAttribution,
    InternalAttribution,
    NeuronAttribution,
)
from saliency_fast.captum.contract import public
from saliency_fast.captum.deep_lift import DeepLift, DeepLiftShap
from saliency_fast.captum.forward import Neuron


class _OfNeuron(NeuronAttribution, GradientAttribution):
    def __init__(
        self, model: Callable[..., Any], layer: nn.Module, multiply_by_inputs: bool = True
    ) -> None:
        GradientAttribution.__init__(self, model)
        InternalAttribution.__init__(self, model, layer)
        self._multiply_by_inputs = multiply_by_inputs

    def _neuron(self, selector: Any, of_input: bool) -> Neuron:
        assert isinstance(self.layer, nn.Module)
        return Neuron(self.forward_func, self.layer, of_input, selector)

    @property
    def multiplies_by_inputs(self) -> bool:
        return self._multiply_by_inputs


class NeuronDeepLift(_OfNeuron):
    """(x - x') times DeepLIFT's multipliers of a neuron (Shrikumar, 2017)."""

    @public
    def attribute(
        self,
        inputs: Any,
        neuron_selector: Any,
        baselines: Any = None,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
    ) -> Any:
        """Maps like the inputs. neuron_selector: see `Neuron`."""
        neuron = self._neuron(neuron_selector, attribute_to_neuron_input)
        return DeepLift(neuron, self.multiplies_by_inputs).attribute(
            inputs,
            baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class NeuronDeepLiftShap(_OfNeuron):
    """The mean of NeuronDeepLift's maps over a set of baselines (Lundberg, 2017)."""

    @public
    def attribute(
        self,
        inputs: Any,
        neuron_selector: Any,
        baselines: Any,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., Inputs] | None = None,
    ) -> Any:
        """Maps like the inputs. neuron_selector: see `Neuron`; baselines: see `DeepLiftShap`."""
        neuron = self._neuron(neuron_selector, attribute_to_neuron_input)
        return DeepLiftShap(neuron, self.multiplies_by_inputs).attribute(
            inputs,
            baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )
