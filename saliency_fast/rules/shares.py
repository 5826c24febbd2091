"""The rules of layer-wise relevance propagation: how a layer's relevance goes to its inputs.

Each rule is data and a formula: x [B, *] and the relevance of a layer's outputs in, the relevance
of its inputs out. Denominators z are kept off zero as z + sign(z) epsilon, with sign(0) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

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

    weight: None for layers without, which the rules by sign cannot serve. channels: the axis of
    the input's channels. outputs: the axis of the weight that numbers the outputs' channels, None
    where nothing can be merged into it.
    """

    call: Call
    weight: Tensor | None = None
    bias: Tensor | None = None
    channels: int = 1
    outputs: int | None = None

    def pulled(self, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        """Z = call(x, weight, bias), and the function from cotangents of z to those of x."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            z = self.call(leaf, weight, bias)

        def pull(cotangent: Tensor) -> Tensor:
            found: Tensor = gradients(z, leaf, cotangent)[0]
            return found

        return z.detach(), pull

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine | None:
        """The layer followed by scale [C] * z + shift [C], as one layer."""
        if self.weight is None or self.outputs is None:
            return None
        shape = [1] * self.weight.dim()
        shape[self.outputs] = -1
        bias = shift if self.bias is None else self.bias * scale + shift
        weight = self.weight * scale.view(shape)
        return Affine(self.call, weight, bias, self.channels, self.outputs)


class Share(Protocol):
    """A rule of relevance propagation."""

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor: ...


def ratio(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """R / (z + sign(z) epsilon) of the relevance R; without an epsilon, R / 0 is 0."""
    if epsilon == 0:
        return torch.where(z == 0, 0.0, relevance / z)
    # The sign of -0.0 does not matter: it is a sum of nothing but zeros.
    divisor = torch.copysign(torch.full((), epsilon, dtype=z.dtype, device=z.device), z)
    return relevance / divisor.add_(z)


def _check_epsilon(epsilon: object) -> None:
    _check_number("epsilon", epsilon, 0.0)


def _check_number(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputTypeError(f"{name} must be a number: got {value!r}")
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{name} must be a finite number of {least:g} or more: got {value}")


_BIASES = ("rule", "keep", "zero")


def _check_bias(bias: object) -> None:
    if bias not in _BIASES:
        raise InputError(f"bias must be one of {', '.join(_BIASES)}: got {bias!r}")


@dataclass(frozen=True)
class Epsilon:
    """R_i = x_i sum_j w_ij R_j / (z_j + sign(z_j) epsilon) (Bach, 2015); 0: the plain z rule.

    The bias and epsilon absorb their share.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        z, pull = layer.pulled(x, layer.weight, layer.bias)
        return x * pull(ratio(relevance, z, self.epsilon))


@dataclass(frozen=True)
class Gamma:
    """Contributions of the output's own sign count 1 + gamma times (Andeol, 2021).

    R_i = sum_j (c_ij + gamma max(0, c_ij)) R_j / sum_i (...) of c_ij = w_ij x_i where z_j >= 0, and
    with min in the place of max where z_j < 0: no denominator is smaller than z_j, whatever the
    signs of inputs and outputs. For inputs and outputs >= 0 these are weights w + gamma max(0, w)
    (Montavon, 2019). bias: "rule" (a contribution), "keep" (as it is) or "zero". signed: False
    takes those weights whatever the signs, as Captum does: denominators may then be close to zero.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6
    bias: str = "rule"
    signed: bool = True

    def __post_init__(self) -> None:
        _check_number("gamma", self.gamma, 0.0)
        _check_epsilon(self.epsilon)
        _check_bias(self.bias)

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        if not self.signed:
            raised = _raised(self.gamma, _positive)
            bias = _biased(self.bias, layer.bias, raised)
            return Epsilon(self.epsilon)(
                replace(layer, weight=raised(layer.weight), bias=bias), x, relevance
            )
        with torch.no_grad():
            negative = layer.call(x, layer.weight, layer.bias) < 0
        found = self._shared(layer, x, relevance.masked_fill(negative, 0.0), _positive, _negative)
        # On a GPU the look would wait for it.
        if x.is_cuda or bool(negative.any()):
            relevance = relevance.masked_fill(~negative, 0.0)
            found = found + self._shared(layer, x, relevance, _negative, _positive)
        return found

    def _shared(
        self, layer: Affine, x: Tensor, relevance: Tensor, same: Part, opposite: Part
    ) -> Tensor:
        """By contributions of which those of one sign are raised, `same` where x is positive."""
        raised = _raised(self.gamma, same)
        weights = raised(layer.weight), _raised(self.gamma, opposite)(layer.weight)
        bias = _biased(self.bias, layer.bias, raised)
        return _by_sign(layer, x, relevance, weights, bias, self.epsilon)


def _raised(gamma: float, part: Part) -> Part:
    """Values with gamma times a part of them added."""

    def raised(value: Tensor | None) -> Tensor | None:
        given = part(value)
        return None if value is None or given is None else torch.add(value, given, alpha=gamma)

    return raised


def _positive(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clamp(min=0)


def _negative(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clamp(max=0)


def _biased(kind: str, bias: Tensor | None, rule: Part) -> Tensor | None:
    if kind == "rule":
        return rule(bias)
    return bias if kind == "keep" else None


@dataclass(frozen=True)
class ZPlus:
    """Positive contributions alone share the relevance: alpha 1, beta 0 (Bach, 2015).

    bias: "rule" (its positive part counts), "keep" (all of it) or "zero". signed: where inputs are
    negative, negative weights contribute; False takes positive weights whatever the input's sign.
    """

    epsilon: float = 1e-6
    bias: str = "rule"
    signed: bool = True

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        _check_bias(self.bias)

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        bias = _biased(self.bias, layer.bias, _positive)
        if self.signed:
            return _signed(layer, x, relevance, 1, bias, self.epsilon)
        z, pull = layer.pulled(x, _positive(layer.weight), bias)
        return x * pull(ratio(relevance, z, self.epsilon))


def _signed(
    layer: Affine, x: Tensor, relevance: Tensor, sign: int, bias: Tensor | None, epsilon: float
) -> Tensor:
    """Relevance shared among the contributions w x of one sign."""
    weights = _positive(layer.weight), _negative(layer.weight)
    return _by_sign(layer, x, relevance, weights[::sign], bias, epsilon)


def _by_sign(
    layer: Affine,
    x: Tensor,
    relevance: Tensor,
    weights: tuple[Tensor | None, ...],
    bias: Tensor | None,
    epsilon: float,
) -> Tensor:
    """The epsilon rule with one weight for what is positive in x, another for what is negative."""
    high, low = x.clamp(min=0), x.clamp(max=0)
    z, pull = layer.pulled(high, weights[0], bias)
    # On a GPU the look would wait for it.
    if not x.is_cuda and not bool(low.any()):
        return high * pull(ratio(relevance, z, epsilon))
    z_low, pull_low = layer.pulled(low, weights[1], None)
    cotangent = ratio(relevance, z + z_low, epsilon)
    return high * pull(cotangent) + low * pull_low(cotangent)


@dataclass(frozen=True)
class AlphaBeta:
    """alpha times the shares of positive, less beta those of negative contributions (Bach, 2015).

    alpha - beta = 1, so that relevance is kept where there are contributions of both signs.
    """

    alpha: float = 2.0
    beta: float = 1.0
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, 0.0)
        _check_number("beta", self.beta, 0.0)
        _check_epsilon(self.epsilon)
        if not math.isclose(self.alpha - self.beta, 1.0):
            raise InputError(
                f"alpha - beta must be 1, or relevance is not conserved: got alpha {self.alpha}, "
                f"beta {self.beta}"
            )

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        gained = _signed(layer, x, relevance, 1, _positive(layer.bias), self.epsilon)
        if self.beta == 0:
            return self.alpha * gained
        lost = _signed(layer, x, relevance, -1, _negative(layer.bias), self.epsilon)
        return self.alpha * gained - self.beta * lost


@dataclass(frozen=True)
class Flat:
    """Every input of an output gets the same share (Lapuschkin, 2017; Montavon, 2019)."""

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        weight = None if layer.weight is None else torch.ones_like(layer.weight)
        z, pull = layer.pulled(torch.ones_like(x), weight, None)
        # Counts: only windows that lie in the padding as a whole have none.
        return pull(ratio(relevance, z, 0.0))


def _as_long(*several: tuple[float, ...]) -> list[tuple[float, ...]]:
    """One number stands for all channels."""
    longest = max(map(len, several))
    return [one * longest if len(one) == 1 else one for one in several]


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
        _check_epsilon(self.epsilon)
        for name in ("low", "high"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            object.__setattr__(self, name, value)
            for one in value if isinstance(value, tuple) else (value,):
                _check_number(name, one, -math.inf)
        low, high = (one if isinstance(one, tuple) else (one,) for one in (self.low, self.high))
        if len(low) != len(high) and 1 not in (len(low), len(high)):
            raise InputError(f"low and high differ in channels: got {len(low)} and {len(high)}")
        if not all(a < b for a, b in zip(*_as_long(low, high), strict=True)):
            raise InputError(f"low must be less than high: got bounds {self.low}, {self.high}")

    def __call__(self, layer: Affine, x: Tensor, relevance: Tensor) -> Tensor:
        low, high = (self._wide(name, layer, x) for name in ("low", "high"))
        weight, bias = layer.weight, layer.bias
        z, pull = layer.pulled(x, weight, bias)
        below, pull_low = layer.pulled(low, _positive(weight), _positive(bias))
        above, pull_high = layer.pulled(high, _negative(weight), _negative(bias))
        cotangent = ratio(relevance, z - below - above, self.epsilon)
        return x * pull(cotangent) - low * pull_low(cotangent) - high * pull_high(cotangent)

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


SHARES: dict[str, type[Any]] = {
    "epsilon": Epsilon,
    "gamma": Gamma,
    "z_plus": ZPlus,
    "alpha_beta": AlphaBeta,
    "flat": Flat,
    "z_box": ZBox,
    "pass": Pass,
}


def read_share(given: Any) -> Share:
    """A rule from itself, its name, or its name and parameters in order: ("gamma", 0.5)."""
    if type(given) in SHARES.values():
        found: Share = given
        return found
    name, *parameters = given if isinstance(given, (tuple, list)) and given else (given,)
    if not isinstance(name, str) or name not in SHARES:
        raise InputError(f"a rule must be one of {', '.join(SHARES)}: got {name!r}")
    kind = SHARES[name]
    names = [field.name for field in fields(kind)]
    if len(parameters) > len(names) or (kind is ZBox and len(parameters) < 2):
        raise InputError(
            f"the rule {name!r} takes the parameters {', '.join(names) or 'none'}: got {parameters}"
        )
    made: Share = kind(*parameters)
    return made
