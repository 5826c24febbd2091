"""The model as a function from points to scores and input gradients."""

from saliency_fast.model.function import PointFunction
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import Target, Targets, read_targets

__all__ = ["PointFunction", "Target", "Targets", "preserve_model_state", "read_targets"]
