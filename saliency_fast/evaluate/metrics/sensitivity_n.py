"""Sensitivity-n: do a map's sums over subsets of places follow what their removal does?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saliency_fast.errors import InputError, InputTypeError
from saliency_fast.evaluate.metric import Metric, check_output
from saliency_fast.evaluate.metrics.infidelity import blocks
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.ranking import PER, ranking
from saliency_fast.evaluate.similarity import correlation
from saliency_fast.evaluate.subject import Subject
from saliency_fast.evaluate.substrates import Substrate, check_substrate
from saliency_fast.methods.parts import checks
from saliency_fast.ops import philox, random_bits, rank_points, segment_points

SUBSETS = ("random", "ranked")
ELEMENTS = 2**22
"""Elements of subsets that are held at once."""


@dataclass(frozen=True)
class SensitivityN(Metric):
    """Pearson's correlation between the sum of the map over a subset of n places and the drop of
    the output where the substrate replaces them (Ancona, 2018), averaged over several n: 1 where
    the map adds up.

    shares: n as shares of the places, at least one place each. samples: random subsets of each
    size; those of a sample lie in each other, and all examples have the same. patch: 1 removes
    single places; above, boxes of so many places along each axis count as one place, for images are
    not made of pixels that come and go alone. subsets: "random", or "ranked": the places that rank
    highest, one subset per share, so that the correlation runs over the shares;
    `details["across_examples"]` then holds Quantus's protocol, for each share the correlation over
    examples between what the last step's places sum to and the whole drop. per: "place" sums the
    map over channels, "element" takes each by itself. output: "logit" or "softmax". seed: of the
    subsets.
    """

    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 0.5)
    samples: int = 100
    patch: int = 1
    substrate: Substrate = "zero"
    subsets: str = "random"
    per: str = "place"
    output: str = "logit"
    seed: int = 0
    name = "sensitivity-n"
    better = "higher"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    takes_missing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_shares(self.shares)
        checks.choice("subsets", self.subsets, SUBSETS)
        checks.whole("samples", self.samples, 2)
        _check_rest(self)
        if self.subsets == "ranked" and self.patch > 1:
            raise InputError(f"patch is of subsets='random': got {self.patch}; leave it out")
        if self.subsets == "ranked" and len(self.shares) < 2:
            raise InputError(
                "shares must be several for subsets='ranked': a correlation is of them"
            )

    def _judge(self, subject: Subject) -> Outcome:
        fill = subject.fill(self.substrate, self.seed, missing=True)
        values = _elements(subject, self)[0]
        places = values.shape[1]
        counts = [max(1, round(share * places)) for share in self.shares]
        if self.subsets == "ranked":
            return self._ranked(subject, fill, counts)
        found = _correlations(subject, fill, counts, self)
        curve = Curve(
            found.new_tensor([count / places for count in counts]),
            found,
            "share of the places in a subset",
            "correlation",
        )
        return self._outcome(found.nanmean(1), curve=curve, caveats=_unknown(found))

    def _ranked(self, subject: Subject, fill: Tensor, counts: list[int]) -> Outcome:
        x, batch = subject.inputs, subject.batch
        rank, sequence = ranking(subject.values, x, self.per, "most_first")
        sums = _elements(subject, self)[0].gather(1, sequence).cumsum(1)
        ends = torch.tensor(counts, device=x.device)
        sums = sums[:, ends - 1]
        item = torch.arange(batch, device=x.device).repeat_interleave(len(counts))

        def write(item: Tensor, count: Tensor) -> Tensor:
            points: Tensor = rank_points(x, fill, rank, item, count)
            return points

        first, found = subject.scorer_beside(fill).at(write, item, ends.repeat(batch))
        drops = first.of(self.output)[:, None] - found.of(self.output).view(batch, -1)
        steps = sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1]))
        across = correlation(steps.T, drops.T)
        values = correlation(sums, drops)
        details = {"across_examples": across, "sums": sums, "drops": drops}
        return self._outcome(values, details=details, caveats=_unknown(values[:, None]))


@dataclass(frozen=True)
class FaithfulnessCorrelation(Metric):
    """Pearson's correlation between the sum of the map over a random subset of `size` places and
    the drop of the output where the substrate replaces them (Bhatt, 2020): 1 where the map adds up.

    size: a number of places, or a share of them as a float. samples: subsets, the same for all
    examples. patch: boxes of so many places along each axis that count as one place. per: "place"
    sums the map over channels, "element" takes each by itself. output: "logit" or "softmax". seed:
    of the subsets.
    """

    size: int | float = 0.1
    samples: int = 100
    patch: int = 1
    substrate: Substrate = "zero"
    per: str = "place"
    output: str = "logit"
    seed: int = 0
    name = "faithfulness correlation"
    better = "higher"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    takes_missing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.size, float):
            check_shares((self.size,), "size")
        else:
            checks.whole("size", self.size, 1)
        checks.whole("samples", self.samples, 2)
        _check_rest(self)

    def _judge(self, subject: Subject) -> Outcome:
        fill = subject.fill(self.substrate, self.seed, missing=True)
        places, size = _elements(subject, self)[0].shape[1], self.size
        count = max(1, round(size * places)) if isinstance(size, float) else size
        if count > places:
            raise InputError(f"size must be at most the {places} places of an input: got {count}")
        found = _correlations(subject, fill, [count], self)
        return self._outcome(found[:, 0], parameters={"places": count}, caveats=_unknown(found))


def check_shares(shares: object, name: str = "shares") -> None:
    """Raises unless they are rising shares, above 0 and at most 1."""
    if not isinstance(shares, tuple) or not shares:
        raise InputTypeError(f"{name} must be a tuple such as (0.1, 0.5): got {shares!r}")
    for one in shares:
        checks.positive(name, one)
        checks.share(name, one)
    if any(one >= other for one, other in itertools.pairwise(shares)):
        raise InputError(f"{name} must rise: got {shares}")


def subset_ranks(seed: int, sample: Tensor, places: int) -> Tensor:
    """A random order of the places for each sample [S], as the rank of each place, int64 [S, P]."""
    words = random_bits(torch.full_like(sample, seed), sample, places, 0, philox.ORDER)
    rank = torch.empty_like(words)
    place = torch.arange(places, device=sample.device).expand_as(rank)
    found: Tensor = rank.scatter_(1, words.argsort(dim=1, stable=True), place)
    return found


def _check_rest(metric: SensitivityN | FaithfulnessCorrelation) -> None:
    check_substrate(metric.substrate)
    checks.choice("per", metric.per, PER)
    checks.whole("patch", metric.patch, 1)
    if metric.patch > 1 and metric.per != "place":
        raise InputError(f"patch goes with per='place': got per={metric.per!r}")
    check_output(metric.output)
    checks.whole("seed", metric.seed, 0)


def _correlations(
    subject: Subject,
    fill: Tensor,
    counts: Sequence[int],
    metric: SensitivityN | FaithfulnessCorrelation,
) -> Tensor:
    """Correlations over random subsets of each size, float64 [B, N]."""
    x, batch, several = subject.inputs, subject.batch, len(counts)
    values, own = _elements(subject, metric)
    places, ends = values.shape[1], torch.tensor(counts, device=x.device)

    def subsets(key: Tensor) -> Tensor:
        """Which places each subset holds, bool [U, P], for samples and sizes."""
        sample, row = torch.unique(key // several, return_inverse=True)
        rank = subset_ranks(metric.seed, sample, places)[row]
        return rank < ends[key % several, None]

    def write(item: Tensor, key: Tensor) -> Tensor:
        keys, row = torch.unique(key, return_inverse=True)
        points: Tensor = segment_points(x, fill, own, ~subsets(keys), item, row)
        return points

    # All examples of a sample side by side, since its subsets are drawn once a launch.
    keys = torch.arange(metric.samples * several, device=x.device)
    item = torch.arange(batch, device=x.device).repeat(len(keys))
    first, points = subject.scorer_beside(fill).at(write, item, keys.repeat_interleave(batch))
    drops = first.of(metric.output)[:, None] - points.of(metric.output).view(-1, batch).T
    step = max(1, ELEMENTS // places)
    parts = (keys[start : start + step] for start in range(0, len(keys), step))
    sums = torch.cat([values @ subsets(part).T.double() for part in parts], 1)

    def by_size(found: Tensor) -> Tensor:
        return found.view(batch, -1, several).movedim(1, 2).reshape(batch * several, -1)

    return correlation(by_size(sums), by_size(drops)).view(batch, several)


def _elements(
    subject: Subject, metric: SensitivityN | FaithfulnessCorrelation
) -> tuple[Tensor, Tensor]:
    """The map's numbers that subsets are made of, float64 [B, P], and of which of them each element
    of an input is a part, int64 [1, *].
    """
    x = subject.inputs
    if metric.per == "element":
        values = subject.values.expand(x.shape).flatten(1)
    else:
        values = subject.places.flatten(1)
    own = torch.arange(values.shape[1], device=x.device)[None]
    if metric.patch > 1:
        own = blocks(x.shape[2:] if x.dim() > 2 else x.shape[1:], metric.patch, x.device).long()
        sums = torch.zeros((len(x), int(own.max()) + 1), dtype=torch.float64, device=x.device)
        return sums.index_add_(1, own[0], values.double()), own
    return values.double(), own


def _unknown(found: Tensor) -> tuple[str, ...]:
    """A caveat where correlations [B, N] are of constants."""
    rows = found.isnan().any(1).nonzero().flatten().tolist()
    if not rows:
        return ()
    return (
        f"sums or drops of examples {rows[:8]} do not vary for some subset sizes, which are left "
        "out",
    )
