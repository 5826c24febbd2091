"""Is the map any good? Metrics of maps, run by the engine, and a report of them."""

from saliency_fast.evaluate.agreement import Agreement, agreement
from saliency_fast.evaluate.attacks import Attacked, fgsm, pgd
from saliency_fast.evaluate.coherence import CoherenceReference, coherence
from saliency_fast.evaluate.completeness import Completeness
from saliency_fast.evaluate.controls import CONTROLS, centre_map, edge_detector, random_map
from saliency_fast.evaluate.counterfactual import Counterfactual
from saliency_fast.evaluate.curves import Deletion, Insertion
from saliency_fast.evaluate.infidelity import Infidelity
from saliency_fast.evaluate.localisation import EnergyInBox, PointingGame, RankAccuracy, TopKIoU
from saliency_fast.evaluate.manipulation import Manipulated, Manipulation
from saliency_fast.evaluate.max_sensitivity import AvgSensitivity, MaxSensitivity
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, bootstrap
from saliency_fast.evaluate.report import Report, report
from saliency_fast.evaluate.road import Road
from saliency_fast.evaluate.roc import Roc, roc
from saliency_fast.evaluate.sanity import SanityCheck
from saliency_fast.evaluate.sensitivity_n import FaithfulnessCorrelation, SensitivityN
from saliency_fast.evaluate.sparseness import Complexity, Sparseness
from saliency_fast.evaluate.stability import Stability
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.suite import METRICS, Suite, make_metric
from saliency_fast.evaluate.unusual import (
    AdversarialScore,
    AttackRoc,
    adversarial_score,
    attack_roc,
)

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
    "Subject",
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
