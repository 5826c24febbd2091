"""Faithfulness by perturbation: whether a map predicts how much the output changes when random or
fixed sets of positions are perturbed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import Replacement, Subject, check_replacement, true_rows
from saliency_fast.evaluate.metric import FAITHFULNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.positions import (
    PER,
    block_sums,
    blocks,
    check_share,
    check_shares,
    random_ranks,
    ranking,
    spatial_shape,
    value_range,
)
from saliency_fast.evaluate.scores import OUTPUTS
from saliency_fast.evaluate.similarity import correlation
from saliency_fast.methods.parts import checks
from saliency_fast.ops import (
    noise_points,
    philox,
    random_bits,
    rank_points,
    segment_points,
    window_points,
)

PERTURBATIONS = ("gaussian", "patches", "squares")
SUBSETS = ("random", "ranked")
ELEMENTS = 2**22
"""Elements of subsets, or of products with a map, that are in memory at once."""
Write = Callable[[Tensor, Tensor], Tensor]


@in_suite(FAITHFULNESS, "Yeh et al., 2019", quick={"samples": 20})
@dataclass(frozen=True)
class Infidelity(Metric):
    """The mean over perturbations I of (sum(I * map) - (f(x) - f(x - I)))^2 (Yeh, 2019), in squared
    units of the output: low where the map predicts what a perturbation does.

    `details`: `of_zero_map`, the infidelity of a zero map, and with `scaled` the `factor`, each
    float64 [B].

    Args:
        perturbation: "gaussian" noise; "squares", blocks of `patch` positions per axis at random
            positions, which are replaced; or "patches", all blocks of a grid of them,
            once each.
        samples: The number of perturbations, except of "patches".
        sigma: The standard deviation of the noise, as a share of each example's range.
        patch: One size or several, to average over.
        substrate: What replaces positions: "zero", "mean", "blur", "uniform", a number or a tensor.
        cumulative: Whether patches stay replaced while the next ones are, in reading order.
        contributions: Whether the map's values are contributions of positions to the output
            relative to the replacement (Integrated Gradients, Shapley values), rather than changes
            of the output per unit of the input (gradients): they are divided by x - replacement. A
            map with one value for all channels holds their sum then, else the value of each.
        scaled: Whether the map is multiplied by the best factor first.
        output: "logit" or "softmax".
        seed: Of the noise and the random positions, the same for all examples.

    Example:
        >>> model, x = torch.nn.Linear(4, 3), torch.arange(4.0)[None]
        >>> infidelity = Infidelity(samples=5)
        >>> bool(infidelity(model, x, model.weight[:1], target=0).values < 1e-9)
        True
    """

    perturbation: str = "gaussian"
    samples: int = 100
    sigma: float = 0.1
    patch: int | tuple[int, ...] = 4
    substrate: Replacement = "zero"
    cumulative: bool = False
    contributions: bool = False
    scaled: bool = False
    output: str = "logit"
    seed: int = 0
    name = "infidelity"
    better = "lower"
    needs = ("model",)

    def __post_init__(self) -> None:
        check_fields(self, perturbation=PERTURBATIONS, samples=1, sigma=checks.positive)
        if isinstance(self.patch, tuple) and not self.patch:
            raise InputError("patch is an empty tuple: pass at least one size")
        for size in self._sizes:
            checks.integer("patch", size, 1)
        flag = checks.boolean
        check_fields(self, cumulative=flag, contributions=flag, scaled=flag)
        if self.cumulative and self.perturbation != "patches":
            raise InputError(
                f"cumulative is of perturbation='patches': got {self.perturbation!r}; leave it out"
            )
        check_fields(self, substrate=check_replacement, output=OUTPUTS, seed=0)

    def _evaluate(self, data: Subject) -> Outcome:
        x = data.inputs
        fill = data.fill(self.substrate, self.seed)
        slope = _per_unit(data.values, x, fill) if self.contributions else data.values
        sizes = (0,) if self.perturbation == "gaussian" else self._sizes
        predicted, measured, weights = [], [], []
        for number, size in enumerate(sizes):
            count, write = self.perturbations(x, fill, size, number)
            products, drops = _products_and_drops(data, slope, count, write, self.output)
            predicted.append(products)
            measured.append(drops)
            weights.append(drops.new_full((1, count), 1.0 / (count * len(sizes))))
        a, b, weight = torch.cat(predicted, 1), torch.cat(measured, 1), torch.cat(weights, 1)
        details = {"of_zero_map": (weight * b * b).sum(1)}
        if self.scaled:
            below = (weight * a * a).sum(1, keepdim=True)
            factor = torch.where(below > 0, (weight * a * b).sum(1, keepdim=True) / below, 0.0)
            a, details["factor"] = factor * a, factor[:, 0]
        values = (weight * (a - b) ** 2).sum(1)
        gaussian = self.perturbation == "gaussian"
        still = value_range(x) == 0 if gaussian else (x == fill).flatten(1).all(1)
        caveats: tuple[str, ...] = ()
        if bool(still.any()):
            rows = true_rows(still)
            caveats = (f"no perturbation changes examples {rows}: no infidelity is defined",)
        return self._outcome(values.masked_fill(still, math.nan), details=details, caveats=caveats)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.patch if isinstance(self.patch, tuple) else (self.patch,)

    def perturbations(self, x: Tensor, fill: Tensor, size: int, number: int) -> tuple[int, Write]:
        """How many perturbations of a patch size there are, and write(example, number) of their
        points; `number` counts the sizes.
        """
        spatial = spatial_shape(x)
        if self.perturbation == "gaussian":
            sigma = self.sigma * value_range(x)
            seed = torch.full((len(x),), self.seed, device=x.device)
            return self.samples, lambda i, n: noise_points(x, sigma, seed, i, n, False, 0)
        edge = torch.tensor([min(size, one) for one in spatial], device=x.device)
        if self.perturbation == "squares":
            sample = torch.arange(self.samples, device=x.device) + number * self.samples
            seed = torch.full_like(sample, self.seed)
            words = random_bits(seed, sample, len(spatial), 0, philox.MASK)
            room = torch.tensor(spatial, device=x.device) - edge + 1
            start = (words * room) >> 32
        else:
            ticks = [torch.arange(0, one, size, device=x.device) for one in spatial]
            start = torch.cartesian_prod(*ticks).view(-1, len(spatial))
        if self.cumulative:
            rank = blocks(spatial, size, x.device)[None].int()
            return len(start), lambda i, n: rank_points(x, fill, rank, i, n + 1)
        stop = start + edge
        if x.dim() > 2:  # all channels
            start = functional.pad(start, (1, 0))
            stop = functional.pad(stop, (1, 0), value=x.shape[1])
        return len(start), lambda i, n: window_points(x, fill, i, start[n], stop[n])


def _products_and_drops(
    data: Subject, slope: Tensor, count: int, write: Write, output: str
) -> tuple[Tensor, Tensor]:
    """What the map predicts for each perturbation and how far the output drops, float64
    [B, count].
    """
    x = data.inputs
    products = torch.zeros((data.batch, count), dtype=torch.float64, device=x.device)

    def perturbed(example: Tensor, number: Tensor) -> Tensor:
        points = write(example, number)
        products[example, number] = _products(x, slope, points, example)
        return points

    first, points = data.scorer.grid(perturbed, count, numbers_first=True)
    return products, first.of(output)[:, None] - points.of(output)


def _products(x: Tensor, slope: Tensor, points: Tensor, example: Tensor) -> Tensor:
    """sum((x - point) * slope) of every row, float64 [R]."""
    rows = max(1, ELEMENTS // max(1, x[0].numel()))
    parts = []
    for start in range(0, len(example), rows):
        own = example[start : start + rows]
        change = x[own].sub_(points[start : start + rows]).mul_(slope[own])
        parts.append(change.flatten(1).sum(1, dtype=torch.float64))
    return torch.cat(parts)


def _per_unit(values: Tensor, x: Tensor, fill: Tensor) -> Tensor:
    """Contributions divided by x - fill, undivided where that is zero."""
    gap = x - fill
    apart = gap != 0
    if values.shape != x.shape:
        # A value for all channels is shared by those that change.
        changing = apart.sum(1, keepdim=True)
        values = values / torch.where(changing == 0, x.shape[1], changing)
    return values / torch.where(apart, gap, 1.0)


class _Correlation(Metric):
    """Correlations between sums of a map over subsets of positions and drops of the output.

    Args:
        samples: The number of random subsets of each size, the same for all examples.
        patch: Above 1, blocks of so many positions per axis count as one position, since pixels of
            an image do not change one by one.
        substrate: What replaces positions: "zero", "mean", "blur", "uniform", a number or a tensor.
        per: "place" sums the map over channels, "element" takes each by itself.
        output: "logit" or "softmax".
        seed: Of the subsets.
    """

    samples: int
    patch: int
    substrate: Replacement
    per: str
    output: str
    seed: int
    better = "higher"
    needs = ("model",)
    takes_missing = True

    def __post_init__(self) -> None:
        check_fields(self, samples=2, substrate=check_replacement, per=PER, patch=1)
        if self.patch > 1 and self.per != "place":
            raise InputError(f"patch goes with per='place': got per={self.per!r}")
        check_fields(self, output=OUTPUTS, seed=0)

    def _elements(self, data: Subject) -> tuple[Tensor, Tensor]:
        """The map's values that subsets are made of, float64 [B, P], and which of them each element
        of an input belongs to, int64 [1, *].
        """
        if self.patch > 1:
            sums, block = block_sums(data.places, self.patch)
            return sums, block[None]
        by_element = self.per == "element"
        maps = data.values.expand(data.inputs.shape) if by_element else data.places
        values = maps.flatten(1).double()
        return values, torch.arange(values.shape[1], device=values.device)[None]

    def _correlations(self, data: Subject, fill: Tensor, counts: Sequence[int]) -> Tensor:
        """Correlations over random subsets of each size, float64 [B, N]."""
        x, batch, several = data.inputs, data.batch, len(counts)
        values, own = self._elements(data)
        positions, ends = values.shape[1], torch.tensor(counts, device=x.device)

        def subsets(key: Tensor) -> Tensor:
            """Which positions each subset holds, bool [U, P], for samples and sizes."""
            sample, row = torch.unique(key // several, return_inverse=True)
            rank = random_ranks(self.seed, sample, positions)[row]
            return rank < ends[key % several, None]

        def write(example: Tensor, key: Tensor) -> Tensor:
            keys, row = torch.unique(key, return_inverse=True)
            points: Tensor = segment_points(x, fill, own, ~subsets(keys), example, row)
            return points

        # A launch holds all examples of a sample, whose subsets are drawn once.
        keys = torch.arange(self.samples * several, device=x.device)
        scorer = data.scorer_beside(fill)
        first, points = scorer.grid(write, len(keys), numbers_first=True)
        drops = first.of(self.output)[:, None] - points.of(self.output)
        step = max(1, ELEMENTS // positions)
        parts = (keys[start : start + step] for start in range(0, len(keys), step))
        sums = torch.cat([values @ subsets(part).T.double() for part in parts], 1)

        def by_size(rows: Tensor) -> Tensor:
            return rows.view(batch, -1, several).movedim(1, 2).reshape(batch * several, -1)

        return correlation(by_size(sums), by_size(drops.contiguous())).view(batch, several)


@in_suite(FAITHFULNESS, "Ancona et al., 2018", quick={"samples": 20})
@dataclass(frozen=True)
class SensitivityN(_Correlation):
    """Pearson's correlation between the sum of the map over a subset of n positions and the drop of
    the output where they are replaced (Ancona, 2018), averaged over several n: 1 where
    the map adds up. The subsets of a sample are nested.

    Args:
        shares: n as shares of the positions, at least one position each.
        subsets: "random", or "ranked": the positions that rank highest, one subset per share, with
            the correlation over shares; `details["across_examples"]` holds the protocol of Quantus,
            for each share the correlation over examples between the sum of the last step's
            positions and the whole drop.

    Example:
        >>> model, x = torch.nn.Linear(9, 3), torch.rand(2, 9)
        >>> outcome = SensitivityN(samples=20)(model, x, x * model.weight[0], target=0)
        >>> [round(one, 3) for one in outcome.values.tolist()]
        [1.0, 1.0]
    """

    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 0.5)
    samples: int = 100
    patch: int = 1
    substrate: Replacement = "zero"
    subsets: str = "random"
    per: str = "place"
    output: str = "logit"
    seed: int = 0
    name = "sensitivity-n"

    def __post_init__(self) -> None:
        check_fields(self, shares=check_shares, subsets=SUBSETS)
        super().__post_init__()
        if self.subsets == "ranked" and self.patch > 1:
            raise InputError(f"patch is of subsets='random': got {self.patch}; leave it out")
        if self.subsets == "ranked" and len(self.shares) < 2:
            raise InputError(
                "shares must be several for subsets='ranked': a correlation is of them"
            )

    def _evaluate(self, data: Subject) -> Outcome:
        fill = data.fill(self.substrate, self.seed, missing=True)
        positions = self._elements(data)[0].shape[1]
        counts = [max(1, round(share * positions)) for share in self.shares]
        if self.subsets == "ranked":
            return self._ranked(data, fill, counts)
        correlations = self._correlations(data, fill, counts)
        shares = correlations.new_tensor([count / positions for count in counts])
        curve = Curve(shares, correlations, "share of the positions in a subset", "correlation")
        return self._outcome(correlations.nanmean(1), curve=curve, caveats=_undefined(correlations))

    def _ranked(self, data: Subject, fill: Tensor, counts: list[int]) -> Outcome:
        x = data.inputs
        rank, sequence = ranking(data.values, x, self.per, "most_first")
        ends = torch.tensor(counts, device=x.device)
        sums = self._elements(data)[0].gather(1, sequence).cumsum(1)[:, ends - 1]

        def write(example: Tensor, number: Tensor) -> Tensor:
            points: Tensor = rank_points(x, fill, rank, example, ends[number])
            return points

        first, points = data.scorer_beside(fill).grid(write, len(counts))
        drops = first.of(self.output)[:, None] - points.of(self.output)
        steps = sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1]))
        details = {"across_examples": correlation(steps.T, drops.T), "sums": sums, "drops": drops}
        values = correlation(sums, drops)
        return self._outcome(values, details=details, caveats=_undefined(values[:, None]))


@dataclass(frozen=True)
class FaithfulnessCorrelation(_Correlation):
    """Pearson's correlation between the sum of the map over random subsets of `size` positions and
    the drop of the output where they are replaced (Bhatt, 2020): 1 where the map adds up.

    Args:
        size: A number of positions, or a share of them as a float.

    Example:
        >>> model, x = torch.nn.Linear(9, 3), torch.rand(1, 9)
        >>> outcome = FaithfulnessCorrelation(3, 20)(model, x, x * model.weight[0], target=0)
        >>> round(float(outcome.values), 3)
        1.0
    """

    size: int | float = 0.1
    samples: int = 100
    patch: int = 1
    substrate: Replacement = "zero"
    per: str = "place"
    output: str = "logit"
    seed: int = 0
    name = "faithfulness correlation"

    def __post_init__(self) -> None:
        check_fields(self, size=check_share if isinstance(self.size, float) else 1)
        super().__post_init__()

    def _evaluate(self, data: Subject) -> Outcome:
        fill = data.fill(self.substrate, self.seed, missing=True)
        positions, size = self._elements(data)[0].shape[1], self.size
        count = max(1, round(size * positions)) if isinstance(size, float) else size
        if count > positions:
            raise InputError(
                f"size must be at most the {positions} positions of an input: got {count}"
            )
        correlations = self._correlations(data, fill, [count])
        return self._outcome(
            correlations[:, 0], parameters={"places": count}, caveats=_undefined(correlations)
        )


def _undefined(correlations: Tensor) -> tuple[str, ...]:
    """A caveat where correlations [B, N] are of constants."""
    rows = true_rows(correlations.isnan().any(1))
    if not rows:
        return ()
    return (
        f"sums or drops of examples {rows} do not vary for some subset sizes, which are left out",
    )
