"""Propagation rules of LRP: how the relevance of a layer's outputs goes to its inputs [B, *].

Denominators z are kept off zero as z + sign(z) epsilon, with sign(0) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.graph.gradients import gradients

Call = Callable[[Tensor, Any, Any], Tensor]
Numbers = float | tuple[float, ...]
Part = Callable[[Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Affine:
    """A layer: `call(x, weight, bias)` is affine in x and linear in weight and bias.

    channels: the axis of the input's channels. outputs: the axis of the weight that numbers the
    output channels, None where nothing can be merged into the layer.
    """

    call: Call
    weight: Tensor | None = None
    bias: Tensor | None = None
    channels: int = 1
    outputs: int | None = None

    def vjp(self, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        """Z = call(x, weight, bias), and the vector-Jacobian product in x."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = self.call(leaf, weight, bias)

        def product(cotangent: Tensor) -> Tensor:
            grad: Tensor = gradients(z, leaf, cotangent)[0]
            return grad

        return z.detach(), product

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine | None:
        """The layer followed by scale [C] * z + shift [C], as one layer."""
        if self.weight is None or self.outputs is None:
            return None
        shape = [1] * self.weight.dim()
        shape[self.outputs] = -1
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, weight=self.weight * scale.view(shape), bias=bias)


PropagationRule = Callable[[Affine, Tensor, Tensor], Tensor]
"""From a layer, its input and the relevance of its outputs to the relevance of the input."""


