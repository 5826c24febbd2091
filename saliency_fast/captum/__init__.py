"""The classes of Captum 0.9 on our engine: change the import, and nothing else."""

from importlib import import_module
from typing import Any

from saliency_fast.captum import visualization
from saliency_fast.captum.attribution import (
    Attribution,
    GradientAttribution,
    LayerAttribution,
    NeuronAttribution,
    PerturbationAttribution,
)
from saliency_fast.captum.deep_lift import DeepLift, DeepLiftShap
from saliency_fast.captum.gradient import InputXGradient, Saliency
from saliency_fast.captum.gradient_shap import GradientShap
from saliency_fast.captum.guided import Deconvolution, GuidedBackprop, GuidedGradCam
from saliency_fast.captum.integrated_gradients import IntegratedGradients
from saliency_fast.captum.layer import LayerActivation, LayerGradCam, LayerGradientXActivation
from saliency_fast.captum.layer_conductance import LayerConductance
from saliency_fast.captum.layer_deep_lift import LayerDeepLift, LayerDeepLiftShap
from saliency_fast.captum.layer_integrated_gradients import LayerIntegratedGradients
from saliency_fast.captum.lime import KernelShap, Lime
from saliency_fast.captum.lime_base import LimeBase, get_exp_kernel_similarity_function
from saliency_fast.captum.lrp import LRP
from saliency_fast.captum.lrp_rules import (
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    PropagationRule,
)
from saliency_fast.captum.neuron_deep_lift import NeuronDeepLift, NeuronDeepLiftShap
from saliency_fast.captum.noise_tunnel import NoiseTunnel
from saliency_fast.captum.perturbation import FeatureAblation, FeaturePermutation, Occlusion
from saliency_fast.captum.shapley import ShapleyValues, ShapleyValueSampling
from saliency_fast.captum.theirs import kept_apart

__all__ = [
    "LRP",
    "Alpha1_Beta0_Rule",
    "Attribution",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "EpsilonRule",
    "FeatureAblation",
    "FeaturePermutation",
    "GammaRule",
    "GradientAttribution",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "IdentityRule",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerActivation",
    "LayerAttribution",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerGradCam",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "Lime",
    "LimeBase",
    "NeuronAttribution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NoiseTunnel",
    "Occlusion",
    "PerturbationAttribution",
    "PropagationRule",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
    "get_exp_kernel_similarity_function",
    "visualization",
]


def __getattr__(name: str) -> Any:
    """A name that Captum has and we do not is Captum's own, where it is installed, or a child that
    keeps copies of a batch apart where they meet.
    """
    missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        theirs = import_module("captum.attr")
    except ImportError:
        raise AttributeError(
            f"{missing}; if it is Captum's, install captum, and its own is taken"
        ) from None
    if name not in theirs.__all__:
        raise missing
    return kept_apart(getattr(theirs, name))
