"""Backward rules: operators of a model pass back something else than their gradients."""

from saliency_fast.rules.composites import COMPOSITES, composite
from saliency_fast.rules.deeplift import CAPTUM, Rescale
from saliency_fast.rules.intercept import RulesMode
from saliency_fast.rules.lrp import (
    PROPAGATION_RULES,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    ZBox,
    ZPlus,
    read_rule,
)
from saliency_fast.rules.lrp_operators import Composite
from saliency_fast.rules.rectifiers import Deconv, Guided, Softplus

__all__ = [
    "CAPTUM",
    "COMPOSITES",
    "PROPAGATION_RULES",
    "AlphaBeta",
    "Composite",
    "Deconv",
    "Epsilon",
    "Flat",
    "Gamma",
    "Guided",
    "Pass",
    "Rescale",
    "RulesMode",
    "Softplus",
    "ZBox",
    "ZPlus",
    "composite",
    "read_rule",
]
