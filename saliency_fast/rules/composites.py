"""Composites by name: which propagation rule of LRP is for which kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saliency_fast.errors import InputError
from saliency_fast.rules.lrp import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Numbers,
    PropagationRule,
    ZBox,
    ZPlus,
    read_rule,
)
from saliency_fast.rules.lrp_operators import Composite

_CONVOLUTION: dict[str, Callable[[float, float], PropagationRule]] = {
    "epsilon": lambda epsilon, gamma: Epsilon(epsilon),
    "z_plus": lambda epsilon, gamma: ZPlus(epsilon),
    "epsilon_plus": lambda epsilon, gamma: ZPlus(epsilon),
    "epsilon_plus_flat": lambda epsilon, gamma: ZPlus(epsilon),
    "epsilon_gamma": lambda epsilon, gamma: Gamma(gamma, epsilon),
    "epsilon_gamma_box": lambda epsilon, gamma: Gamma(gamma, epsilon),
    "epsilon_alpha2_beta1": lambda epsilon, gamma: AlphaBeta(2.0, 1.0, epsilon),
    "epsilon_alpha2_beta1_flat": lambda epsilon, gamma: AlphaBeta(2.0, 1.0, epsilon),
    "captum": lambda epsilon, gamma: Epsilon(epsilon),
}
"""The rule of convolutions in each composite, from (epsilon, gamma)."""
COMPOSITES = tuple(_CONVOLUTION)


def _box(bounds: Any, epsilon: float) -> ZBox:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputError(
            f"epsilon_gamma_box needs bounds=(low, high) of the input: got {bounds!r}; each is a "
            "number or one per channel, such as (0.0, 1.0) for pixels that are not normalised"
        )
    low, high = bounds
    return ZBox(low, high, epsilon)


def composite(
    name: str,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    bounds: tuple[Numbers, Numbers] | None = None,
    layers: tuple[Any, ...] = (),
    **options: str,
) -> Composite:
    """A composite by name; `layers`: (layer's name, rule as `read_rule` takes it) pairs."""
    if not isinstance(name, str) or name not in COMPOSITES:
        raise InputError(f"composite must be one of {', '.join(COMPOSITES)}: got {name!r}")
    are_pairs = isinstance(layers, (tuple, list)) and all(
        isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], str)
        for one in layers
    )
    if not are_pairs:
        raise InputError(
            f"layers must be (layer's name, rule) pairs such as (('head', 'flat'),): got {layers!r}"
        )
    # gamma is checked also where the composite has no such rule.
    Gamma(gamma, epsilon)
    first: PropagationRule | None = Flat() if name.endswith("_flat") else None
    if name.endswith("_box"):
        first = _box(bounds, epsilon)
    fields = {"norms": "epsilon", "pools": "epsilon"} if name == "captum" else {}
    return Composite(
        convolution=_CONVOLUTION[name](epsilon, gamma),
        linear=ZPlus(epsilon) if name == "z_plus" else Epsilon(epsilon),
        first=first,
        layers=tuple((layer, read_rule(rule)) for layer, rule in layers),
        epsilon=epsilon,
        **fields | options,
    )
