"""Curves: scores while places are taken away, or brought in, in the order of a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.metric import Metric, check_output
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.ranking import check_ranking, ranking
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.substrates import Substrate, check_substrate, named
from saliency_fast.ops import rank_points


@dataclass(frozen=True)
class _Ranked(Metric):
    """Fields of both curves.

    substrate: what stands in the place of what is gone: "zero", "mean", "blur", "uniform", a number
    or a tensor. output: "softmax" (the target's probability) or "logit" (its output as it is).
    steps: how many there are, of as equal size as can be; step_size, in places, wins over it.
    per: "place" takes all channels of a place together, "element" each by itself. order:
    "most_first" or "least_first". seed: of the uniform substrate.
    """

    substrate: Substrate = "zero"
    output: str = "softmax"
    steps: int = 100
    step_size: int | None = None
    per: str = "place"
    order: str = "most_first"
    seed: int = 0
    needs: ClassVar[tuple[str, ...]] = ("model",)
    takes_missing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_substrate(self.substrate)
        check_output(self.output)
        check_ranking(self.per, self.order)
        for name in ("steps", "step_size"):
            given = getattr(self, name)
            whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
            if not whole and not (name == "step_size" and given is None):
                raise InputError(f"{name} must be a whole number, 1 or more: got {given!r}")

    def counts(self, places: int) -> Tensor:
        """How many of the places are gone after each step, int64 from 0 to all."""
        if self.step_size is not None:
            found = torch.arange(0, places, self.step_size, device="cpu")
            return torch.cat([found, torch.tensor([places], device="cpu")])
        ends = torch.arange(min(self.steps, places) + 1, dtype=torch.int64, device="cpu")
        return (ends * places + ends[-1] // 2) // ends[-1]

    def _walked(self, subject: Subject, *, insert: bool) -> Outcome:
        x = subject.inputs
        fill = subject.fill(self.substrate, self.seed, missing=True)
        rank, sequence = ranking(subject.values, x, self.per, self.order)
        counts = self.counts(rank.shape[1]).to(x.device)
        begin, end = (fill.expand_as(x).contiguous(), x) if insert else (x, fill)
        step, pick = _distinct(begin, end, sequence, counts)
        item, at = step.nonzero().unbind(1)

        def write(item: Tensor, place: Tensor) -> Tensor:
            points: Tensor = rank_points(begin, end, rank, item, place)
            return points

        answers = subject.scorer_beside(fill).at(write, item, counts[at])[1].of(self.output)
        share = counts.double() / rank.shape[1]
        name = "share inserted" if insert else "share deleted"
        curve = Curve(share, answers[pick], name, _output_name(self.output))
        parameters = {
            "substrate": named(self.substrate),
            "steps": len(counts) - 1,
            "step_size": int(counts.diff().max()),
        }
        return self._outcome(curve.area(), curve=curve, parameters=parameters)


class Deletion(_Ranked):
    """The area under the target's score while the places that a map ranks highest are taken away
    (Samek, 2017; Petsiuk, 2018): low where the map knows what matters.
    """

    name = "deletion"
    better = "lower"

    def _judge(self, subject: Subject) -> Outcome:
        return self._walked(subject, insert=False)


class Insertion(_Ranked):
    """The area under the target's score while the places that a map ranks highest are brought into
    the substrate (Petsiuk, 2018): high where the map knows what matters.
    """

    name = "insertion"
    better = "higher"

    def _judge(self, subject: Subject) -> Outcome:
        return self._walked(subject, insert=True)


def _distinct(
    begin: Tensor, end: Tensor, sequence: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Which steps change an example's point, bool [B, n], and for every step the row of its point
    among those, int64 [B, n]: black stays black where black is taken away, and is not asked twice.
    """
    batch, places = sequence.shape
    differs = (begin != end).view(batch, -1, places).any(1).gather(1, sequence)
    changed = torch.zeros(batch, places + 1, dtype=torch.int64, device=sequence.device)
    torch.cumsum(differs, 1, out=changed[:, 1:])
    reached = changed[:, counts]
    step = torch.ones_like(reached, dtype=torch.bool)
    step[:, 1:] = reached[:, 1:] > reached[:, :-1]
    return step, step.flatten().cumsum(0).view_as(step) - 1


def _output_name(output: str) -> str:
    return "probability of the target" if output == "softmax" else "output of the target"
