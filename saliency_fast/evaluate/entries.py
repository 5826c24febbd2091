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
    """A metric of the suite. place: its module in `saliency_fast.evaluate`; asks: what, and how its
    number is read, in a sentence; quick: fields of a quick run; fields: those that make it another
    metric than the class alone.
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
        *("curves", "Deletion", FAITHFULNESS),
        "The score averaged while the places that the map ranks highest are taken away, best "
        "first: low where the map knows what matters.",
        "Samek et al., 2017; Petsiuk et al., 2018",
        {"steps": 20},
    ),
    "insertion": Entry(
        *("curves", "Insertion", FAITHFULNESS),
        "The score averaged while the places that the map ranks highest are brought into an "
        "empty input: high where few of them are enough for the model.",
        "Petsiuk et al., 2018",
        {"steps": 20},
    ),
}
"""The suite, in the order of a report: a new metric is one entry."""
