"""Backward rules: a model runs as it is, and its calls hand back something else than gradients."""

from saliency_fast.rules.composites import COMPOSITES, Composite, composite
from saliency_fast.rules.deeplift import CAPTUM, Rescale
from saliency_fast.rules.intercept import Ruling
from saliency_fast.rules.rectifiers import Deconv, Guided, Softplus
from saliency_fast.rules.shares import (
    SHARES,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    ZBox,
    ZPlus,
    read_share,
)

__all__ = [
    "CAPTUM",
    "COMPOSITES",
    "SHARES",
    "AlphaBeta",
    "Composite",
    "Deconv",
    "Epsilon",
    "Flat",
    "Gamma",
    "Guided",
    "Pass",
    "Rescale",
    "Ruling",
    "Softplus",
    "ZBox",
    "ZPlus",
    "composite",
    "read_share",
]
