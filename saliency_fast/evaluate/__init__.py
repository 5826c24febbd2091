"""Is the map any good? Metrics of maps, attacks, and reports of many metrics and methods."""

from saliency_fast.errors import warn_deprecated
from saliency_fast.evaluate.controls import CONTROLS, centre_map, edge_detector, random_map
from saliency_fast.evaluate.inputs import EvaluationInput
from saliency_fast.evaluate.metric import METRICS, Metric, Suite, make_metric

# Metrics register when they are imported, in the order of a report.
# isort: off
from saliency_fast.evaluate.metrics.faithfulness import (
    Counterfactual,
    Deletion,
    FaithfulnessCorrelation,
    Infidelity,
    Insertion,
    Road,
    SensitivityN,
)
from saliency_fast.evaluate.metrics.localisation import (
    EnergyInBox,
    PointingGame,
    RankAccuracy,
    TopKIoU,
)
from saliency_fast.evaluate.metrics.completeness import Completeness
from saliency_fast.evaluate.metrics.sanity import SanityCheck
from saliency_fast.evaluate.metrics.robustness import AvgSensitivity, MaxSensitivity, Stability
from saliency_fast.evaluate.attacks import Attacked, Manipulated, Manipulation, fgsm, pgd
from saliency_fast.evaluate.metrics.sparseness import Complexity, Sparseness

# isort: on
from saliency_fast.evaluate.detection import (
    AdversarialScore,
    AttackRoc,
    CoherenceReference,
    Roc,
    adversarial_score,
    attack_roc,
    coherence,
    roc,
)
from saliency_fast.evaluate.metrics.agreement import Agreement, agreement
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, bootstrap
from saliency_fast.evaluate.reports.report import report
from saliency_fast.evaluate.reports.result import Report

__all__ = [
    "CONTROLS",
    "METRICS",
    "AdversarialScore",
    "Agreement",
    "AttackRoc",
    "Attacked",
    "AvgSensitivity",
    "CoherenceReference",
    "Completeness",
    "Complexity",
    "Counterfactual",
    "Curve",
    "Deletion",
    "EnergyInBox",
    "EvaluationInput",
    "FaithfulnessCorrelation",
    "Infidelity",
    "Insertion",
    "Interval",
    "Manipulated",
    "Manipulation",
    "MaxSensitivity",
    "Metric",
    "Outcome",
    "PointingGame",
    "RankAccuracy",
    "Report",
    "Road",
    "Roc",
    "SanityCheck",
    "SensitivityN",
    "Sparseness",
    "Stability",
    "Suite",
    "TopKIoU",
    "adversarial_score",
    "agreement",
    "attack_roc",
    "bootstrap",
    "centre_map",
    "coherence",
    "edge_detector",
    "fgsm",
    "make_metric",
    "pgd",
    "random_map",
    "report",
    "roc",
]


def __getattr__(name: str) -> type[EvaluationInput]:
    if name != "Subject":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_deprecated("evaluate.Subject", "evaluate.EvaluationInput")
    return EvaluationInput
