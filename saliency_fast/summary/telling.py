"""Telling: numbers as words, each of them looked up in the facts and noted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from saliency_fast.render.parts import number_text

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Cited:
    """A number of a text: as it is written, and where the facts hold it."""

    written: str
    path: Path


@dataclass
class Teller:
    """Writes numbers of `facts`; `cited` holds all that it wrote."""

    facts: Mapping[str, Any]
    cited: list[Cited] = field(default_factory=list)

    def share(self, *path: str | int) -> str:
        """A share in whole per cent: neither 0 nor 100 unless it is."""
        return self._cite(share_text(value_at(self.facts, path)), path)

    def probability(self, *path: str | int) -> str:
        """A probability in whole per cent: a model's arithmetic is never certain."""
        value = value_at(self.facts, path)
        return self._cite(share_text(min(max(value, 1e-12), 1.0 - 1e-12)), path)

    def number(self, *path: str | int) -> str:
        """Three significant digits of a number's amount."""
        return self._cite(number_text(abs(value_at(self.facts, path))), path)

    def signed(self, *path: str | int) -> str:
        """Three significant digits of a number."""
        return self._cite(number_text(value_at(self.facts, path)), path)

    def _cite(self, written: str, path: Path) -> str:
        self.cited.append(Cited(written, path))
        return written


def share_text(share: float) -> str:
    """A share of at least 0 in whole per cent; "less than 1 %" and "more than 99 %" near ends."""
    # Sums of shares may miss 1 by rounding.
    if share == 0.0 or abs(share - 1.0) < 1e-13:
        return "0 %" if share == 0.0 else "100 %"
    if share < 0.01:
        return "less than 1 %"
    whole = round(100.0 * share)
    return "more than 99 %" if whole == 100 and share < 1.0 else f"{whole} %"


def value_at(facts: Any, path: Path) -> Any:
    """What the facts hold at a path of names and numbers."""
    for key in path:
        facts = facts[key]
    return facts
