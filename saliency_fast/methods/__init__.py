"""Attribution methods by name: each is a small frozen dataclass whose recipe the engine runs.

Making a method raises InputError or InputTypeError for a field that has another type or is out of
range.
"""

# ruff: noqa: F403

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from saliency_fast.engine.recipe import Method
from saliency_fast.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from saliency_fast.methods.attention import *
    from saliency_fast.methods.cam import *
    from saliency_fast.methods.coalitions import *
    from saliency_fast.methods.gradient import *
    from saliency_fast.methods.hessian import *
    from saliency_fast.methods.paths import *
    from saliency_fast.methods.perturbation import *
    from saliency_fast.methods.sampling import *
    from saliency_fast.methods.temporal import *

_LOCATIONS = {
    "gradient": ("gradient", "Gradient"),
    "input_x_gradient": ("gradient", "InputXGradient"),
    "integrated_gradients": ("paths", "IntegratedGradients"),
    "smoothgrad": ("sampling", "SmoothGrad"),
    "smoothgrad_squared": ("sampling", "SmoothGradSquared"),
    "vargrad": ("sampling", "VarGrad"),
    "expected_gradients": ("sampling", "ExpectedGradients"),
    "gradient_shap": ("sampling", "GradientShap"),
    "blur_ig": ("paths", "BlurIG"),
    "guided_ig": ("paths", "GuidedIG"),
    "idgi": ("paths", "IDGI"),
    "conductance": ("paths", "Conductance"),
    "hessian_vector_product": ("hessian", "HessianVectorProduct"),
    "integrated_hessians": ("hessian", "IntegratedHessians"),
    "temporal_rescaling": ("temporal", "TemporalRescaling"),
    "occlusion": ("perturbation", "Occlusion"),
    "feature_ablation": ("perturbation", "FeatureAblation"),
    "feature_permutation": ("perturbation", "FeaturePermutation"),
    "rise": ("perturbation", "Rise"),
    "lime": ("coalitions", "Lime"),
    "kernel_shap": ("coalitions", "KernelShap"),
    "shapley_sampling": ("coalitions", "ShapleySampling"),
    "shapley_values": ("coalitions", "ShapleyValues"),
    "guided_backprop": ("gradient", "GuidedBackprop"),
    "deconvolution": ("gradient", "Deconvolution"),
    "deeplift": ("gradient", "DeepLift"),
    "lrp": ("gradient", "LRP"),
    "attention_weights": ("attention", "AttentionWeights"),
    "attention_rollout": ("attention", "AttentionRollout"),
    "gradient_attention": ("attention", "GradientAttention"),
    "grad_cam": ("cam", "GradCAM"),
    "grad_cam_plus_plus": ("cam", "GradCAMPlusPlus"),
    "xgrad_cam": ("cam", "XGradCAM"),
    "layer_cam": ("cam", "LayerCAM"),
    "hires_cam": ("cam", "HiResCAM"),
    "eigen_cam": ("cam", "EigenCAM"),
    "score_cam": ("cam", "ScoreCAM"),
    "guided_grad_cam": ("cam", "GuidedGradCAM"),
}
"""The module and the class of each method by name: a module is imported when it is first used."""


class _Methods(Mapping[str, "type[Any]"]):
    def __getitem__(self, name: str) -> type[Any]:
        module, kind = _LOCATIONS[name]
        method: type[Any] = getattr(import_module(f"{__name__}.{module}"), kind)
        return method

    def __iter__(self) -> Iterator[str]:
        return iter(_LOCATIONS)

    def __len__(self) -> int:
        return len(_LOCATIONS)


METHODS: Mapping[str, type[Any]] = _Methods()


def __getattr__(name: str) -> Any:
    for method, (_, kind) in _LOCATIONS.items():
        if kind == name:
            return METHODS[method]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_method(method: Method | str) -> Method:
    """A method from itself or its name; an unknown name lists the valid ones."""
    if isinstance(method, str):
        return make_method(method, {})
    if not callable(getattr(method, "recipe", None)):
        raise InputTypeError(
            f"method must be a name or a method such as IntegratedGradients(): got {method!r}"
        )
    if isinstance(method, type):
        raise InputTypeError(
            f"method must be a method itself: got the class {method.__name__}; make one with "
            f"{method.__name__}()"
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
    made: Method = kind(**{field: _parsed(value) for field, value in parameters.items()})
    return made


def _parsed(value: Any) -> Any:
    """A field's value from that in a record, which holds methods as dicts and tuples as lists."""
    if isinstance(value, dict):
        return make_method(value["method"], value["parameters"])
    return tuple(value) if isinstance(value, list) else value
