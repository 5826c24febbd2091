"""Counterfactual: does the decision change where the top region of a map is taken away?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.infidelity import blocks
from saliency_fast.evaluate.metrics.inpaint import inpaint, need_axes
from saliency_fast.evaluate.metrics.road import classes_of
from saliency_fast.evaluate.metrics.sensitivity_n import check_shares, subset_ranks
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.ranking import ranking
from saliency_fast.evaluate.scores import Scores
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.substrates import Substrate, check_substrate
from saliency_fast.methods.parts import checks
from saliency_fast.ops import philox, random_bits

INPAINT = "inpaint"


@dataclass(frozen=True)
class Counterfactual(Metric):
    """Whether the decision changes, 1 or 0, where the places that a map ranks highest are replaced.

    share: of the places, at least one. patch: above 1, boxes of so many places along each axis are
    ranked by their sums and replaced as a whole, since scattered places are hardly missed. by:
    "inpaint", which imputes them from their neighbours (Rong, 2022), or a substrate: "blur",
    "mean", "zero", "uniform", a number or a tensor. draws: random regions of equal size to compare
    with: the same region elsewhere, around the edges, or random features where inputs have no axes.
    shares: tried in turn for the smallest one that changes the decision. seed: of the draws, the
    same for all examples, and the uniform substrate.

    Values are NaN where the decision is not the target to begin with. details, each [B]: `decision`
    (int64), `drop_softmax`, `drop_logit`; `random`: the share of draws that change the decision,
    and `random_drop_softmax`, `random_drop_logit`, their means; `needed_share`: NaN where none of
    the shares is enough.
    """

    share: float = 0.1
    patch: int = 1
    by: Substrate = INPAINT
    draws: int = 10
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    seed: int = 0
    name = "counterfactual"
    better = "higher"
    needs: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        check_shares((self.share,), "share")
        if not isinstance(self.by, str) or self.by != INPAINT:
            try:
                check_substrate(self.by)
            except (InputError, InputTypeError) as error:
                said = str(error).replace("substrate must be one of", "by must be one of inpaint,")
                raise type(error)(said) from error
        checks.whole("patch", self.patch, 1)
        checks.whole("draws", self.draws, 0)
        check_shares(self.shares)
        checks.whole("seed", self.seed, 0)

    def _judge(self, subject: Subject) -> Outcome:
        x, batch = subject.inputs, subject.batch
        classes, first = classes_of(subject), subject.first
        rank, several = self._rank(subject)
        places = rank.shape[1]
        counts = [max(1, round(one * several)) for one in (self.share, *self.shares)]
        ends = torch.tensor([counts[0]] * (1 + self.draws) + counts[1:], device=x.device)
        elsewhere = self._elsewhere(x, places)
        inpainted = isinstance(self.by, str) and self.by == INPAINT
        if inpainted:
            need_axes(x)
        fill = None if inpainted else subject.fill(self.by, self.seed)

        def write(item: Tensor, place: Tensor) -> Tensor:
            gone = (rank[item] < ends[place, None]).gather(1, elsewhere[place])
            missing = gone.view(-1, *x.shape[2:]) if x.dim() > 2 else gone
            if fill is None:
                return inpaint(x[item], missing)
            missing = missing[:, None] if x.dim() > 2 else missing
            return torch.where(missing, fill[item % len(fill)], x[item])

        item = torch.arange(batch, device=x.device).repeat_interleave(len(ends))
        place = torch.arange(len(ends), device=x.device).repeat(batch)
        points = subject.scorer.at(write, item, place)[1]
        assert first.decisions is not None
        decided = first.decisions.eq(classes)
        return self._told(first, points, decided, [count / several for count in counts])

    def _rank(self, subject: Subject) -> tuple[Tensor, int]:
        """The rank of each place, or of its box, [B, P], and how many ranks there are."""
        x = subject.inputs
        if self.patch == 1:
            rank, _ = ranking(subject.values, x, "place", "most_first")
            return rank, rank.shape[1]
        own = blocks(x.shape[2:] if x.dim() > 2 else x.shape[1:], self.patch, x.device)[0].long()
        sums = subject.values.new_zeros((len(x), int(own.max()) + 1))
        sums.index_add_(1, own, subject.places.flatten(1))
        rank, _ = ranking(sums, sums, "place", "most_first")
        return rank[:, own], sums.shape[1]

    def _elsewhere(self, x: Tensor, places: int) -> Tensor:
        """For each point of an example, from which place of the region each place takes whether it
        is gone, int64 [n, P]: from itself but for the draws.
        """
        own = torch.arange(places, device=x.device)
        table = own.repeat(1 + self.draws + len(self.shares), 1)
        if self.draws == 0:
            return table
        sample = torch.arange(self.draws, device=x.device)
        if x.dim() == 2:
            table[1 : 1 + self.draws] = subset_ranks(self.seed, sample, places)
            return table
        spatial = x.shape[2:]
        seed = torch.full_like(sample, self.seed)
        words = random_bits(seed, sample, len(spatial), 0, philox.MASK)
        moved = torch.zeros((self.draws, 1), dtype=torch.int64, device=x.device)
        for axis, size in enumerate(spatial):
            shift = (words[:, axis : axis + 1] * size) >> 32
            at = (torch.arange(size, device=x.device) + shift) % size
            moved = (moved[:, :, None] * size + at[:, None]).flatten(1)
        table[1 : 1 + self.draws] = moved
        return table

    def _told(self, first: Scores, points: Scores, decided: Tensor, shares: list[float]) -> Outcome:
        assert first.decisions is not None
        assert points.decisions is not None
        batch = len(decided)
        decisions = points.decisions.view(batch, -1)
        changed = (decisions != first.decisions[:, None]).double()
        draws, grid = slice(1, 1 + self.draws), slice(1 + self.draws, None)
        details: dict[str, Any] = {"decision": decisions[:, 0], "random": changed[:, draws].mean(1)}
        for output in ("softmax", "logit"):
            drop = first.of(output)[:, None] - points.of(output).view(batch, -1)
            details[f"drop_{output}"] = drop[:, 0]
            details[f"random_drop_{output}"] = drop[:, draws].mean(1)
        x = changed.new_tensor(shares[1:])
        enough = torch.where(changed[:, grid] > 0, x, math.inf).amin(1)
        details["needed_share"] = enough.masked_fill(enough.isinf(), math.nan)
        curve = Curve(x, changed[:, grid], "share replaced", "share of changed decisions")
        caveats: tuple[str, ...] = ()
        if not bool(decided.all()):
            rows = (~decided).nonzero().flatten().tolist()
            caveats = (
                f"the decision for examples {rows[:8]} is not the target: they have no value",
            )
        values = changed[:, 0].masked_fill(~decided, math.nan)
        return self._outcome(values, curve=curve, details=details, caveats=caveats)
