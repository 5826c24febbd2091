"""Features: segments of inputs that methods take away together."""

from __future__ import annotations

import torch
from torch import Tensor

from saliency_fast.model.routes import Inputs

Features = Tensor | Inputs | str | None
"""Numbers of segments, per input; a way to make them by name; None: every element is one."""


def read_features(features: Features, inputs: Inputs) -> Inputs:
    """Waits for the branch that builds it."""
    if features is None:
        return ()
    parts = features if isinstance(features, tuple) else (features,)
    return tuple(one.to(torch.int64) for one in parts if isinstance(one, Tensor))
