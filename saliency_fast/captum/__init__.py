"""The classes of Captum 0.9 on this library's engine: only the import changes.

Editors and type checkers read the signatures in `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "attribution": "Attribution GradientAttribution LayerAttribution NeuronAttribution "
    "PerturbationAttribution",
    "gradients": "Deconvolution DeepLift DeepLiftShap GuidedBackprop GuidedGradCam InputXGradient "
    "IntegratedGradients LayerActivation LayerConductance LayerDeepLift LayerDeepLiftShap "
    "LayerGradCam LayerGradientXActivation LayerIntegratedGradients NeuronDeepLift "
    "NeuronDeepLiftShap Saliency",
    "lime": "KernelShap Lime LimeBase get_exp_kernel_similarity_function",
    "lrp": "LRP Alpha1_Beta0_Rule EpsilonRule GammaRule IdentityRule PropagationRule",
    "noise": "GradientShap NoiseTunnel",
    "perturbation": "FeatureAblation FeaturePermutation Occlusion ShapleyValueSampling "
    "ShapleyValues",
    **dict.fromkeys(("forms", "layers", "shared_calls", "visualization"), ""),
}
"""The public names in each module, which is imported when the first of them is used."""
_LOCATIONS = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_LOCATIONS, "visualization"])


def __getattr__(name: str) -> Any:
    """A class of this package; of names that only Captum has its own, where it is installed."""
    if name in _LOCATIONS:
        return getattr(import_module(f"{__name__}.{_LOCATIONS[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
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
    kept_apart = import_module(f"{__name__}.shared_calls").kept_apart
    return kept_apart(getattr(theirs, name))
