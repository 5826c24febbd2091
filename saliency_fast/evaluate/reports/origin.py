"""Origin: what a report rests on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from saliency_fast.evaluate.outcome import RESAMPLES
from saliency_fast.evaluate.subject import Subject
from saliency_fast.model.targets import Target, read_targets
from saliency_fast.record import tensor_sha256, weights_sha256
from saliency_fast.specs import describe_target
from saliency_fast.version import __version__


def origin(base: Subject, target: Target, methods: Mapping[str, Any]) -> dict[str, Any]:
    """Enough to make the same report again. methods: how each row's maps were made."""
    model, x = base.model, base.inputs
    weights = None if model is None else weights_sha256(model)
    kind = type(model)
    called = model if not isinstance(model, nn.Module) and hasattr(model, "__qualname__") else kind
    return {
        "model": f"{called.__module__}.{getattr(called, '__qualname__', kind.__qualname__)}",
        "weights_sha256": weights,
        "training_mode": bool(getattr(model, "training", False)),
        "examples": base.batch,
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "inputs_sha256": tensor_sha256(x),
        "target": describe_target(read_targets(target, base.batch))[0],
        "classes": base.classes if isinstance(base.classes, (int, list, torch.Tensor)) else None,
        "decisions": base.first.decisions,
        "boxes": base.masks is not None,
        "baseline": _baseline(base.baseline),
        "memory_budget": base.running.memory_budget,
        "points_per_launch": base.running.points_per_launch,
        "resamples": RESAMPLES,
        "methods": methods,
        "versions": {
            "saliency_fast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }


def _baseline(baseline: Any) -> Any:
    if isinstance(baseline, torch.Tensor):
        return f"tensor {list(baseline.shape)}"
    if isinstance(baseline, (tuple, list)):
        return [_baseline(one) for one in baseline]
    return baseline
