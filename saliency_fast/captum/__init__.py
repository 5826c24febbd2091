"""The classes of Captum 0.9 on our engine: change the import, and nothing else."""

from saliency_fast.captum.attribution import (
    Attribution,
    GradientAttribution,
    PerturbationAttribution,
)
from saliency_fast.captum.gradient import InputXGradient, Saliency
from saliency_fast.captum.gradient_shap import GradientShap
from saliency_fast.captum.integrated_gradients import IntegratedGradients
from saliency_fast.captum.noise_tunnel import NoiseTunnel

__all__ = [
    "Attribution",
    "GradientAttribution",
    "GradientShap",
    "InputXGradient",
    "IntegratedGradients",
    "NoiseTunnel",
    "PerturbationAttribution",
    "Saliency",
]
