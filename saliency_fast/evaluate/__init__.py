"""Is the map any good? Metrics of maps, run by the engine, and a report of them."""

from saliency_fast.evaluate.attacks.coherence import CoherenceReference, coherence
from saliency_fast.evaluate.attacks.linf import Attacked, fgsm, pgd
from saliency_fast.evaluate.attacks.manipulation import Manipulated, Manipulation
from saliency_fast.evaluate.attacks.roc import Roc, roc
from saliency_fast.evaluate.attacks.unusual import (
    AdversarialScore,
    AttackRoc,
    adversarial_score,
    attack_roc,
)
from saliency_fast.evaluate.controls import CONTROLS, centre_map, edge_detector, random_map
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.agreement import Agreement, agreement
from saliency_fast.evaluate.metrics.completeness import Completeness
from saliency_fast.evaluate.metrics.counterfactual import Counterfactual
from saliency_fast.evaluate.metrics.curves import Deletion, Insertion
from saliency_fast.evaluate.metrics.infidelity import Infidelity
from saliency_fast.evaluate.metrics.localisation import (
    EnergyInBox,
    PointingGame,
    RankAccuracy,
    TopKIoU,
)
from saliency_fast.evaluate.metrics.max_sensitivity import AvgSensitivity, MaxSensitivity
from saliency_fast.evaluate.metrics.road import Road
from saliency_fast.evaluate.metrics.sanity import SanityCheck
from saliency_fast.evaluate.metrics.sensitivity_n import FaithfulnessCorrelation, SensitivityN
from saliency_fast.evaluate.metrics.sparseness import Complexity, Sparseness
from saliency_fast.evaluate.metrics.stability import Stability
from saliency_fast.evaluate.outcome import Curve, Interval, Outcome, bootstrap
from saliency_fast.evaluate.reports.report import Report, report
from saliency_fast.evaluate.reports.suite import METRICS, Suite, make_metric
from saliency_fast.evaluate.subject import Subject

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
