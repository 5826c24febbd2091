"""LRP by modules, as Captum has it: each leaf layer by its rule, plain gradients in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from saliency_fast.captum.attribution import GradientAttribution
from saliency_fast.captum.contract import (
    as_args,
    as_tuple,
    copies,
    like_inputs,
    like_types,
    public,
)
from saliency_fast.captum.forward import run_forward
from saliency_fast.captum.lrp_rules import EpsilonRule, PropagationRule
from saliency_fast.captum.run import explained
from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import InputTypeError
from saliency_fast.methods.gradient import at_input
from saliency_fast.model.layers import hooked
from saliency_fast.model.state import preserved
from saliency_fast.rules import Ruling

RULED = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Linear, nn.BatchNorm2d),
)
"""Layers with a rule of their own; Captum's Addition_Module is known by its name."""
PASSED = (nn.ReLU, nn.Dropout, nn.Tanh)


class LRP(GradientAttribution):
    """The score, shared out from layer to layer down to the input (Bach, 2015).

    A leaf layer's rule is its attribute `rule`; layers of `RULED` have the epsilon rule unless they
    are given another, and those of `PASSED` hand relevance on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        for module in model.modules():
            rule = getattr(module, "rule", None)
            if rule is not None and not _is_rule(rule):
                raise InputTypeError(
                    "Please select propagation rules inherited from class PropagationRule for "
                    f"module: {module}; got {type(rule).__name__}"
                )

    @public
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Maps like the inputs, and the delta of each example [B] where it is asked for.

        verbose: prints which rule holds for which layer.
        """
        parts, further = as_tuple(inputs), as_args(additional_forward_args)
        rules = _rules_of(self.model)
        if verbose:
            for layer, rule in rules:
                if rule is not None:
                    print(f"Applied {rule} on layer {layer}")
        shares = explained(_ByModule(rules), self._asked(parts, target, further))
        shares = like_types(shares, parts)
        with torch.no_grad(), preserved(self.forward_func):
            output = run_forward(self.forward_func, copies(parts), target, further)
        maps = tuple(one * output.reshape(-1, *(1,) * (one.dim() - 1)) for one in shares)
        found = like_inputs(inputs, maps)
        if not return_convergence_delta:
            return found
        return found, self.compute_convergence_delta(maps, output)

    def has_convergence_delta(self) -> bool:
        return True

    def compute_convergence_delta(  # type: ignore[override]
        self, attributions: Tensor | tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The score less the sum of the attributions, for each example [B]."""
        sums = [one.reshape(len(one), -1).sum(1) for one in as_tuple(attributions)]
        return output.flatten() - torch.stack(sums).sum(0)

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


RulesExecutor = list[tuple[nn.Module, Any]]
"""Leaf layers, each with its rule; None hands relevance on."""


def _rules_of(model: nn.Module) -> RulesExecutor:
    leaves = [one for one in model.modules() if one is not model and not any(one.children())]
    return [(layer, _rule_of(layer)) for layer in leaves]


def _rule_of(layer: nn.Module) -> Any:
    if type(layer) in PASSED:
        return None
    rule = getattr(layer, "rule", None)
    if rule is not None:
        return rule
    if type(layer) in RULED or type(layer).__name__ == "Addition_Module":
        return EpsilonRule()
    raise InputTypeError(
        f"Module of type {type(layer)} has no rule defined and no default rule exists for this "
        "module type. Please, set a rule explicitly for this module, as in layer.rule = "
        "EpsilonRule() of saliency_fast.captum, or use saliency_fast.LRP, which has rules for more"
    )


def _is_rule(rule: object) -> bool:
    """Captum's rules are known by name: it need not be there."""
    return any(one.__name__ == PropagationRule.__name__ for one in type(rule).__mro__)


@dataclass(frozen=True)
class _ByModule:
    """Gradients of which a model's layers make relevance, for a score of one."""

    rules: RulesExecutor
    name = "lrp"

    def recipe(self) -> Recipe:
        layers = tuple((ref(layer), copy(rule)) for layer, rule in self.rules)
        return WeightedSum(Line(), at_input(), at_input=True, rules=_Rules(layers))


@dataclass(frozen=True, repr=False)
class _Rules:
    """Rules of layers, which it does not keep alive: the engine remembers it longer than a call."""

    layers: tuple[tuple[Any, Any], ...]
    name: ClassVar[str] = "LRP"
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = False
    unmet: ClassVar[str] = ""

    def __repr__(self) -> str:
        return repr([(id(layer()), type(rule), _fields(rule)) for layer, rule in self.layers])

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        alive = [(layer(), rule) for layer, rule in self.layers]
        return _Hooks([(layer, rule) for layer, rule in alive if layer is not None])


def _fields(rule: Any) -> Any:
    plain = (bool, int, float, str)
    given = getattr(rule, "__dict__", {})
    return [(k, v if isinstance(v, plain) else id(v)) for k, v in given.items()]


class _Hooks(Ruling):
    """A run in which layers hand back relevance."""

    def __init__(self, rules: RulesExecutor) -> None:
        super().__init__("LRP", {})
        self.rules = rules
        self.given: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
        self.marked: set[int] = set()
        self.alive: list[Tensor] = []

    def run(
        self,
        model: Callable[..., Any],
        points: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        layers = [layer for layer, _ in self.rules]
        with hooked(layers, self._before, of_input=True), hooked(layers, self._after):
            return super().run(model, points, args, kwargs)

    def _before(self, number: int, inputs: Any) -> Any:
        """Keeps what a layer takes; what works in place gets a copy."""
        self.given[number].append(inputs)
        if not getattr(self.rules[number][0], "inplace", False):
            return None
        return tuple(one.clone() if isinstance(one, Tensor) else one for one in inputs)

    def _after(self, number: int, output: Any) -> Any:
        inputs, (layer, rule) = self.given[number].pop(), self.rules[number]
        with _unseen():
            if rule is None:
                return _Passed.apply(inputs[0], output.detach())  # type: ignore[no-untyped-call]
            return self._shared(layer, copy(rule), inputs, output)

    def _shared(self, layer: nn.Module, rule: Any, inputs: tuple[Any, ...], output: Tensor) -> Any:
        # What rules of Captum's write to.
        rule._has_single_input = len(inputs) == 1
        rule.relevance_input, rule.relevance_output = defaultdict(list), {}
        shared = _changed(layer, rule, inputs, output)
        hook = rule._create_backward_hook_output(shared.detach())
        shared.register_hook(hook)  # type: ignore[no-untyped-call]
        for one in inputs:
            # Once: the hook gets what all that take the tensor hand back, added up.
            if isinstance(one, Tensor) and one.requires_grad and id(one) not in self.marked:
                self.marked.add(id(one))
                self.alive.append(one)
                hook = rule._create_backward_hook_input(one.detach().clone())
                one.register_hook(hook)  # type: ignore[no-untyped-call]
        return _Passed.apply(shared, output.detach())  # type: ignore[no-untyped-call]


def _changed(layer: nn.Module, rule: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """What the layer would give with the weights that its rule reckons shares by."""
    if type(rule).__name__ in ("EpsilonRule", "IdentityRule"):
        return output
    twin = copy(layer)
    own = {
        name: None if one is None else nn.Parameter(one.detach().clone(), requires_grad=False)
        for name, one in layer._parameters.items()
    }
    object.__setattr__(twin, "_parameters", own)
    with torch.no_grad():
        rule._manipulate_weights(twin, inputs, output)
    found: Tensor = twin.forward(*inputs)
    return found


@contextmanager
def _unseen() -> Iterator[None]:
    """A mode is watching the model's calls; these are none of them."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        yield


class _Passed(torch.autograd.Function):
    """Y in the place of what became of x, which gets all that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:
        return relevance, None
