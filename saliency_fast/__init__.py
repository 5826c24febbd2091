"""Exact attribution for PyTorch: Integrated Gradients, SmoothGrad and their family, fused."""

from saliency_fast.api import Engine, explain
from saliency_fast.attribution import Attribution, load
from saliency_fast.engine import Plan
from saliency_fast.methods import (
    ExpectedGradients,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from saliency_fast.ops import backends
from saliency_fast.replay import Replay, replay
from saliency_fast.version import __version__

__all__ = [
    "Attribution",
    "Engine",
    "ExpectedGradients",
    "Gradient",
    "InputXGradient",
    "IntegratedGradients",
    "Plan",
    "Replay",
    "SmoothGrad",
    "SmoothGradSquared",
    "VarGrad",
    "__version__",
    "backends",
    "explain",
    "load",
    "replay",
]
