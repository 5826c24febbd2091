"""Methods of one point, the input itself: gradients, and backward rules in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saliency_fast.engine.points import Line
from saliency_fast.engine.recipe import Itself, Level, WeightedSum
from saliency_fast.errors import InputError
from saliency_fast.methods.parts import checks
from saliency_fast.rules.deeplift import Rescale
from saliency_fast.rules.lrp_operators import Composite, composite
from saliency_fast.rules.rectifiers import Deconv, Guided

BOUNDED = "epsilon_gamma_box"
"""The composite whose first rule needs the bounds of the input."""


def at_input() -> tuple[Level]:
    """One point of weight one: alpha = 1 on the line from zero."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return (Level(one, one, torch.zeros(1, dtype=torch.int64, device="cpu")),)


@dataclass(frozen=True)
class Gradient:
    """Gradient of the score at the input (Simonyan, 2013).

    Args:
        absolute: Whether values are absolute values.

    Example:
        >>> import torch, saliency_fast as sf
        >>> model = torch.nn.Linear(4, 3)
        >>> att = sf.explain(model, torch.ones(2, 4), target=1, method=sf.Gradient())
        >>> torch.equal(att.values[0], model.weight[1].detach())
        True
    """

    absolute: bool = False
    name = "gradient"

    def __post_init__(self) -> None:
        checks.boolean("absolute", self.absolute)

    def recipe(self) -> WeightedSum:
        reduction = "absolute" if self.absolute else "sum"
        return WeightedSum(Line(), at_input(), reduction, at_input=True)


@dataclass(frozen=True)
class InputXGradient:
    """Input times the gradient of the score there (Shrikumar, 2016).

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[1.0, 2.0]]), sf.InputXGradient()
        >>> sf.explain(lambda x: x.square().sum(1), x, method=method).values
        tensor([[2., 8.]])
    """

    name = "input_x_gradient"

    def recipe(self) -> WeightedSum:
        return WeightedSum(Line(), at_input(), factor="input", at_input=True)


@dataclass(frozen=True)
class GuidedBackprop:
    """Gradient in which each ReLU passes back positive values alone (Springenberg, 2015).

    Maps look sharp because they recover edges of the image, more than what the class depends on:
    they change little when the weights are random (Adebayo, 2018; Nie, 2018).

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[-1.0, 2.0]]), sf.GuidedBackprop()
        >>> sf.explain(lambda x: x.relu().sum(1), x, method=method).values
        tensor([[0., 1.]])
    """

    name = "guided_backprop"

    def recipe(self) -> WeightedSum:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=Guided())


@dataclass(frozen=True)
class Deconvolution:
    """Gradient in which each ReLU passes back max(0, gradient), whatever its input (Zeiler, 2014).

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[-1.0, 2.0]]), sf.Deconvolution()
        >>> sf.explain(lambda x: x.relu().sum(1), x, method=method).values
        tensor([[1., 1.]])
    """

    name = "deconvolution"

    def recipe(self) -> WeightedSum:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=Deconv())


@dataclass(frozen=True)
class DeepLift:
    """(Input - baseline) times DeepLIFT's multipliers by the rescale rule (Shrikumar, 2017).

    Args:
        epsilon: Change of a nonlinearity's input below which its gradient is the multiplier.
        multiply: False gives the multipliers alone, without baseline scores and delta.
        captum: Whether to depart from the paper as Captum's DeepLift does, for equal numbers; see
            `saliency_fast.rules.Rescale`.

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[-1.0, 2.0]]), sf.DeepLift()
        >>> sf.explain(lambda x: x.relu().sum(1), x, method=method, baseline=1.0).values
        tensor([[-1.,  1.]])
    """

    epsilon: float = 1e-10
    multiply: bool = True
    captum: bool = False
    name = "deeplift"

    def __post_init__(self) -> None:
        checks.fields(self, epsilon=checks.positive, multiply=checks.boolean, captum=checks.boolean)

    def recipe(self) -> WeightedSum:
        rules = Rescale(float(self.epsilon), self.captum)
        # Multipliers alone add up to nothing.
        factor, ends = ("difference", True) if self.multiply else ("none", False)
        about: dict[str, Any] = {"baseline": "one", "ends": ends, "at_input": True}
        return WeightedSum(Itself(), at_input(), factor=factor, rules=rules, **about)


@dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation of the score down to the input (Bach, 2015).

    Args:
        composite: Which rule is for which kind of layer: "epsilon", "z_plus", "epsilon_plus",
            "epsilon_plus_flat", "epsilon_gamma", "epsilon_gamma_box", "epsilon_alpha2_beta1",
            "epsilon_alpha2_beta1_flat" or "captum".
        epsilon: Stabiliser of the denominators.
        gamma: Extra weight of contributions that have the output's sign, in the gamma rule.
        bounds: (low, high) of the input for "epsilon_gamma_box", each a number or one per channel.
        layers: (layer's name, rule) pairs that win over the composite. A rule is a name or a name
            with parameters: ("features.0", "flat"), ("head", ("epsilon", 0.1)).
        softmax: "taylor" expands softmax at its input (Achtibat, 2024), "constant" gives attention
            weights no relevance (Ali, 2022).

    Example:
        >>> import torch, saliency_fast as sf
        >>> x, method = torch.tensor([[-1.0, 2.0]]), sf.LRP("epsilon")
        >>> sf.explain(torch.nn.ReLU(), x, target=1, method=method).values
        tensor([[0., 2.]])
    """

    composite: str = "epsilon_plus"
    epsilon: float = 1e-6
    gamma: float = 0.25
    bounds: tuple[Any, Any] | None = None
    layers: tuple[tuple[str, Any], ...] = ()
    softmax: str = "taylor"
    name = "lrp"

    def __post_init__(self) -> None:
        # Records hold lists in the place of tuples.
        for field in ("bounds", "layers"):
            object.__setattr__(self, field, _tuples(getattr(self, field)))
        if self.bounds is not None and self.composite != BOUNDED:
            raise InputError(
                f"bounds are for {BOUNDED}: got {self.bounds!r} with composite {self.composite!r}; "
                f"leave them out, or name a layer's rule: (layer, ('z_box', low, high))"
            )
        self._rules()

    def _rules(self) -> Composite:
        about = self.composite, self.epsilon, self.gamma, self.bounds, self.layers
        return composite(*about, softmax=self.softmax)

    def recipe(self) -> WeightedSum:
        return WeightedSum(Itself(), at_input(), at_input=True, rules=self._rules())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
