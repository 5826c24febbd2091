"""The classes of Captum 0.9 on this library's engine: only the import changes."""

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
from saliency_fast.captum.deep_lift import (
    DeepLift,
    DeepLiftShap,
    LayerDeepLift,
    LayerDeepLiftShap,
    NeuronDeepLift,
    NeuronDeepLiftShap,
)
from saliency_fast.captum.gradients import (
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Saliency,
)
from saliency_fast.captum.lime import KernelShap, Lime, LimeBase, get_exp_kernel_similarity_function
from saliency_fast.captum.lrp import (
    LRP,
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    PropagationRule,
)
from saliency_fast.captum.noise import GradientShap, NoiseTunnel
from saliency_fast.captum.perturbation import (
    FeatureAblation,
    FeaturePermutation,
    Occlusion,
    ShapleyValues,
    ShapleyValueSampling,
)
from saliency_fast.captum.shared_calls import kept_apart

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
    """Names that only Captum has: its own, where it is installed; see `kept_apart`."""
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
