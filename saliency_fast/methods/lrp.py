"""Layer-wise relevance propagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saliency_fast.engine.recipe import Itself, Recipe, WeightedSum
from saliency_fast.errors import InputError
from saliency_fast.methods.gradient import at_input
from saliency_fast.rules import Composite, composite

BOUNDED = "epsilon_gamma_box"
"""The composite that looks at the input's bounds."""


@dataclass(frozen=True)
class LRP:
    """The score, shared out from layer to layer down to the input (Bach, 2015).

    composite: which rule holds for which kind of layer, see `model.rules.COMPOSITES`. epsilon,
    gamma: of its rules. bounds: (low, high) of the input, for the box rule; numbers, or one per
    channel each. layers: (layer's name, rule) pairs that win over the composite, a rule as its name
    or with its parameters: ("features.0", "flat"), ("head", ("epsilon", 0.1)). softmax: attention
    weights get relevance by softmax's "taylor" expansion, or are "constant".
    """

    composite: str = "epsilon_plus"
    epsilon: float = 1e-6
    gamma: float = 0.25
    bounds: tuple[Any, Any] | None = None
    layers: tuple[tuple[str, Any], ...] = ()
    softmax: str = "taylor"
    name = "lrp"

    def __post_init__(self) -> None:
        # Records hold lists where tuples were.
        for field in ("bounds", "layers"):
            object.__setattr__(self, field, _tuples(getattr(self, field)))
        if self.bounds is not None and self.composite != BOUNDED:
            raise InputError(
                f"bounds are for {BOUNDED}: got {self.bounds!r} with composite {self.composite!r}; "
                f"leave them out, or name a layer's rule: (layer, ('z_box', low, high))"
            )
        self._rules()

    def _rules(self) -> Composite:
        options = {"softmax": self.softmax}
        return composite(
            self.composite, self.epsilon, self.gamma, self.bounds, self.layers, **options
        )

    def recipe(self) -> Recipe:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=self._rules())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