def ratio(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """R / (z + sign(z) epsilon) of the relevance R; without an epsilon, R / 0 is 0."""
    if epsilon == 0:
        return torch.where(z == 0, 0.0, relevance / z)
    # The sign of -0.0 does not matter: it is a sum of zeros alone.
    divisor = torch.copysign(torch.full((), epsilon, dtype=z.dtype, device=z.device), z)
    return relevance / divisor.add_(z)


def _check_number(name: str, value: object, least: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number: got {value!r}")
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{name} must be a finite number of {least:g} or more: got {value}")


_BIASES = ("rule", "keep", "zero")


class _Checked:
    """A rule whose fields are numbers, but for `bias` and `signed`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("bias", "signed"):
                _check_number(name, value)
            elif name == "bias" and value not in _BIASES:
                raise InputError(f"bias must be one of {', '.join(_BIASES)}: got {value!r}")


def _positive(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clamp(min=0)


def _negative(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clamp(max=0)


def _raised(gamma: float, part: Part, value: Tensor | None) -> Tensor | None:
    """Values with gamma times a part of them added."""
    given = part(value)
    return None if value is None or given is None else torch.add(value, given, alpha=gamma)


def _biased(kind: str, bias: Tensor | None, rule: Part) -> Tensor | None:
    if kind == "rule":
        return rule(bias)
    return bias if kind == "keep" else None


def _by_sign(
    layer: Affine, x: Tensor, relevance: Tensor, weights: Any, bias: Tensor | None, epsilon: float
) -> Tensor:
    """The epsilon rule with one weight for positive and another for negative elements of x."""
    high, low = x.clamp(min=0), x.clamp(max=0)
    z, vjp = layer.vjp(high, weights[0], bias)
    # On a GPU this test would wait for the device.
    if not x.is_cuda and not bool(low.any()):
        return high * vjp(ratio(relevance, z, epsilon))
    z_low, vjp_low = layer.vjp(low, weights[1], None)
    cotangent = ratio(relevance, z + z_low, epsilon)
    return high * vjp(cotangent) + low * vjp_low(cotangent)


def _of_one_sign(
    layer: Affine, x: Tensor, relevance: Tensor, sign: int, bias: Tensor | None, epsilon: float
) -> Tensor:
    """Relevance in proportion to the contributions w x of one sign."""
    weights = _positive(layer.weight), _negative(layer.weight)
    return _by_sign(layer, x, relevance, weights[::sign], bias, epsilon)


@dataclass(frozen=True)
class Epsilon(_Checked):
    """R_i = x_i sum_j w_ij R_j / (z_j + sign(z_j) epsilon) (Bach, 2015); 0: the plain z rule.

    The bias and epsilon absorb a part of the relevance.
    """

    epsilon: float = 1e-6

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        z, vjp = layer.vjp(x, layer.weight, layer.bias)
        return x * vjp(ratio(relevance, z, self.epsilon))


@dataclass(frozen=True)
class Gamma(_Checked):
    """Contributions of the output's own sign count 1 + gamma times (Andeol, 2021).

    R_i = sum_j (c_ij + gamma max(0, c_ij)) R_j / sum_i (...) of c_ij = w_ij x_i where z_j >= 0, and
    with min in the place of max where z_j < 0. For inputs and outputs >= 0 these are weights w +
    gamma max(0, w) (Montavon, 2019). bias: "rule" (a contribution), "keep" (as it is) or "zero".
    signed: False takes those weights whatever the signs, as Captum does.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6
    bias: str = "rule"
    signed: bool = True

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        if not self.signed:
            raised = partial(_raised, self.gamma, _positive)
            bias = _biased(self.bias, layer.bias, raised)
            own = replace(layer, weight=raised(layer.weight), bias=bias)
            return Epsilon(self.epsilon)(own, x, relevance)
        with torch.no_grad():
            negative = layer.call(x, layer.weight, layer.bias) < 0
        result = self._raise(layer, x, relevance.masked_fill(negative, 0.0), _positive, _negative)
        # On a GPU this test would wait for the device.
        if x.is_cuda or bool(negative.any()):
            relevance = relevance.masked_fill(~negative, 0.0)
            result = result + self._raise(layer, x, relevance, _negative, _positive)
        return result

    def _raise(
        self, layer: Affine, x: Tensor, relevance: Tensor, same: Part, opposite: Part
    ) -> Tensor:
        """Relevance by contributions of which one sign is raised, `same` where x is positive."""
        raised = partial(_raised, self.gamma, same)
        weights = raised(layer.weight), _raised(self.gamma, opposite, layer.weight)
        bias = _biased(self.bias, layer.bias, raised)
        return _by_sign(layer, x, relevance, weights, bias, self.epsilon)


@dataclass(frozen=True)
class ZPlus(_Checked):
    """Relevance in proportion to positive contributions: alpha 1, beta 0 (Bach, 2015).

    bias: "rule" (its positive part counts), "keep" (all of it) or "zero". signed: where inputs are
    negative, negative weights contribute; False takes positive weights whatever the input's sign.
    """

    epsilon: float = 1e-6
    bias: str = "rule"
    signed: bool = True

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        bias = _biased(self.bias, layer.bias, _positive)
        if self.signed:
            return _of_one_sign(layer, x, relevance, 1, bias, self.epsilon)
        own = replace(layer, weight=_positive(layer.weight), bias=bias)
        return Epsilon(self.epsilon)(own, x, relevance)


@dataclass(frozen=True)
class AlphaBeta(_Checked):
    """alpha times the positive less beta times the negative contributions' part (Bach, 2015).

    alpha - beta = 1, so that relevance is kept where there are contributions of both signs.
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isclose(self.alpha - self.beta, 1.0):
            raise InputError(
                f"alpha - beta must be 1, or relevance is not conserved: got alpha {self.alpha}, "
                f"beta {self.beta}"
            )

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        gained = _of_one_sign(layer, x, relevance, 1, _positive(layer.bias), self.epsilon)
        if self.beta == 0:
            return self.alpha * gained
        lost = _of_one_sign(layer, x, relevance, -1, _negative(layer.bias), self.epsilon)
        return self.alpha * gained - self.beta * lost


@dataclass(frozen=True)
class Flat:
    """Equal relevance for every input of an output (Lapuschkin, 2017; Montavon, 2019)."""

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        weight = None if layer.weight is None else torch.ones_like(layer.weight)
        z, vjp = layer.vjp(torch.ones_like(x), weight, None)
        # z counts inputs: it is zero only for windows that lie wholly in the padding.
        return vjp(ratio(relevance, z, 0.0))


@dataclass(frozen=True)
class ZBox:
    """For inputs within low <= x <= high, as pixels are (Montavon, 2017).

    R_i = sum_j (x_i w_ij - low_i max(0, w_ij) - high_i min(0, w_ij)) R_j / (their sum). low, high:
    a number, or one per channel.
    """

    low: Numbers
    high: Numbers
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_number("epsilon", self.epsilon)
        for name in ("low", "high"):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                _check_number(name, one, -math.inf)
        low, high = np.atleast_1d(self.low), np.atleast_1d(self.high)
        if len(low) != len(high) and 1 not in (len(low), len(high)):
            raise InputError(f"low and high differ in channels: got {len(low)} and {len(high)}")
        if not bool((low < high).all()):
            raise InputError(f"low must be less than high: got bounds {self.low}, {self.high}")

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        low, high = (self._wide(name, layer, x) for name in ("low", "high"))
        weight, bias = layer.weight, layer.bias
        z, vjp = layer.vjp(x, weight, bias)
        below, vjp_low = layer.vjp(low, _positive(weight), _positive(bias))
        above, vjp_high = layer.vjp(high, _negative(weight), _negative(bias))
        cotangent = ratio(relevance, z - below - above, self.epsilon)
        return x * vjp(cotangent) - low * vjp_low(cotangent) - high * vjp_high(cotangent)

    def _wide(self, name: str, layer: Affine, x: Tensor) -> Tensor:
        bound = torch.as_tensor(getattr(self, name), dtype=x.dtype, device=x.device)
        count = x.shape[layer.channels]
        if bound.dim() == 1 and len(bound) != count:
            raise InputError(
                f"{name} of the box must be one number or one per channel: got {len(bound)}, the "
                f"first layer takes {count} channels"
            )
        shape = [1] * x.dim()
        shape[layer.channels] = -1
        return bound.view(shape).expand(x.shape)


@dataclass(frozen=True)
class Pass:
    """Relevance goes through unchanged, for layers whose output is shaped like their input."""

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        if relevance.shape != x.shape:
            raise InputError(
                f"the rule 'pass' needs a layer with outputs like its inputs: got "
                f"{tuple(relevance.shape)} for {tuple(x.shape)}"
            )
        return relevance


PROPAGATION_RULES: dict[str, type[Any]] = {
    "epsilon": Epsilon,
    "gamma": Gamma,
    "z_plus": ZPlus,
    "alpha_beta": AlphaBeta,
    "flat": Flat,
    "z_box": ZBox,
    "pass": Pass,
}


def read_rule(given: Any) -> PropagationRule:
    """A rule from itself, its name, or its name and parameters in order: ("gamma", 0.5)."""
    if type(given) in PROPAGATION_RULES.values():
        rule: PropagationRule = given
        return rule
    name, *parameters = given if isinstance(given, (tuple, list)) and given else (given,)
    if not isinstance(name, str) or name not in PROPAGATION_RULES:
        raise InputError(f"a rule must be one of {', '.join(PROPAGATION_RULES)}: got {name!r}")
    kind = PROPAGATION_RULES[name]
    names = [field.name for field in fields(kind)]
    if len(parameters) > len(names) or (kind is ZBox and len(parameters) < 2):
        raise InputError(
            f"the rule {name!r} takes the parameters {', '.join(names) or 'none'}: got {parameters}"
        )
    made: PropagationRule = kind(*parameters)
    return made
