"""Exact attribution for PyTorch: Integrated Gradients, SmoothGrad and their family, fused."""

# ruff: noqa: F403, F405

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Else the interpreter looks through all of PyTorch's objects twice meanwhile, which takes half as
# long as the import itself.
_collects = gc.isenabled()
gc.disable()
try:
    from saliency_fast.api import Engine, explain
    from saliency_fast.attribution import Attribution, load
    from saliency_fast.engine import Plan
    from saliency_fast.engine.bind import PerExample, Shared
    from saliency_fast.ops import backends
    from saliency_fast.replay import Replay, replay
    from saliency_fast.version import __version__
finally:
    if _collects:
        gc.enable()

if TYPE_CHECKING:
    from saliency_fast import evaluate as evaluate
    from saliency_fast import summary as summary
    from saliency_fast.methods import *
    from saliency_fast.model.targets import NextToken
    from saliency_fast.tokens import Similarity, TokenAttribution, explain_tokens
    from saliency_fast.video import Clip, explain_video

_MODULES = ("evaluate", "summary")
_LATER = {
    "NextToken": "model.targets",
    "Similarity": "tokens",
    "TokenAttribution": "tokens",
    "explain_tokens": "tokens",
    "Clip": "video",
    "explain_video": "video",
}

__all__ = [
    "IDGI",
    "LRP",
    "AttentionRollout",
    "AttentionWeights",
    "Attribution",
    "BlurIG",
    "Clip",
    "Conductance",
    "Deconvolution",
    "DeepLift",
    "EigenCAM",
    "Engine",
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
    "NextToken",
    "Occlusion",
    "PerExample",
    "Plan",
    "Replay",
    "Rise",
    "ScoreCAM",
    "ShapleySampling",
    "ShapleyValues",
    "Shared",
    "Similarity",
    "SmoothGrad",
    "SmoothGradSquared",
    "TemporalRescaling",
    "TokenAttribution",
    "VarGrad",
    "XGradCAM",
    "__version__",
    "backends",
    "explain",
    "explain_tokens",
    "explain_video",
    "load",
    "replay",
]


def __getattr__(name: str) -> Any:
    """Methods, and what comes beside them, are imported when they are first used."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_LATER.get(name, 'methods')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
