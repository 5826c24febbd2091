"""Composites: which rule of relevance propagation holds for which kind of layer."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from saliency_fast.errors import InputError
from saliency_fast.rules import layers, products, single
from saliency_fast.rules.intercept import Ruling
from saliency_fast.rules.relevance import Relevance, Settings
from saliency_fast.rules.shares import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Numbers,
    Share,
    ZBox,
    ZPlus,
    read_share,
)

_EPSILON = Epsilon()
TABLE = {**single.TABLE, **layers.TABLE, **products.TABLE}


@dataclass(frozen=True)
class Composite:
    """Layer-wise relevance propagation by the kind of layer.

    convolution, linear: rules of layers with weights; first: of those that see the input before
    any other. layers: (name, rule) pairs for layers by name, or all within one; they win. epsilon:
    of sums, means, norms and additions. norms: batch normalisation is "merge"d into the layer
    before it, or shared by the "epsilon" rule as a layer of its own. pools: a maximum's relevance
    goes to the "winner", or by the "epsilon" rule. softmax: by its "taylor" expansion (Achtibat,
    2024), or "constant": attention weights get none (Ali, 2022).
    """

    convolution: Share = _EPSILON
    linear: Share = _EPSILON
    first: Share | None = None
    layers: tuple[tuple[str, Share], ...] = ()
    epsilon: float = 1e-6
    norms: str = "merge"
    pools: str = "winner"
    softmax: str = "taylor"
    name: ClassVar[str] = "LRP"
    references: ClassVar[bool] = False
    relevance: ClassVar[bool] = True
    unmet: ClassVar[str] = ""

    def __post_init__(self) -> None:
        Epsilon(self.epsilon)
        for field, valid in (
            ("norms", ("merge", "epsilon")),
            ("pools", ("winner", "epsilon")),
            ("softmax", ("taylor", "constant")),
        ):
            if getattr(self, field) not in valid:
                raise InputError(
                    f"{field} must be one of {', '.join(valid)}: got {getattr(self, field)!r}"
                )

    def calls(self, model: Callable[..., Any] | None = None) -> Ruling:
        settings = Settings(self.epsilon, self.norms, self.pools, self.softmax)
        return Relevance(TABLE, settings, self._kind, self.first, named_rules(model, self.layers))

    def _kind(self, name: str) -> Share:
        return self.convolution if name.startswith("conv") else self.linear


def named_rules(
    model: Callable[..., Any] | None, layers: tuple[tuple[str, Share], ...]
) -> dict[int, Share]:
    """The rules of layers by name, by the identity of the layers' weights."""
    found: dict[int, Share] = {}
    if not layers:
        return found
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for wanted, rule in layers:
        own = [m for name, m in modules.items() if name == wanted or name.startswith(f"{wanted}.")]
        if not own:
            near = difflib.get_close_matches(wanted, modules, 3)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "see named_modules()"
            raise InputError(f"layers: the model has no layer {wanted!r}; {hint}")
        weights = [w for m in own for w in (*m.parameters(False), *m.buffers(False))]
        if not weights:
            raise InputError(
                f"layers: {wanted!r} has no weights, and rules by name are for layers with weights"
            )
        found |= dict.fromkeys(map(id, weights), rule)
    return found


def _epsilon(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return {"convolution": Epsilon(epsilon), "linear": Epsilon(epsilon)}


def _epsilon_plus(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return {"convolution": ZPlus(epsilon), "linear": Epsilon(epsilon)}


def _epsilon_plus_flat(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return _epsilon_plus(epsilon, gamma, bounds) | {"first": Flat()}


def _epsilon_gamma(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return {"convolution": Gamma(gamma, epsilon), "linear": Epsilon(epsilon)}


def _epsilon_gamma_box(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputError(
            f"epsilon_gamma_box needs bounds=(low, high) of the input: got {bounds!r}; each is a "
            "number or one per channel, such as (0.0, 1.0) for pixels that are not normalised"
        )
    low, high = bounds
    return _epsilon_gamma(epsilon, gamma, bounds) | {"first": ZBox(low, high, epsilon)}


def _epsilon_alpha2_beta1(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return {"convolution": AlphaBeta(2.0, 1.0, epsilon), "linear": Epsilon(epsilon)}


def _epsilon_alpha2_beta1_flat(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return _epsilon_alpha2_beta1(epsilon, gamma, bounds) | {"first": Flat()}


def _z_plus(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return {"convolution": ZPlus(epsilon), "linear": ZPlus(epsilon)}


def _captum(epsilon: float, gamma: float, bounds: Any) -> dict[str, Any]:
    return _epsilon(epsilon, gamma, bounds) | {"norms": "epsilon", "pools": "epsilon"}


COMPOSITES: dict[str, Callable[[float, float, Any], dict[str, Any]]] = {
    "epsilon": _epsilon,
    "z_plus": _z_plus,
    "epsilon_plus": _epsilon_plus,
    "epsilon_plus_flat": _epsilon_plus_flat,
    "epsilon_gamma": _epsilon_gamma,
    "epsilon_gamma_box": _epsilon_gamma_box,
    "epsilon_alpha2_beta1": _epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": _epsilon_alpha2_beta1_flat,
    "captum": _captum,
}
"""Composites by name: (epsilon, gamma, bounds of the input) -> fields of a Composite."""


def _is_pair(one: object) -> bool:
    return isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], str)


def composite(
    name: str,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bounds: tuple[Numbers, Numbers] | None = None,
    layers: tuple[Any, ...] = (),
    **options: str,
) -> Composite:
    """A composite by name; `layers`: (layer's name, rule as `read_share` takes it) pairs."""
    if not isinstance(name, str) or name not in COMPOSITES:
        raise InputError(f"composite must be one of {', '.join(COMPOSITES)}: got {name!r}")
    if not isinstance(layers, (tuple, list)) or not all(map(_is_pair, layers)):
        raise InputError(
            f"layers must be (layer's name, rule) pairs such as (('head', 'flat'),): got {layers!r}"
        )
    # Also where the composite has no such rule.
    Gamma(gamma, epsilon)
    named = tuple((layer, read_share(rule)) for layer, rule in layers)
    parts = COMPOSITES[name](epsilon, gamma, bounds) | options
    return Composite(**parts, layers=named, epsilon=epsilon)
