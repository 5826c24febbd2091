"""From "a module" to "a function from points to (scores, input gradients)"."""

from saliency_fast.model.function import PointFunction
from saliency_fast.model.guard import preserve_model_state
from saliency_fast.model.targets import Target, Targets, read_targets

__all__ = ["PointFunction", "Target", "Targets", "preserve_model_state", "read_targets"]
