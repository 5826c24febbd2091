"""Classes that follow a straight line from baselines to inputs, with Captum's steps and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saliency_fast._types import Inputs
from saliency_fast.captum.arguments import (
    arguments_of,
    as_tuple,
    filled,
    floating,
    like_inputs,
    public,
    tiled,
)
from saliency_fast.captum.attribute_call import AttributeCall, explained
from saliency_fast.captum.attribution import GradientAttribution, LayerGradientAttribution
from saliency_fast.captum.layers import Layers
from saliency_fast.captum.noise import samples_at_once
from saliency_fast.captum.shared_calls import calls_of
from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Recipe, WeightedSum
from saliency_fast.errors import ContractError
from saliency_fast.methods.parts.quadrature import Array, Rule, level


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


def _legendre(n: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (1.0 + nodes), 0.5 * weights


RULES = {
    "riemann_left": _riemann(lambda n: 0.0, lambda n: 1.0 - 1.0 / n),
    "riemann_right": _riemann(lambda n: 1.0 / n, lambda n: 1.0),
    "riemann_middle": _riemann(lambda n: 1.0 / (2 * n), lambda n: 1.0 - 1.0 / (2 * n)),
    # Its weights sum to (n - 1) / n, as Captum's do.
    "riemann_trapezoid": Rule(_trapezoid, least=2),
    "gausslegendre": Rule(_legendre),
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
        >>> import torch
        >>> from saliency_fast.captum import IntegratedGradients
        >>> method = IntegratedGradients(lambda x: (x**2).sum(1))
        >>> method.attribute(torch.tensor([[1.0, -2.0]])).round(decimals=4)
        tensor([[1., 4.]])
    """

    _has_delta = True

    def __init__(self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self._multiply_by_inputs = multiply_by_inputs

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Attributes to the inputs; see `Attribution` for the other arguments.

        Args:
            n_steps: points of the path.
            method: a quadrature rule of `RULES`.
            internal_batch_size: the most points at once; None plans memory.

        Returns:
            Attributions of the inputs' shape, or (attributions, delta).
        """
        steps = Steps(method, n_steps, self.multiplies_by_inputs)
        of = floating(as_tuple(inputs)), target, additional_forward_args
        call = self._call(*of, baselines=baselines, points_per_launch=internal_batch_size)
        maps = steps.maps(call)
        return self._with_delta(call, maps, like_inputs(inputs, maps), return_convergence_delta)


class _LayerPath(LayerGradientAttribution):
    """A method of a layer and a path."""

    _has_delta = True
    _promotes = False
    _maps: Callable[..., list[Inputs]]

    @public
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attributes to the layer; arguments as of `Attribution` and IntegratedGradients.attribute,
        with baselines of the inputs.

        Returns:
            Attributions of the layer's shapes, or (attributions, delta).
        """
        steps = Steps(method, n_steps, self.multiplies_by_inputs)
        parts = floating(as_tuple(inputs)) if self._promotes else inputs
        of = {"baselines": baselines, "points_per_launch": internal_batch_size}
        call = self._call(parts, target, additional_forward_args, **of)
        layers = Layers.of(self, attribute_to_layer_input)
        maps = self._maps(layers, call, steps, grad_kwargs)
        flat = tuple(chain(*maps))
        return self._with_delta(call, flat, layers.formatted(maps), return_convergence_delta)


class LayerIntegratedGradients(_LayerPath):
    """Integrated Gradients at a layer, or at several at once, on the line between the layers'
    tensors for baselines and for inputs (Sundararajan, 2017).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import LayerIntegratedGradients
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

    def _maps(
        self, layers: Layers, call: AttributeCall, steps: Steps, grad_kwargs: Any
    ) -> list[Inputs]:
        at, counts = layers.path(call, grad_kwargs)
        return layers.grouped(steps.maps(at), counts)


class LayerConductance(_LayerPath):
    """The gradient at a layer where each step begins times the layer's change (Dhamdhere, 2018).

    Example:
        >>> import torch
        >>> from saliency_fast.captum import LayerConductance
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1))
        >>> LayerConductance(model, model[0]).attribute(torch.ones(1, 4), target=0).shape
        torch.Size([1, 3])
    """

    _multiply_by_inputs = _promotes = True

    def _maps(
        self, layers: Layers, call: AttributeCall, steps: Steps, grad_kwargs: Any
    ) -> list[Inputs]:
        nodes = RULES[steps.rule].points(steps.steps + 1)[0].tolist()
        at_once = samples_at_once(call.inputs, len(nodes))
        if call.points_per_launch is not None:
            at_once = call.points_per_launch // len(call.inputs[0])
        ends = list(zip(call.inputs, filled(call.inputs, call.baselines or ()), strict=True))

        def points(chunk: list[float]) -> Inputs:
            """Copies [len(chunk), B, *] of the batch on the line."""
            return tuple(torch.stack([s + alpha * (x - s) for alpha in chunk]) for x, s in ends)

        def at(chunk: list[float]) -> tuple[Inputs, Inputs]:
            """The layer's tensors and the gradients there, step-major."""
            count = len(chunk)
            rows = tuple(x.flatten(0, 1) for x in points(chunk))
            further = arguments_of(call.further, tiled, count)
            one = AttributeCall(call.forward, rows, tiled(call.target, count), further)
            values, gradients = layers.gradients(one, grad_kwargs)
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
            found = [
                ((a[batch:] - a[:-batch]) * g[:-batch]).view(-1, batch, *a.shape[1:]).sum(0)
                for a, g in zip(values, gradients, strict=True)
            ]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return [tuple(total)]
