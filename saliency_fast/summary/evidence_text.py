"""Evidence text: the facts of a map as sentences and caveats, with a citation of every number.

The wording is in `render/templates/summary.txt.jinja`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from saliency_fast.render.html import macros, number_text
from saliency_fast.summary.facts import Facts
from saliency_fast.summary.locations import with_preposition

Path = tuple[str | int, ...]

SENTENCES = ("decision", "evidence_for", "removal", "evidence_against", "confidence")
CAVEATS = (
    *("target", "uncertain", "diffuse", "wide", "against", "error", "delta", "unconverged"),
    *("baseline", "unstable", "fills", "contradicted"),
)
WORTH, FURTHER = 0.05, 2
"""Further regions are mentioned from this share of the evidence, and at most so many."""
APART = 0.25
"""Two replacements disagree if their probabilities differ by more."""
THRESHOLDS = {
    "UNCERTAIN": 0.6,
    "DIFFUSE": 0.25,
    "WIDE": 0.5,
    "AGAINST": 0.55,
    "ROUGH": 0.1,
    "EQUAL": 0.1,
    "UNSTABLE": 0.5,
}
"""Where caveats begin: a decision's probability below; the strongest region's share of evidence
below, and of area above; the share of evidence against the target, the relative error or delta, and
the share of positions equal to the baseline above; a correlation with maps of noisy inputs below.
"""
_ROUNDING = 1e-13
"""Sums of shares may differ from 1 by so much."""
_CERTAIN = 1e-12
"""The distance of written probabilities from 0 and 1: a model's arithmetic is never certain."""


@dataclass(frozen=True)
class Cited:
    """A number of a text: as it is written, and its path in the facts."""

    written: str
    path: Path


@dataclass
class EvidenceText:
    """The text of an example's facts; `cited` collects its numbers."""

    facts: Facts
    cited: list[Cited] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The decision, the evidence for the target, its removal, evidence against, and errors."""
        return [text for _, text in self._written(SENTENCES)]

    def caveats(self) -> list[tuple[str, str]]:
        """(kind, sentence) for everything that gives reason for doubt."""
        notes = [("model", f"{_sentence(note)}.") for note in self.facts["notes"]]
        return self._written(CAVEATS) + notes

    def _written(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        template = macros("summary.txt.jinja", f=self.facts, **self._words(), **THRESHOLDS)
        texts = [(name, _sentence(getattr(template, name)())) for name in names]
        return [(name, text) for name, text in texts if text]

    def _words(self) -> dict[str, Any]:
        """The words and functions of the template."""
        facts, regions, removal = self.facts, self.facts["regions"], self.facts["removal"] or {}
        against = [number for number, one in enumerate(regions) if one["share"] < 0]
        worst = max(against, key=lambda one: regions[one]["negative"], default=None)
        if worst is not None and regions[worst]["negative"] < WORTH:
            worst = None
        top = {} if facts["top"] is None else regions[facts["top"]]
        changed = [how for how, one in removal.items() if _class(one) != _class(facts)]
        kept = [how for how in removal if how not in changed]
        new = {removal[how]["decision"]["name"] for how in changed}
        return {
            "share": partial(self._cite, share_text),
            "probability": partial(self._cite, _probability_text),
            "magnitude": partial(self._cite, lambda value: number_text(abs(value))),
            "number": partial(self._cite, number_text),
            "verb": self._verb,
            "mentioned": self._mentioned(),
            "worst": None if worst is None else (worst, self._where(worst)),
            "removed": top["where"] if top.get("named") else "the strongest region",
            "changed": changed,
            "kept": kept,
            "only": new.pop() if len(new) == 1 and not kept else "",
            "disagree": len(removal) == 2 and _disagree(*removal.values()),
        }

    def _cite(self, text: Any, *path: str | int) -> str:
        """Writes the fact at a path."""
        self.cited.append(Cited(text(value_at(self.facts, path)), path))
        return self.cited[-1].written

    def _verb(self, how: str) -> str:
        """The change of the target's probability by a replacement, as it is written."""
        before, after = self.facts["probability"], self.facts["removal"][how]["probability"]
        if _probability_text(before) == _probability_text(after):
            return "stays"
        return "falls" if after < before else "rises"

    def _mentioned(self) -> list[tuple[int, str]]:
        """The regions with most evidence for the target, and where they are."""
        top, regions = self.facts["top"], self.facts["regions"]
        if top is None:
            return []
        further = [
            number
            for number, one in enumerate(regions)
            if number != top and one["share"] > 0 and one["positive"] >= WORTH
        ]
        further.sort(key=lambda number: -regions[number]["positive"])
        numbers = [top, *further[:FURTHER]]
        where = [self._where(number) for number in numbers]
        again = [one in where[:index] for index, one in enumerate(where)]
        return [
            (number, f"elsewhere {one}" if repeated else one)
            for number, one, repeated in zip(numbers, where, again, strict=True)
        ]

    def _where(self, number: int) -> str:
        """A region's location, within the object where it lies there."""
        region, kind, thing = (
            self.facts["regions"][number],
            self.facts["kind"],
            self.facts["object"],
        )
        if region["named"]:
            return f"in {region['where']}"
        if region["within"]:
            return f"{with_preposition(region['within'])} of the {thing}"
        words = f"{with_preposition(region['where'])} of the {kind}"
        return f"outside of the {thing}, {words}" if thing else words


def _class(prediction: Facts) -> int | None:
    return None if prediction["decision"] is None else prediction["decision"]["class"]


def _disagree(first: Facts, second: Facts) -> bool:
    """Whether two replacements differ in the decision, by `APART`, or in the sign of the change."""
    if first["decision"] is None:
        return bool(first["change"] * second["change"] < 0)
    is_apart = abs(first["probability"] - second["probability"]) > APART
    return is_apart or _class(first) != _class(second)


def _sentence(text: str) -> str:
    """A text in one line, with a capital letter."""
    line = " ".join(text.split())
    return line[:1].upper() + line[1:]


def share_text(share: float) -> str:
    """A share of at least 0 in whole per cent, "less than 1 %" or "more than 99 %"."""
    if share == 0.0 or abs(share - 1.0) < _ROUNDING:
        return "0 %" if share == 0.0 else "100 %"
    if share < 0.01:
        return "less than 1 %"
    whole = round(100.0 * share)
    return "more than 99 %" if whole == 100 and share < 1.0 else f"{whole} %"


def _probability_text(probability: float) -> str:
    return share_text(min(max(probability, _CERTAIN), 1.0 - _CERTAIN))


def value_at(facts: Any, path: Path) -> Any:
    """The value of the facts at a path of names and indices."""
    for key in path:
        facts = facts[key]
    return facts
