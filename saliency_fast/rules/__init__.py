"""Backward rules: operators of a model pass back something else than their gradients."""

from saliency_fast.rules.deeplift import Rescale
from saliency_fast.rules.intercept import RulesMode
from saliency_fast.rules.lrp_operators import Composite, composite
from saliency_fast.rules.rectifiers import Deconv, Guided, Softplus

__all__ = ["Composite", "Deconv", "Guided", "Rescale", "RulesMode", "Softplus", "composite"]
