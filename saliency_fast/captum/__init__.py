"""The classes of Captum 0.9 on our engine: change the import, and nothing else."""

from saliency_fast.captum.attribution import (
    Attribution,
    GradientAttribution,
    PerturbationAttribution,
)
from saliency_fast.captum.gradient import InputXGradient, Saliency
from saliency_fast.captum.gradient_shap import GradientShap
from saliency_fast.captum.integrated_gradients import IntegratedGradients
from saliency_fast.captum.lime import KernelShap, Lime
from saliency_fast.captum.lime_base import LimeBase, get_exp_kernel_similarity_function
from saliency_fast.captum.noise_tunnel import NoiseTunnel
from saliency_fast.captum.perturbation import FeatureAblation, FeaturePermutation, Occlusion
from saliency_fast.captum.shapley import ShapleyValues, ShapleyValueSampling

__all__ = [
    "Attribution",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientAttribution",
    "GradientShap",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "Lime",
    "LimeBase",
    "NoiseTunnel",
    "Occlusion",
    "PerturbationAttribution",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
    "get_exp_kernel_similarity_function",
]
