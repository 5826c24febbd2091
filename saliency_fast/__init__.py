"""Exact attribution for PyTorch: Integrated Gradients, SmoothGrad and their family, fused."""

import gc

# Else the interpreter looks through all of PyTorch's objects twice meanwhile, which takes half as
# long as the import itself.
_collects = gc.isenabled()
gc.disable()
try:
    from saliency_fast.api import Engine, explain
    from saliency_fast.attribution import Attribution, load
    from saliency_fast.engine import Plan
    from saliency_fast.methods import (
        LRP,
        AttentionRollout,
        AttentionWeights,
        Deconvolution,
        DeepLift,
        EigenCAM,
        ExpectedGradients,
        FeatureAblation,
        FeaturePermutation,
        GradCAM,
        GradCAMPlusPlus,
        Gradient,
        GradientAttention,
        GuidedBackprop,
        GuidedGradCAM,
        HiResCAM,
        InputXGradient,
        IntegratedGradients,
        KernelShap,
        LayerCAM,
        Lime,
        Occlusion,
        Rise,
        ScoreCAM,
        ShapleySampling,
        ShapleyValues,
        SmoothGrad,
        SmoothGradSquared,
        VarGrad,
        XGradCAM,
    )
    from saliency_fast.ops import backends
    from saliency_fast.replay import Replay, replay
    from saliency_fast.tokens import Similarity, TokenAttribution, explain_tokens
    from saliency_fast.version import __version__
finally:
    if _collects:
        gc.enable()

__all__ = [
    "LRP",
    "AttentionRollout",
    "AttentionWeights",
    "Attribution",
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
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerCAM",
    "Lime",
    "Occlusion",
    "Plan",
    "Replay",
    "Rise",
    "ScoreCAM",
    "ShapleySampling",
    "ShapleyValues",
    "Similarity",
    "SmoothGrad",
    "SmoothGradSquared",
    "TokenAttribution",
    "VarGrad",
    "XGradCAM",
    "__version__",
    "backends",
    "explain",
    "explain_tokens",
    "load",
    "replay",
]
