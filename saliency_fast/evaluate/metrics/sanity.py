"""Sanity checks: does a map change when the model forgets what it has learned?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError, ModelError, SaliencyError
from saliency_fast.evaluate.metric import Metric
from saliency_fast.evaluate.metrics.randomise import Randomised, seed_of
from saliency_fast.evaluate.outcome import Curve, Outcome, bootstrap
from saliency_fast.evaluate.scores import Scorer
from saliency_fast.evaluate.similarity import rank_correlation, rank_ssim, ssim
from saliency_fast.evaluate.subject import Subject
from saliency_fast.methods.parts import checks

ORDERS = ("cascading", "bottom_up", "independent")
HALF = math.sqrt(0.5)
"""The correlation of two maps that share half of their variance."""
UNNOTICED = 0.99
FEW = 4
"""Fewer places than this are ordered alike by chance too often."""
_MEASURES = ("rank_correlation", "rank_ssim", "ssim", "rank_correlation_of_magnitudes")
_DECIDING = _MEASURES[:2]


@dataclass(frozen=True)
class SanityCheck(Metric):
    """How alike maps stay when the model's layers are drawn anew (Adebayo, 2018): a map that stays
    the same does not show what the model has learned.

    order: "cascading" draws from the output to the input, layer after layer, "bottom_up" from the
    input, "independent" each alone. draws: random models that are averaged. stages: how often maps
    are made on the way, at most once for each layer (None). seed: of the draws.

    threshold: two maps with correlation r share r ** 2 of their variance. Below sqrt(1/2) that is
    less than half: most of the map is then not found in that of a model that knows nothing. SSIM of
    maps with equal means and variances is 2 cov / (var + var), which is r again, so the same
    threshold holds for both. A map and its negative count as alike: only the sign is the model's.

    values: the rank correlation (its amount) of each example's map with that of a model all of
    whose layers were drawn anew; with order="independent", its mean over the layers. passed:
    whether the upper ends of the 95 % intervals of the mean rank correlation and of the mean SSIM
    of ranks both lie below the threshold; None for order="independent", which tells the layers that
    the map does not notice (`details["unnoticed"]`). curve: the rank correlation over stages.

    details: every similarity, float64 [B, stages] ("ssim": of values, as the field has it; high
    peaks make it large for maps of unrelated images, see "floor", so it does not decide), layers,
    the mean similarity of maps of different examples and of different random models ("floor"), and
    of the maps with those that the model itself gives again ("again"), the intervals of the last
    stage ("final") and the share of stages before the map moves below the threshold ("unmoved").
    """

    order: str = "cascading"
    draws: int = 3
    stages: int | None = None
    threshold: float = HALF
    seed: int = 0
    name: ClassVar[str] = "sanity_check"
    better: ClassVar[str] = "lower"
    needs: ClassVar[tuple[str, ...]] = ("model", "method")

    def __post_init__(self) -> None:
        checks.choice("order", self.order, ORDERS)
        checks.whole("draws", self.draws, 1)
        if self.stages is not None:
            checks.whole("stages", self.stages, 1)
        checks.positive("threshold", self.threshold)
        if self.threshold > 1.0:
            raise InputError(f"threshold is a correlation, up to 1: got {self.threshold}")
        checks.whole("seed", self.seed, 0)

    def _judge(self, subject: Subject) -> Outcome:
        structured = subject.inputs.dim() > 2
        maps, alone = subject.places, self.order == "independent"
        again = _alike(maps, _places(subject.explain(subject.inputs)), structured)
        copy = Randomised(subject.model, lambda model: _scores(model, subject))
        unchanged = self._unchanged(copy, subject)
        groups = _groups(len(copy.layers), self.stages)
        if self.order == "bottom_up":
            groups = [group[::-1] for group in reversed(groups)]
        found: dict[str, Tensor] = {}
        final = []
        for draw in range(self.draws):
            rows = []
            for after in self._walk(subject, copy, groups, draw):
                rows.append(_alike(maps, after, structured))
            final.append(after)
            for name in again:
                share = torch.stack([one[name] for one in rows], 1) / self.draws
                found[name] = found.get(name, 0.0) + share
        details = {
            **found,
            "layers": [_joined([copy.layers[one].name for one in group]) for group in groups],
            "unchanged": unchanged,
            "again": again,
            "floor": {
                "examples": _pairs([maps, maps.roll(1, 0)] if len(maps) > 1 else [], structured),
                "models": {} if alone else _pairs(final, structured),
            },
        }
        if alone:
            return self._alone(found, details)
        return self._through(subject, found, details, final)

    def _walk(
        self, subject: Subject, copy: Randomised, groups: list[list[int]], draw: int
    ) -> Iterator[Tensor]:
        """Maps [B, *spatial] after each group of layers is drawn anew."""
        _restore(copy, range(len(copy.layers)))
        for group in groups:
            for number in group:
                copy.draw(number, seed_of(self.seed, draw, number))
            try:
                yield _places(subject.explain(subject.inputs, copy.model))
            except SaliencyError as error:
                raise ModelError(
                    f"maps cannot be made with {copy.layers[group[-1]].name!r} drawn anew: {error};"
                    " try another method, or order='independent'"
                ) from error
            if self.order == "independent":
                _restore(copy, group)

    def _unchanged(self, copy: Randomised, subject: Subject) -> list[str]:
        """Names of layers that draws leave as they are; raises where no draw says anything."""
        numbers = range(len(copy.layers))
        changed = [copy.draw(one, seed_of(self.seed, 0, one)) for one in numbers]
        if not any(changed):
            raise ModelError(
                "drawing the model's layers anew changes none of them: their reset_parameters give "
                "what is there already; judge a model that has learned something"
            )
        try:
            scores = _scores(copy.model, subject)
        except SaliencyError as error:
            raise ModelError(
                f"the model cannot be run with all its parameters drawn anew: {error}"
            ) from error
        if torch.equal(scores, subject.first.scores):
            raise ModelError(
                "the model's scores stay the same when all its parameters are drawn anew: they "
                f"rest on something else ({len(numbers)} layers were drawn); keep what was learned "
                "in nn.Parameter, and look for a score that is constant"
            )
        layers = zip(copy.layers, changed, strict=True)
        return [layer.name for layer, different in layers if not different]

    def _alone(self, found: dict[str, Tensor], details: dict[str, Any]) -> Outcome:
        """The outcome of layers drawn each alone: which of them the map does not notice."""
        least = torch.stack([found[one].mean(0) for one in _DECIDING if one in found]).amin(0)
        details["unnoticed"] = [
            name
            for name, one in zip(details["layers"], least.tolist(), strict=True)
            if one > UNNOTICED and name not in details["unchanged"]
        ]
        ranked = found["rank_correlation"]
        number = torch.arange(ranked.shape[1], dtype=torch.float64, device=ranked.device)
        curve = Curve(number, ranked, "layer drawn anew, from the output", "rank correlation")
        return self._outcome(
            ranked.mean(1), curve=curve, details=details, caveats=tuple(_about_layers(details))
        )

    def _unmoved(self, found: dict[str, Tensor]) -> float:
        """The share of stages up to the first whose mean rank correlation is below the threshold:
        of guided backpropagation most, of the gradient few.
        """
        low = (found["rank_correlation"].mean(0) < self.threshold).tolist()
        return (low.index(True) if True in low else len(low)) / len(low)

    def _through(
        self,
        subject: Subject,
        found: dict[str, Tensor],
        details: dict[str, Any],
        final: list[Tensor],
    ) -> Outcome:
        """The outcome of all layers drawn anew, one after another: the verdict."""
        caveats = _about_layers(details)
        means = {name: bootstrap(found[name][:, -1]) for name in _DECIDING if name in found}
        passed: bool | None = all(one.high < self.threshold for one in means.values())
        details["final"] = means
        details["unmoved"] = self._unmoved(found)
        if not passed:
            caveats += _about_zeros(subject.places, final, self.threshold)
        known = bootstrap(details["again"]["rank_correlation"]).mean
        if known < UNNOTICED:
            caveats.append(
                "explained again by method=, the model itself gives other maps (rank correlation "
                f"{known:.2g}): are target, baseline and method those of the maps?"
            )
        places = subject.places[0].numel()
        if places < FEW:
            caveats.append(f"maps of {places} places are alike by chance: no verdict")
        if known < self.threshold or places < FEW:
            passed = None
        if subject.batch == 1:
            caveats.append("one example has no interval: the verdict rests on its value alone")
        flat = sum(int((_constant(one) & ~_constant(subject.places)).sum()) for one in final)
        if flat:
            caveats.append(
                f"{flat} of {len(final) * subject.batch} maps of models drawn anew are constant, "
                "and count as not alike: such a model may answer nothing at all"
            )
        ranked = torch.stack(
            [details["again"]["rank_correlation"], *found["rank_correlation"].T], 1
        )
        share = torch.linspace(0, 1, ranked.shape[1], dtype=torch.float64, device=ranked.device)
        return self._outcome(
            ranked[:, -1],
            curve=Curve(share, ranked, "share of layers drawn anew", "rank correlation"),
            passed=passed,
            threshold=self.threshold,
            details=details,
            caveats=tuple(caveats),
        )


def _alike(a: Tensor, b: Tensor, structured: bool) -> dict[str, Tensor]:
    """How alike maps [B, *spatial] are, float64 [B] by measure; a map and its negative are alike.

    structured: whether places have neighbours, unlike the features of a table.
    """
    found = {
        "rank_correlation": _known(rank_correlation(a, b).abs(), a, b),
        "rank_correlation_of_magnitudes": _known(rank_correlation(a.abs(), b.abs()), a, b),
    }
    if structured and a.dim() <= 4:
        for name, measure in (("rank_ssim", rank_ssim), ("ssim", ssim)):
            found[name] = _known(torch.maximum(measure(a, b), measure(a, -b)), a, b)
    return found


def _known(similarity: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where one map is constant and similarity not defined: the other is constant too, or not."""
    both = (_constant(a) & _constant(b)).to(similarity.dtype)
    return torch.where(similarity.isnan(), both, similarity)


