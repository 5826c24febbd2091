"""Is the map any good? Metrics of maps, run by the engine, and a report of them."""

from saliency_fast.evaluate.controls import CONTROLS, centre_map, edge_detector, random_map
from saliency_fast.evaluate.curves import Deletion, Insertion
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, bootstrap
from saliency_fast.evaluate.subject import Subject

__all__ = [
    "CONTROLS",
    "Curve",
    "Deletion",
    "Insertion",
    "Interval",
    "Metric",
    "Outcome",
    "Subject",
    "bootstrap",
    "centre_map",
    "edge_detector",
    "random_map",
]
