"""LRP by modules, as in Captum: each leaf module by its rule, plain gradients between modules.

`saliency_fast.LRP` propagates through every call by the engine's rules. On a chain of modules the
two agree; a tensor that several modules take, calls outside of modules and rules of the user's own
have other numbers in Captum, which is why this class runs the model with hooks of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from saliency_fast._torch_compat import PARAMETERS, WithoutFunctionModes, own_parameters
from saliency_fast._types import Args, Function, Kwargs
from saliency_fast.captum import forms
from saliency_fast.captum.attribution import GradientAttribution, explained
from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import InputTypeError
from saliency_fast.graph.gradients import differentiable
from saliency_fast.methods.gradient import at_input
from saliency_fast.model.layers import hooked
from saliency_fast.model.preserve import preserved
from saliency_fast.rules.intercept import Rules, RulesMode
from saliency_fast.rules.lrp import ratio

DEFAULT_EPSILON = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Linear, nn.BatchNorm2d),
)
"""Layers with the epsilon rule by default; also Captum's Addition_Module, by its name."""
PASSED = (nn.ReLU, nn.Dropout, nn.Tanh)
"""Layers that hand relevance on unchanged."""


class PropagationRule(ABC):
    """How a layer propagates the relevance of its outputs to its inputs.

    Rules are assigned to modules, as in `layer.rule = EpsilonRule()`; Captum's own serve as well.
    `_manipulate_weights(module, inputs, outputs)` changes the weights of a copy of the layer, by
    whose contributions relevance is divided; STABILITY_FACTOR keeps denominators off zero.

    Example:
        >>> class Absolute(PropagationRule):
        ...     def _manipulate_weights(self, module, inputs, outputs):
        ...         module.weight.data = module.weight.data.abs()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model[0].rule = Absolute()
        >>> LRP(model).attribute(torch.ones(1, 4), target=0).shape
        torch.Size([1, 4])
    """

    STABILITY_FACTOR = 1e-9

    @abstractmethod
    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None: ...

    def _create_backward_hook_output(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """From the relevance of the outputs to what goes back through the layer."""
        return lambda relevance: ratio(relevance, outputs, self.STABILITY_FACTOR)

    def _create_backward_hook_input(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """From what came back through the layer to the relevance of its inputs."""
        return lambda gradient: gradient * inputs


class EpsilonRule(PropagationRule):
    """Relevance in proportion to contributions; epsilon and the bias absorb theirs (Bach, 2015).

    Args:
        epsilon: is added to denominators, with their sign.

    Example:
        >>> EpsilonRule(0.1).STABILITY_FACTOR
        0.1
    """

    def __init__(self, epsilon: float = 1e-9) -> None:
        self.STABILITY_FACTOR = epsilon

    def _manipulate_weights(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Weights stay as they are."""


class _WeightRule(PropagationRule):
    """A rule of other weights; `set_bias_to_zero` leaves the bias out."""

    def __init__(self, set_bias_to_zero: bool = False) -> None:
        self.set_bias_to_zero = set_bias_to_zero

    @abstractmethod
    def weight(self, weight: Tensor) -> Tensor: ...

    def _manipulate_weights(self, module: Any, inputs: Any, outputs: Any) -> None:
        if hasattr(module, "weight"):
            module.weight.data = self.weight(module.weight.data)
        if self.set_bias_to_zero and getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data * 0


class GammaRule(_WeightRule):
    """Positive weights count 1 + gamma times (Montavon, 2019).

    Args:
        gamma: by how much they count more.
        set_bias_to_zero: whether the bias is left out.

    Example:
        >>> GammaRule(0.5).weight(torch.tensor([2.0, -2.0]))
        tensor([ 3., -2.])
    """

    def __init__(self, gamma: float = 0.25, set_bias_to_zero: bool = False) -> None:
        super().__init__(set_bias_to_zero)
        self.gamma = gamma

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.gamma * weight.clamp(min=0)


class Alpha1_Beta0_Rule(_WeightRule):  # noqa: N801
    """Only positive weights count (Bach, 2015).

    Args:
        set_bias_to_zero: whether the bias is left out.

    Example:
        >>> Alpha1_Beta0_Rule().weight(torch.tensor([2.0, -2.0]))
        tensor([2., 0.])
    """

    def weight(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


class IdentityRule(EpsilonRule):
    """Inputs get the relevance of the outputs, which have their shape.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(1))
        >>> model[1].rule = IdentityRule()
        >>> LRP(model).attribute(torch.ones(1, 4), target=0).shape
        torch.Size([1, 4])
    """

    def _create_backward_hook_output(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        def hook(relevance: Tensor) -> Tensor:
            self.relevance = relevance
            return relevance

        return hook

    def _create_backward_hook_input(self, inputs: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: self.relevance


class LRP(GradientAttribution):
    """Layer-wise relevance propagation of the score to the input (Bach, 2015).

    A leaf module's rule is its attribute `rule`. Layers of `DEFAULT_EPSILON` have the epsilon rule
    unless they are given another, and those of `PASSED` hand relevance on.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> bool(LRP(model).attribute(x, target=0).sum() - model(x).sum() < 1e-5)
        True
    """

    _has_delta = _multiply_by_inputs = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        for module in model.modules():
            rule = getattr(module, "rule", None)
            # Captum's rules are found by name: it need not be installed.
            names = [one.__name__ for one in type(rule).__mro__]
            if rule is not None and PropagationRule.__name__ not in names:
                raise InputTypeError(
                    "Please select propagation rules inherited from class PropagationRule for "
                    f"module: {module}; got {type(rule).__name__}"
                )

    @forms.with_parameters(
        "inputs, target=None, additional_forward_args=None, return_convergence_delta=False, "
        "verbose=False"
    )
    def attribute(self, args: Any) -> Any:
        """Relevance of the inputs' shape, or (relevance, delta); TypeError without a rule."""
        call, model = self._call(args), self.model
        leaves = [one for one in model.modules() if one is not model and not any(one.children())]
        rules = [(layer, _rule_of(layer)) for layer in leaves]
        for layer, rule in rules:
            if args.verbose and rule is not None:
                print(f"Applied {rule} on layer {layer}")
        method = _ModuleRules(tuple((ref(layer), copy(rule)) for layer, rule in rules))
        shares = forms.like_types(explained(method, call), call.inputs)
        with torch.no_grad(), preserved(self.forward_func):
            output = forms.run_forward(
                call.forward, forms.copies(call.inputs), call.target, call.further
            )
        maps = tuple(one * output.reshape(-1, *(1,) * (one.dim() - 1)) for one in shares)
        result = forms.like_inputs(args.inputs, maps)
        if not args.return_convergence_delta:
            return result
        return result, self.compute_convergence_delta(maps, output)

    def compute_convergence_delta(
        self, attributions: Tensor | tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The score less the sum of the attributions, for each example [B]."""
        sums = [one.reshape(len(one), -1).sum(1) for one in forms.as_tuple(attributions)]
        return output.flatten() - torch.stack(sums).sum(0)


LayerRules = list[tuple[nn.Module, Any]]
"""Leaf modules, each with its rule; None hands relevance on."""


def _rule_of(layer: nn.Module) -> Any:
    if type(layer) in PASSED:
        return None
    rule = getattr(layer, "rule", None)
    if rule is not None:
        return rule
    if type(layer) in DEFAULT_EPSILON or type(layer).__name__ == "Addition_Module":
        return EpsilonRule()
    raise InputTypeError(
        f"Module of type {type(layer)} has no rule defined and no default rule exists for this "
        "module type. Please, set a rule explicitly for this module, as in layer.rule = "
        "EpsilonRule() of saliency_fast.captum, or use saliency_fast.LRP, which has rules for more"
    )


@dataclass(frozen=True, repr=False)
class _ModuleRules(Rules):
    """Gradients under the rules of a model's layers, held weakly: the engine keeps it for long."""

    layers: tuple[tuple[Any, Any], ...]
    name: ClassVar[str] = "LRP"

    def recipe(self) -> Recipe:
        return WeightedSum(Line(), at_input(), at_input=True, rules=self)

    def __repr__(self) -> str:
        """What tells rules apart: layers, and the classes and attributes of their rules."""
        plain, parts = (bool, int, float, str), []
        for layer, rule in self.layers:
            own = getattr(rule, "__dict__", {}).items()
            fields = [(key, one if isinstance(one, plain) else id(one)) for key, one in own]
            parts.append((id(layer()), type(rule), fields))
        return repr(parts)

    def mode(self, model: Function | None = None) -> RulesMode:
        alive = [(layer(), rule) for layer, rule in self.layers]
        return _Hooks([(layer, rule) for layer, rule in alive if layer is not None])


class _Hooks(RulesMode):
    """A run in which layers propagate relevance."""

    def __init__(self, rules: LayerRules) -> None:
        super().__init__("LRP", {})
        self.rules = rules
        self.layer_inputs: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self.marked: set[int] = set()
        self.alive: list[Tensor] = []

    def run(self, model: Function, points: Sequence[Tensor], args: Args, kwargs: Kwargs) -> Any:
        layers = [layer for layer, _ in self.rules]
        with hooked(layers, self._before, of_input=True), hooked(layers, self._after):
            return super().run(model, points, args, kwargs)

    def _before(self, number: int, inputs: Any) -> Any:
        """Keeps a layer's inputs; layers that work in place get copies."""
        self.layer_inputs[number].append(inputs)
        if not getattr(self.rules[number][0], "inplace", False):
            return None
        return tuple(one.clone() if isinstance(one, Tensor) else one for one in inputs)

    def _after(self, number: int, output: Any) -> Any:
        inputs, (layer, rule) = self.layer_inputs[number].pop(), self.rules[number]
        # The mode that intercepts the model's calls intercepts none of these.
        with WithoutFunctionModes(), torch.enable_grad():
            if rule is None:
                return _passed(inputs[0], output.detach())
            return self._propagated(layer, copy(rule), inputs, output)

    def _propagated(
        self, layer: nn.Module, rule: Any, inputs: tuple[Any, ...], output: Tensor
    ) -> Any:
        # Captum's rules write to these.
        rule._has_single_input = len(inputs) == 1
        rule.relevance_input, rule.relevance_output = defaultdict(list), {}
        shared = _with_rule_weights(layer, rule, inputs, output)
        hook = rule._create_backward_hook_output(shared.detach())
        shared.register_hook(hook)  # type: ignore[no-untyped-call]
        for one in inputs:
            # Once per tensor: the hook gets the sum over all modules that take it.
            if isinstance(one, Tensor) and one.requires_grad and id(one) not in self.marked:
                self.marked.add(id(one))
                self.alive.append(one)
                hook = rule._create_backward_hook_input(one.detach().clone())
                one.register_hook(hook)  # type: ignore[no-untyped-call]
        return _passed(shared, output.detach())


def _with_rule_weights(
    layer: nn.Module, rule: Any, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    """What the layer would return with the weights of its rule."""
    if type(rule).__name__ in ("EpsilonRule", "IdentityRule"):
        return output
    twin = copy(layer)
    own = {
        name: None if one is None else nn.Parameter(one.detach().clone(), requires_grad=False)
        for name, one in own_parameters(layer).items()
    }
    object.__setattr__(twin, PARAMETERS, own)
    with torch.no_grad():
        rule._manipulate_weights(twin, inputs, output)
    result: Tensor = twin.forward(*inputs)
    return result


def _passed(x: Tensor, y: Tensor) -> Any:
    """Returns y, and hands its gradient on to x."""
    return differentiable(x, lambda _: (y.clone(), ()), lambda relevance: relevance)
