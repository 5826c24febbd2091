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

_MODULES = {
    "gradient": "gradient=Gradient input_x_gradient=InputXGradient guided_backprop=GuidedBackprop "
    "deconvolution=Deconvolution deeplift=DeepLift lrp=LRP",
    "paths": "integrated_gradients=IntegratedGradients blur_ig=BlurIG guided_ig=GuidedIG "
    "idgi=IDGI conductance=Conductance",
    "sampling": "smoothgrad=SmoothGrad smoothgrad_squared=SmoothGradSquared vargrad=VarGrad "
    "expected_gradients=ExpectedGradients gradient_shap=GradientShap",
    "hessian": "hessian_vector_product=HessianVectorProduct integrated_hessians=IntegratedHessians",
    "temporal": "temporal_rescaling=TemporalRescaling",
    "perturbation": "occlusion=Occlusion feature_ablation=FeatureAblation "
    "feature_permutation=FeaturePermutation rise=Rise",
    "coalitions": "lime=Lime kernel_shap=KernelShap shapley_sampling=ShapleySampling "
    "shapley_values=ShapleyValues",
    "attention": "attention_weights=AttentionWeights attention_rollout=AttentionRollout "
    "gradient_attention=GradientAttention",
    "cam": "grad_cam=GradCAM grad_cam_plus_plus=GradCAMPlusPlus xgrad_cam=XGradCAM "
    "layer_cam=LayerCAM hires_cam=HiResCAM eigen_cam=EigenCAM score_cam=ScoreCAM "
    "guided_grad_cam=GuidedGradCAM",
}
"""The methods of each module by name, and their classes: it is imported when one is first used."""
_LOCATIONS = {
    name: (module, kind)
    for module, pairs in _MODULES.items()
    for name, kind in (pair.split("=") for pair in pairs.split())
}


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
