"""Named recipes: each method is a small frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from saliency_fast.methods.ablation import FeatureAblation, FeaturePermutation
    from saliency_fast.methods.attention import (
        AttentionRollout,
        AttentionWeights,
        GradientAttention,
    )
    from saliency_fast.methods.backward import Deconvolution, GuidedBackprop
    from saliency_fast.methods.blur_ig import BlurIG
    from saliency_fast.methods.cam import (
        EigenCAM,
        GradCAM,
        GradCAMPlusPlus,
        HiResCAM,
        LayerCAM,
        XGradCAM,
    )
    from saliency_fast.methods.conductance import Conductance
    from saliency_fast.methods.deeplift import DeepLift
    from saliency_fast.methods.expected_gradients import ExpectedGradients, GradientShap
    from saliency_fast.methods.gradient import Gradient, InputXGradient
    from saliency_fast.methods.guided_grad_cam import GuidedGradCAM
    from saliency_fast.methods.guided_ig import GuidedIG
    from saliency_fast.methods.hessian import HessianVectorProduct, IntegratedHessians
    from saliency_fast.methods.idgi import IDGI
    from saliency_fast.methods.integrated_gradients import IntegratedGradients
    from saliency_fast.methods.lrp import LRP
    from saliency_fast.methods.occlusion import Occlusion
    from saliency_fast.methods.rise import Rise
    from saliency_fast.methods.score_cam import ScoreCAM
    from saliency_fast.methods.shapley import ShapleySampling, ShapleyValues
    from saliency_fast.methods.smoothgrad import SmoothGrad, SmoothGradSquared, VarGrad
    from saliency_fast.methods.surrogates import KernelShap, Lime
    from saliency_fast.methods.temporal import TemporalRescaling

_PLACES = {
    "gradient": ("gradient", "Gradient"),
    "input_x_gradient": ("gradient", "InputXGradient"),
    "integrated_gradients": ("integrated_gradients", "IntegratedGradients"),
    "smoothgrad": ("smoothgrad", "SmoothGrad"),
    "smoothgrad_squared": ("smoothgrad", "SmoothGradSquared"),
    "vargrad": ("smoothgrad", "VarGrad"),
    "expected_gradients": ("expected_gradients", "ExpectedGradients"),
    "gradient_shap": ("expected_gradients", "GradientShap"),
    "blur_ig": ("blur_ig", "BlurIG"),
    "guided_ig": ("guided_ig", "GuidedIG"),
    "idgi": ("idgi", "IDGI"),
    "conductance": ("conductance", "Conductance"),
    "hessian_vector_product": ("hessian", "HessianVectorProduct"),
    "integrated_hessians": ("hessian", "IntegratedHessians"),
    "temporal_rescaling": ("temporal", "TemporalRescaling"),
    "occlusion": ("occlusion", "Occlusion"),
    "feature_ablation": ("ablation", "FeatureAblation"),
    "feature_permutation": ("ablation", "FeaturePermutation"),
    "rise": ("rise", "Rise"),
    "lime": ("surrogates", "Lime"),
    "kernel_shap": ("surrogates", "KernelShap"),
    "shapley_sampling": ("shapley", "ShapleySampling"),
    "shapley_values": ("shapley", "ShapleyValues"),
    "guided_backprop": ("backward", "GuidedBackprop"),
    "deconvolution": ("backward", "Deconvolution"),
    "deeplift": ("deeplift", "DeepLift"),
    "lrp": ("lrp", "LRP"),
    "attention_weights": ("attention", "AttentionWeights"),
    "attention_rollout": ("attention", "AttentionRollout"),
    "gradient_attention": ("attention", "GradientAttention"),
    "grad_cam": ("cam", "GradCAM"),
    "grad_cam_plus_plus": ("cam", "GradCAMPlusPlus"),
    "xgrad_cam": ("cam", "XGradCAM"),
    "layer_cam": ("cam", "LayerCAM"),
    "hires_cam": ("cam", "HiResCAM"),
    "eigen_cam": ("cam", "EigenCAM"),
    "score_cam": ("score_cam", "ScoreCAM"),
    "guided_grad_cam": ("guided_grad_cam", "GuidedGradCAM"),
}
"""Where methods are, by name: a program imports those that it uses."""
_CLASSES = {kind: place for place, kind in _PLACES.values()}


class _Methods(Mapping[str, "type[Any]"]):
    """Every method by its name."""

    def __getitem__(self, name: str) -> type[Any]:
        found: type[Any] = __getattr__(_PLACES[name][1])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


METHODS: Mapping[str, type[Any]] = _Methods()


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)


def read_method(method: Method | str) -> Method:
    """A method from itself or its name; an unknown name lists the valid ones."""
    if isinstance(method, str):
        return make_method(method, {})
    if isinstance(method, type) and callable(getattr(method, "recipe", None)):
        raise InputTypeError(
            f"method must be a method itself: got the class {method.__name__}; make one with "
            f"{method.__name__}()"
        )
    if not callable(getattr(method, "recipe", None)):
        raise InputTypeError(
            f"method must be a name or a method such as IntegratedGradients(): got {method!r}"
        )
    return method


def make_method(name: str, parameters: dict[str, Any]) -> Method:
    """A method by name with its fields, as a record or the command line gives them."""
    if name not in METHODS:
        near = get_close_matches(str(name), METHODS, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise InputError(f"method must be one of {', '.join(METHODS)}: got {name!r}{hint}")
    kind = METHODS[name]
    valid = tuple(field.name for field in dataclasses.fields(kind))
    for one in parameters:
        if one not in valid:
            raise InputError(
                f"{name} has no field {one!r}: expected one of {', '.join(valid) or 'none'}"
            )
    given = {field: _made(value) for field, value in parameters.items()}
    made: Method = kind(**given)
    return made


def _made(value: Any) -> Any:
    """A method within a method, from what a record holds of it."""
    if isinstance(value, dict):
        return make_method(value["method"], value["parameters"])
    return tuple(value) if isinstance(value, list) else value


__all__ = [
    "IDGI",
    "LRP",
    "METHODS",
    "AttentionRollout",
    "AttentionWeights",
    "BlurIG",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "EigenCAM",
    "ExpectedGradients",
    "FeatureAblation",
    "FeaturePermutation",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientAttention",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCAM",
    "GuidedIG",
    "HessianVectorProduct",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "IntegratedHessians",
    "KernelShap",
    "LayerCAM",
    "Lime",
    "Occlusion",
    "Rise",
    "ScoreCAM",
    "ShapleySampling",
    "ShapleyValues",
    "SmoothGrad",
    "SmoothGradSquared",
    "TemporalRescaling",
    "VarGrad",
    "XGradCAM",
    "make_method",
    "read_method",
]
