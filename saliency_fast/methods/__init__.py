"""Named recipes: each method is a small frozen dataclass."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any

from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, InputTypeError
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

METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (
        Gradient,
        InputXGradient,
        IntegratedGradients,
        SmoothGrad,
        SmoothGradSquared,
        VarGrad,
        ExpectedGradients,
        GradientShap,
        BlurIG,
        GuidedIG,
        IDGI,
        Conductance,
        HessianVectorProduct,
        IntegratedHessians,
        TemporalRescaling,
        Occlusion,
        FeatureAblation,
        FeaturePermutation,
        Rise,
        Lime,
        KernelShap,
        ShapleySampling,
        ShapleyValues,
        GuidedBackprop,
        Deconvolution,
        DeepLift,
        LRP,
        AttentionWeights,
        AttentionRollout,
        GradientAttention,
        GradCAM,
        GradCAMPlusPlus,
        XGradCAM,
        LayerCAM,
        HiResCAM,
        EigenCAM,
        ScoreCAM,
        GuidedGradCAM,
    )
}


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
