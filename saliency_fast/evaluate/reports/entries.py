"""Entries: the metrics of the suite, what each asks, and from which paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAITHFULNESS, LOCALISATION, AXIOMS = "faithfulness", "localisation", "axioms"
SANITY, ROBUSTNESS, FORM, FURTHER = "sanity", "robustness", "form", "further"
GROUPS = {
    FAITHFULNESS: "Does the model depend on what the map marks?",
    LOCALISATION: "Is what the map marks where the object is?",
    AXIOMS: "Do the values add up to what they explain?",
    SANITY: "Does the map depend on the model at all?",
    ROBUSTNESS: "Does the map stay when next to nothing changes?",
    FORM: "What does the map look like?",
    FURTHER: "Further metrics",
}


@dataclass(frozen=True)
class Entry:
    """A metric of the suite. place: its module under `saliency_fast.evaluate`; asks: what, and how
    its number is read, in a sentence; quick: fields of a quick run; fields: those that make it
    another metric than the class alone.
    """

    place: str
    kind: str
    group: str
    asks: str
    paper: str
    quick: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


ENTRIES: Mapping[str, Entry] = {
    "deletion": Entry(
        *("metrics.curves", "Deletion", FAITHFULNESS),
        "The score averaged while the places that the map ranks highest are taken away, best "
        "first: low where the map knows what matters.",
        "Samek et al., 2017; Petsiuk et al., 2018",
        {"steps": 20},
    ),
    "insertion": Entry(
        *("metrics.curves", "Insertion", FAITHFULNESS),
        "The score averaged while the places that the map ranks highest are brought into an "
        "empty input: high where few of them are enough for the model.",
        "Petsiuk et al., 2018",
        {"steps": 20},
    ),
    "road": Entry(
        *("metrics.road", "Road", FAITHFULNESS),
        "How often the decision is still the target while the highest places are imputed from "
        "their neighbours: low where the map knows what matters, and no holes give the answer "
        "away.",
        "Rong et al., 2022",
        {"shares": (0.1, 0.3, 0.5)},
    ),
    "infidelity": Entry(
        *("metrics.infidelity", "Infidelity", FAITHFULNESS),
        "The squared gap between what the map foretells for random changes of the input and "
        "what they do to the output: low where it foretells well, in the output's own units.",
        "Yeh et al., 2019",
        {"samples": 20},
    ),
    "sensitivity_n": Entry(
        *("metrics.sensitivity_n", "SensitivityN", FAITHFULNESS),
        "The correlation, over random sets of places, between what the map gives them and how "
        "far the output falls without them: 1 where the map adds up.",
        "Ancona et al., 2018",
        {"samples": 20},
    ),
    "counterfactual": Entry(
        *("metrics.counterfactual", "Counterfactual", FAITHFULNESS),
        "How often the decision changes when the map's top region is painted over from its "
        "surroundings: high where the region carries it; compare with random regions.",
        "Chang et al., 2019",
        {"draws": 3},
    ),
    "pointing_game": Entry(
        *("metrics.localisation", "PointingGame", LOCALISATION),
        "How often the map is largest on the object.",
        "Zhang et al., 2018",
    ),
    "energy_in_box": Entry(
        *("metrics.localisation", "EnergyInBox", LOCALISATION),
        "The share of the map's positive evidence that lies on the object; a map without any "
        "idea gets the object's share of the picture.",
        "Wang et al., 2020; Arras et al., 2022",
    ),
    "top_k_iou": Entry(
        *("metrics.localisation", "TopKIoU", LOCALISATION),
        "How well the map's highest places cover the object and nothing else: intersection "
        "over union.",
        "Theiner et al., 2022",
    ),
    "completeness": Entry(
        *("metrics.completeness", "Completeness", AXIOMS),
        "How far the sum of the values is from what the score gained over the baseline's, "
        "relative to that gain: 0 where all of it is explained; gradients are not made to add "
        "up.",
        "Sundararajan et al., 2017",
    ),
    "sanity_check": Entry(
        *("metrics.sanity", "SanityCheck", SANITY),
        "How alike the maps stay when the model's layers are drawn anew, from the output on: "
        "a map that stays the same shows the input, and not what the model has learned.",
        "Adebayo et al., 2018",
        {"draws": 1, "stages": 4},
    ),
    "sanity_independent": Entry(
        *("metrics.sanity", "SanityCheck", SANITY),
        "How alike the maps stay when one layer at a time is drawn anew: high where the map does "
        "not notice most layers.",
        "Adebayo et al., 2018",
        {"draws": 1, "stages": 4},
        {"order": "independent", "draws": 1},
    ),
    "max_sensitivity": Entry(
        *("metrics.max_sensitivity", "MaxSensitivity", ROBUSTNESS),
        "How far maps move at most under slight noise on the input: low where the explanation "
        "is steady; a constant map is the steadiest.",
        "Yeh et al., 2019",
        {"samples": 3},
    ),
    "stability": Entry(
        *("metrics.stability", "Stability", ROBUSTNESS),
        "How alike maps stay under slight noise and small shifts that leave the decision: 1 where "
        "nothing but the shift itself happens to them.",
        "after Alvarez-Melis and Jaakkola, 2018",
        {"samples": 2, "shifts": (1,)},
    ),
    "manipulation": Entry(
        *("attacks.manipulation", "Manipulation", ROBUSTNESS),
        "How much of the map's order is left after an attack that changes the map and not the "
        "decision: 1 where it could not be moved.",
        "Ghorbani et al., 2019; Dombrowski et al., 2019",
        {"steps": 5},
    ),
    "sparseness": Entry(
        *("metrics.sparseness", "Sparseness", FORM),
        "How unequal the map's magnitudes are (Gini index): near 1 where few places hold "
        "everything; sparse is easy to read, and not yet right.",
        "Chalasani et al., 2020",
    ),
    "complexity": Entry(
        *("metrics.sparseness", "Complexity", FORM),
        "The entropy of the map's magnitudes: low where few places hold everything.",
        "Bhatt et al., 2020",
    ),
}
"""The suite, in the order of a report: a new metric is one entry."""
