"""Summaries: regions of a map, concepts of a layer, and sentences with numbers to check."""

from saliency_fast.summary.animation import Moment, Progress, animate, progress
from saliency_fast.summary.concepts import Concepts, Prototype, concepts
from saliency_fast.summary.regions import Region, Regions, regions
from saliency_fast.summary.sentences import Summary, summarise

__all__ = [
    "Concepts",
    "Moment",
    "Progress",
    "Prototype",
    "Region",
    "Regions",
    "Summary",
    "animate",
    "concepts",
    "progress",
    "regions",
    "summarise",
]
