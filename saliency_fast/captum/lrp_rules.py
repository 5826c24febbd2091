"""Rules for LRP, set on modules as `layer.rule = EpsilonRule()`; Captum's own serve as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saliency_fast.rules.lrp import ratio


class PropagationRule(ABC):
    """How a layer shares the relevance of its outputs among its inputs.

    `_manipulate_weights(module, inputs, outputs)` changes the weights of a copy of the layer, by
    which shares are reckoned; STABILITY_FACTOR keeps denominators off zero.
    """

    STABILITY_FACTOR = 1e-9

    @abstractmethod
    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None: ...

    def _create_backward_hook_output(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """Relevance of the outputs to what goes back through the layer."""

        def hook(relevance: Tensor) -> Tensor:
            return ratio(relevance, outputs, self.STABILITY_FACTOR)

        return hook

    def _create_backward_hook_input(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """What came back through the layer to the relevance of its inputs."""
        return lambda gradient: gradient * inputs


class EpsilonRule(PropagationRule):
    """Shares in proportion to contributions; epsilon and the bias absorb theirs (Bach, 2015)."""

    def __init__(self, epsilon: float = 1e-9) -> None:
        self.STABILITY_FACTOR = epsilon

    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Weights are what they are."""


class _WeightRule(PropagationRule):
    def __init__(self, set_bias_to_zero: bool) -> None:
        self.set_bias_to_zero = set_bias_to_zero

    def weight(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _manipulate_weights(self, module: Any, inputs: Any, outputs: Any) -> None:
        if hasattr(module, "weight"):
            module.weight.data = self.weight(module.weight.data)
        if self.set_bias_to_zero and getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data * 0


class GammaRule(_WeightRule):
    """Positive weights count more by a factor of 1 + gamma (Montavon, 2019)."""

    def __init__(self, gamma: float = 0.25, set_bias_to_zero: bool = False) -> None:
        super().__init__(set_bias_to_zero)
        self.gamma = gamma

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.gamma * weight.clamp(min=0)


class Alpha1_Beta0_Rule(_WeightRule):  # noqa: N801
    """Positive weights alone count (Bach, 2015)."""

    def __init__(self, set_bias_to_zero: bool = False) -> None:
        super().__init__(set_bias_to_zero)

    def weight(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


class IdentityRule(EpsilonRule):
    """Inputs get the relevance of the outputs, which they are shaped like."""

    def _create_backward_hook_output(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        def hook(relevance: Tensor) -> Tensor:
            self.relevance = relevance
            return relevance

        return hook

    def _create_backward_hook_input(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: self.relevance