def _constant(maps: Tensor) -> Tensor:
    rows = maps.flatten(1)
    return rows.amax(1) == rows.amin(1)


def _places(maps: Tensor) -> Tensor:
    return maps if maps.dim() == 2 else maps.sum(1)


def _scores(model: Any, subject: Subject) -> Tensor:
    """The scores of the inputs by another model, float64 [B]."""
    scorer = Scorer(model, subject.inputs, subject.classes, subject.running)
    return scorer.again()[0].scores


def _restore(copy: Randomised, layers: Iterable[int]) -> None:
    for number in layers:
        copy.restore(number)


def _groups(layers: int, stages: int | None) -> list[list[int]]:
    """Numbers of layers in groups of as equal size as can be."""
    count = layers if stages is None else min(stages, layers)
    ends = [layers * one // count for one in range(count + 1)]
    return [list(range(start, stop)) for start, stop in pairwise(ends)]


def _joined(names: list[str]) -> str:
    names = [name or "(model)" for name in names]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _pairs(maps: Sequence[Tensor], structured: bool) -> dict[str, float]:
    """The mean similarity of each of several batches of maps with the next."""
    if len(maps) < 2:
        return {}
    found = [_alike(one, other, structured) for one, other in pairwise(maps)]
    return {name: float(torch.stack([one[name] for one in found]).mean()) for name in found[0]}


def _about_layers(details: dict[str, Any]) -> list[str]:
    names = details["unchanged"]
    if not names:
        return []
    return [
        f"{len(names)} layers are the same when drawn anew, so that their stages tell nothing: "
        + ", ".join(names[:4])
        + (", ..." if len(names) > 4 else "")
    ]


def _about_zeros(maps: Tensor, final: list[Tensor], threshold: float) -> list[str]:
    """What is left of the rank correlation where not both maps are zero."""
    left, shares = [], []
    for other in final:
        for a, b in zip(maps.flatten(1), other.flatten(1), strict=True):
            some = (a != 0) | (b != 0)
            shares.append(1.0 - float(some.double().mean()))
            left.append(
                rank_correlation(a[some][None], b[some][None]).abs() if some.any() else None
            )
    known = torch.cat(
        [one for one in left if one is not None] or [torch.ones(1, device="cpu")]
    ).nanmean()
    share = sum(shares) / len(shares)
    if share == 0 or not float(known) < threshold:
        return []
    return [
        f"{100 * share:.0f} % of places are zero in both maps, before and after; the rank "
        f"correlation of the others is {float(known):.2g}: what stays is mostly where zeros are, "
        "which an input may decide without the model"
    ]
