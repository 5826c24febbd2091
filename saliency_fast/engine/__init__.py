"""Plan and run: knows recipes, and no method by name."""

from saliency_fast.engine.baselines import Baseline
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.recipe import Level, Recipe

__all__ = ["Baseline", "Level", "Plan", "Recipe"]
