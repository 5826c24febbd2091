"""Faithfulness: whether replacing the positions that a map marks changes the model's output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from saliency_fast import ops
from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Replacement,
    check_replacement,
    true_rows,
)
from saliency_fast.evaluate.maps import (
    ORDERS,
    PER,
    block_sums,
    blocks,
    check_shares,
    correlation,
    random_ranks,
    ranking,
    spatial_shape,
    value_range,
)
from saliency_fast.evaluate.metric import FAITHFULNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.metrics.inpaint import inpaint
from saliency_fast.evaluate.outcome import Curve, Outcome, caveats_of
from saliency_fast.evaluate.scores import OUTPUTS, Write
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import read_targets
from saliency_fast.ops import philox

ACCURACY, INPAINT = "accuracy", "inpaint"
OUTPUT_NAMES = {
    ACCURACY: "share decided as the target",
    "softmax": "probability of the target",
    "logit": "output of the target",
}
PERTURBATIONS = ("gaussian", "patches", "squares")
SUBSETS = ("random", "ranked")
QUICK_STEPS = {"steps": 20}
ELEMENTS = 2**22
"""Elements of subsets, or of products with a map, that are in memory at once."""


@dataclass(frozen=True)
class _Ranked(Metric):
    """The area under the target's score while positions are deleted or inserted by their rank.

    Args:
        substrate: What replaces the removed positions: "zero", "mean", "blur", "uniform", a number
            or a tensor.
        output: "softmax" (the target's probability) or "logit" (its output as it is).
        steps: The number of steps, of as equal size as possible.
        step_size: Positions per step, instead of `steps`.
        per: "place" removes all channels of a position together, "element" each by itself.
        order: "most_first" or "least_first".
        seed: Of the uniform replacement.
    """

    substrate: Replacement = "zero"
    output: str = "softmax"
    steps: int = 100
    step_size: int | None = None
    per: str = "place"
    order: str = "most_first"
    seed: int = 0
    needs = ("model",)
    takes_missing = True
    inserts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, substrate=check_replacement, output=OUTPUTS, per=PER, order=ORDERS)
        check_fields(self, steps=_steps, step_size=checks.optional(_steps))

    def counts(self, positions: int) -> Tensor:
        """How many of the positions are removed after each step, int64 from 0 to all."""
        if self.step_size is not None:
            ends = torch.arange(0, positions, self.step_size, device="cpu")
            return torch.cat([ends, torch.tensor([positions], device="cpu")])
        ends = torch.arange(min(self.steps, positions) + 1, dtype=torch.int64, device="cpu")
        return (ends * positions + ends[-1] // 2) // ends[-1]

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x = data.inputs
        fill = data.fill(self.substrate, self.seed, missing=True)
        rank, sequence = ranking(data.values, x, self.per, self.order)
        counts = self.counts(rank.shape[1]).to(x.device)
        begin, end = (fill.expand_as(x).contiguous(), x) if self.inserts else (x, fill)
        changes, row = _distinct(begin, end, sequence, counts)
        example, step = changes.nonzero().unbind(1)

        _, points = data.scorer_beside(fill).at(
            lambda i, count: ops.rank_points(begin, end, rank, i, count), example, counts[step]
        )
        share = counts.double() / rank.shape[1]
        name = "share inserted" if self.inserts else "share deleted"
        curve = Curve(share, points.of(self.output)[row], name, OUTPUT_NAMES[self.output])
        parameters = {"steps": len(counts) - 1, "step_size": int(counts.diff().max())}
        return self._outcome(curve.area(), curve=curve, parameters=parameters)


def _steps(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number, 1 or more: got {value!r}")


def _distinct(
    begin: Tensor, end: Tensor, sequence: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Which steps change an example's point, and each step's row among the points, [B, n] each."""
    batch, positions = sequence.shape
    differs = (begin != end).view(batch, -1, positions).any(1).gather(1, sequence)
    changed = torch.zeros(batch, positions + 1, dtype=torch.int64, device=sequence.device)
    torch.cumsum(differs, 1, out=changed[:, 1:])
    reached = changed[:, counts]
    changes = torch.ones_like(reached, dtype=torch.bool)
    changes[:, 1:] = reached[:, 1:] > reached[:, :-1]
    return changes, changes.flatten().cumsum(0).view_as(changes) - 1


@in_suite(FAITHFULNESS, "Samek et al., 2017; Petsiuk et al., 2018", quick=QUICK_STEPS)
class Deletion(_Ranked):
    """The area under the target's score while the positions that a map ranks highest are replaced
    (Samek, 2017; Petsiuk, 2018): low where the map finds what matters.

    Example:
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> Deletion(steps=4)(model, x, x, target=0).curve.y.shape
        torch.Size([2, 5])
    """

    name = "deletion"
    better = "lower"


@in_suite(FAITHFULNESS, "Petsiuk et al., 2018", quick=QUICK_STEPS)
class Insertion(_Ranked):
    """The area under the target's score while the positions that a map ranks highest are inserted
    into the replacement baseline (Petsiuk, 2018): high where the map finds what matters.

    Example:
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
        >>> Insertion(step_size=1)(model, x, x, target=0).curve.x
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """

    name = "insertion"
    better = "higher"
    inserts = True


@in_suite(FAITHFULNESS, "Rong et al., 2022", quick={"shares": (0.1, 0.3, 0.5)})
@dataclass(frozen=True)
class Road(Metric):
    """The target's output, averaged over shares, while the positions that a map ranks highest are
    imputed from their neighbours (Rong, 2022): low where the map finds what matters. Imputation
    with some noise leaves no holes whose shape could tell the class.

    Args:
        shares: Of the positions that are imputed, rounded down to whole positions.
        order: "most_first", or "least_first", for which high is better.
        output: "accuracy" (whether the decision is the target), "softmax" or "logit".
        noise: Its standard deviation, as a share of each example's range.
        seed: Of the noise.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> Road(shares=(0.25, 0.5))(model, x, x, target=0, layout="BCHW").curve.x
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    order: str = "most_first"
    output: str = ACCURACY
    noise: float = 0.01
    seed: int = 0
    name = "ROAD"
    better = "lower"
    needs = ("model",)

    def __post_init__(self) -> None:
        outputs = (ACCURACY, *OUTPUTS)
        check_fields(self, shares=check_shares, order=ORDERS, output=outputs, seed=0)
        if self.noise != 0:
            checks.positive("noise", self.noise)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x = data.inputs
        classes = _classes(data) if self.output == ACCURACY else None
        rank, _ = ranking(data.values, x, "place", self.order)
        positions = rank.shape[1]
        # A share such as .29 of 100 positions is 29 of them, in spite of rounding.
        counts = [math.floor(share * positions + 1e-9) for share in self.shares]
        ends = torch.tensor(counts, device=x.device)
        sigma = self.noise * value_range(x)

        def write(example: Tensor, number: Tensor) -> Tensor:
            missing = (rank[example] < ends[number, None]).view(-1, *x.shape[2:])
            imputed = inpaint(x[example], missing)
            if self.noise == 0:
                return imputed
            row = torch.arange(len(example), device=x.device)
            seed = torch.full_like(example, self.seed)
            noisy = ops.noise_points(imputed, sigma[example], seed, row, number, False, 0)
            return torch.where(missing[:, None], noisy, imputed)

        _, points = data.scorer.grid(write, len(counts))
        if classes is None:
            values = points.of(self.output)
        else:
            values = (points.decided("output='accuracy'") == classes[:, None]).double()
        curve = Curve(ends.double() / positions, values, "share imputed", OUTPUT_NAMES[self.output])
        better = "lower" if self.order == "most_first" else "higher"
        return dataclasses.replace(self._outcome(values.mean(1), curve=curve), better=better)


@in_suite(FAITHFULNESS, "Chang et al., 2019", quick={"draws": 3})
@dataclass(frozen=True)
class Counterfactual(Metric):
    """Whether the decision changes, 1 or 0, where the positions that a map ranks highest are
    replaced (after Chang, 2019).

    NaN where the decision is not the target to begin with. `details`, each [B]: `decision`
    (int64), `drop_softmax`, `drop_logit`; `random`, the share of random regions that change the
    decision, with `random_drop_softmax` and `random_drop_logit`; `needed_share`, the smallest of
    `shares` that changes the decision, NaN where none does.

    Args:
        share: Of the positions, at least one.
        patch: Above 1, blocks of so many positions per axis are ranked by their sums and replaced
            as a whole, since scattered positions are hardly missed.
        by: "inpaint" imputes positions from their neighbours (Rong, 2022); or a replacement:
            "blur", "mean", "zero", "uniform", a number or a tensor.
        draws: The number of random regions of equal size: the same region shifted around the
            edges, or random features where inputs have no axes.
        shares: Tried in turn for the smallest one that changes the decision.
        seed: Of the draws, the same for all examples, and of the uniform replacement.

    Example:
        >>> model, x = torch.nn.Linear(4, 2), torch.ones(1, 4)
        >>> outcome = Counterfactual(by="zero", draws=2)(model, x, x, target="predicted")
        >>> outcome.details["random"].shape
        torch.Size([1])
    """

    share: float = 0.1
    patch: int = 1
    by: Replacement = INPAINT
    draws: int = 10
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    seed: int = 0
    name = "counterfactual"
    better = "higher"
    needs = ("model",)

    def __post_init__(self) -> None:
        check_fields(
            self, share=checks.positive_fraction, patch=1, draws=0, shares=check_shares, seed=0
        )
        check_replacement("by", self.by, (INPAINT,))

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x = data.inputs
        classes, first = _classes(data), data.first
        rank, several = self._rank(data)
        counts = [max(1, round(one * several)) for one in (self.share, *self.shares)]
        ends = torch.tensor([counts[0]] * (1 + self.draws) + counts[1:], device=x.device)
        source = self.region_sources(x, rank.shape[1])
        imputed = isinstance(self.by, str) and self.by == INPAINT
        fill = None if imputed else data.fill(self.by, self.seed)

        def write(example: Tensor, number: Tensor) -> Tensor:
            removed = (rank[example] < ends[number, None]).gather(1, source[number])
            missing = removed.view(-1, *spatial_shape(x))
            if fill is None:
                return inpaint(x[example], missing)
            missing = missing[:, None] if x.dim() > 2 else missing
            return torch.where(missing, fill[example % len(fill)], x[example])

        points = data.scorer.grid(write, len(ends))[1]
        before, after = (one.decided("a counterfactual") for one in (first, points))
        changed = (after != before[:, None]).double()
        draws, grid = slice(1, 1 + self.draws), slice(1 + self.draws, None)
        details = {"decision": after[:, 0], "random": changed[:, draws].mean(1)}
        for output in OUTPUTS:
            drop = first.of(output)[:, None] - points.of(output)
            details[f"drop_{output}"] = drop[:, 0]
            details[f"random_drop_{output}"] = drop[:, draws].mean(1)
        shares = changed.new_tensor([count / several for count in counts[1:]])
        enough = torch.where(changed[:, grid] > 0, shares, math.inf).amin(1)
        details["needed_share"] = enough.masked_fill(enough.isinf(), math.nan)
        curve = Curve(shares, changed[:, grid], "share replaced", "share of changed decisions")
        other = before != classes
        values, rows = changed[:, 0].masked_fill(other, math.nan), true_rows(other)
        caveat = f"the decision for examples {rows} is not the target: they have no value"
        caveats = caveats_of((rows, caveat))
        return self._outcome(values, curve=curve, details=details, caveats=caveats)

    def _rank(self, data: EvaluationInput) -> tuple[Tensor, int]:
        """The rank of each position, or of its block, [B, P], and how many ranks there are."""
        if self.patch == 1:
            rank, _ = ranking(data.values, data.inputs, "place", "most_first")
            return rank, rank.shape[1]
        sums, block = block_sums(data.places, self.patch)
        rank, _ = ranking(sums, sums, "place", "most_first")
        return rank[:, block], sums.shape[1]

    def region_sources(self, x: Tensor, positions: int) -> Tensor:
        """For each point of an example, the position of the region from which each position takes
        whether it is removed, int64 [n, P]: its own, except for the random regions.
        """
        sample, own = (torch.arange(n, device=x.device) for n in (self.draws, positions))
        if x.dim() == 2:
            moved = random_ranks(self.seed, sample, positions)
        else:
            spatial, seed = x.shape[2:], torch.full_like(sample, self.seed)
            words = ops.random_bits(seed, sample, len(spatial), 0, philox.MASK)
            moved = torch.zeros((self.draws, 1), dtype=torch.int64, device=x.device)
            for axis, size in enumerate(spatial):
                shift = (words[:, axis : axis + 1] * size) >> 32
                at = (torch.arange(size, device=x.device) + shift) % size
                moved = (moved[:, :, None] * size + at[:, None]).flatten(1)
        return torch.cat([own[None], moved, own.expand(len(self.shares), -1)])


def _classes(data: EvaluationInput) -> Tensor:
    """The target as one class per example, int64 [B]; raises where it is none."""
    targets = read_targets(data.classes, data.batch)
    if targets.classes is None or targets.position is not None:
        raise InputError(
            "decisions need a target that is a class of several: got another target; use a class, "
            "or output='logit'"
        )
    # Fails before any point is scored.
    data.first.decided("a comparison of decisions")
    return targets.classes[:, 0].to(data.inputs.device)


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
        check_fields(self, cumulative=flag, contributions=flag, scaled=flag, output=OUTPUTS, seed=0)
        if self.cumulative and self.perturbation != "patches":
            raise InputError(
                f"cumulative is of perturbation='patches': got {self.perturbation!r}; leave it out"
            )
        check_replacement("substrate", self.substrate)

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x = data.inputs
        fill = data.fill(self.substrate, self.seed)
        slope = _per_unit(data.values, x, fill) if self.contributions else data.values
        sizes = (0,) if self.perturbation == "gaussian" else self._sizes
        parts = []
        for number, size in enumerate(sizes):
            count, write = self.perturbations(x, fill, size, number)
            products, drops = _products_and_drops(data, slope, count, write, self.output)
            parts.append((products, drops, drops.new_full((1, count), 1 / (count * len(sizes)))))
        predicted, measured, weight = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        details = {"of_zero_map": (weight * measured**2).sum(1)}
        if self.scaled:
            below = (weight * predicted**2).sum(1, keepdim=True)
            above = (weight * predicted * measured).sum(1, keepdim=True)
            factor = torch.where(below > 0, above / below, 0.0)
            predicted, details["factor"] = factor * predicted, factor[:, 0]
        values = (weight * (predicted - measured) ** 2).sum(1)
        gaussian = self.perturbation == "gaussian"
        still = value_range(x) == 0 if gaussian else (x == fill).flatten(1).all(1)
        caveat = f"no perturbation changes examples {true_rows(still)}: no infidelity is defined"
        caveats = caveats_of((still.any(), caveat))
        return self._outcome(values.masked_fill(still, math.nan), details=details, caveats=caveats)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.patch if isinstance(self.patch, tuple) else (self.patch,)

    def perturbations(self, x: Tensor, fill: Tensor, size: int, number: int) -> tuple[int, Write]:
        """The number of perturbations of a patch size, the `number`-th size, and their writer."""
        spatial = spatial_shape(x)
        if self.perturbation == "gaussian":
            sigma = self.sigma * value_range(x)
            seed = torch.full((len(x),), self.seed, device=x.device)
            return self.samples, lambda i, n: ops.noise_points(x, sigma, seed, i, n, False, 0)
        edge = torch.tensor([min(size, one) for one in spatial], device=x.device)
        if self.perturbation == "squares":
            sample = torch.arange(self.samples, device=x.device) + number * self.samples
            seed = torch.full_like(sample, self.seed)
            words = ops.random_bits(seed, sample, len(spatial), 0, philox.MASK)
            room = torch.tensor(spatial, device=x.device) - edge + 1
            start = (words * room) >> 32
        else:
            ticks = [torch.arange(0, one, size, device=x.device) for one in spatial]
            start = torch.cartesian_prod(*ticks).view(-1, len(spatial))
        if self.cumulative:
            rank = blocks(spatial, size, x.device)[None].int()
            return len(start), lambda i, n: ops.rank_points(x, fill, rank, i, n + 1)
        stop = start + edge
        if x.dim() > 2:  # all channels
            start = functional.pad(start, (1, 0))
            stop = functional.pad(stop, (1, 0), value=x.shape[1])
        return len(start), lambda i, n: ops.window_points(x, fill, i, start[n], stop[n])


def _products_and_drops(
    data: EvaluationInput, slope: Tensor, count: int, write: Write, output: str
) -> tuple[Tensor, Tensor]:
    """What the map predicts for each perturbation and the output's drop, float64 [B, count]."""
    x = data.inputs
    products = torch.zeros((data.batch, count), dtype=torch.float64, device=x.device)

    def perturbed(example: Tensor, number: Tensor) -> Tensor:
        points = write(example, number)
        products[example, number] = _products(x, slope, points, example)
        return points

    first, points = data.scorer.grid(perturbed, count)
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
        check_fields(self, output=OUTPUTS, seed=0)
        if self.patch > 1 and self.per != "place":
            raise InputError(f"patch goes with per='place': got per={self.per!r}")

    def _elements(self, data: EvaluationInput) -> tuple[Tensor, Tensor]:
        """The values of positions, float64 [B, P], and each element's position, int64 [1, *]."""
        if self.patch > 1:
            sums, block = block_sums(data.places, self.patch)
            return sums, block[None]
        maps = data.values.expand(data.inputs.shape) if self.per == "element" else data.places
        values = maps.flatten(1).double()
        return values, torch.arange(values.shape[1], device=values.device)[None]

    def _correlations(self, data: EvaluationInput, fill: Tensor, counts: Sequence[int]) -> Tensor:
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
            points: Tensor = ops.segment_points(x, fill, own, ~subsets(keys), example, row)
            return points

        # A launch holds all examples of a sample, whose subsets are drawn once.
        keys = torch.arange(self.samples * several, device=x.device)
        first, points = data.scorer_beside(fill).grid(write, len(keys))
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
            raise InputError("shares must be several for subsets='ranked', which compares them")

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        fill = data.fill(self.substrate, self.seed, missing=True)
        positions = self._elements(data)[0].shape[1]
        counts = [max(1, round(share * positions)) for share in self.shares]
        if self.subsets == "ranked":
            return self._ranked(data, fill, counts)
        correlations = self._correlations(data, fill, counts)
        shares = correlations.new_tensor([count / positions for count in counts])
        curve = Curve(shares, correlations, "share of the positions in a subset", "correlation")
        return self._outcome(correlations.nanmean(1), curve=curve, caveats=_undefined(correlations))

    def _ranked(self, data: EvaluationInput, fill: Tensor, counts: list[int]) -> Outcome:
        x = data.inputs
        rank, sequence = ranking(data.values, x, self.per, "most_first")
        ends = torch.tensor(counts, device=x.device)
        sums = self._elements(data)[0].gather(1, sequence).cumsum(1)[:, ends - 1]

        first, points = data.scorer_beside(fill).grid(
            lambda i, n: ops.rank_points(x, fill, rank, i, ends[n]), len(counts)
        )
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
        check_fields(self, size=checks.positive_fraction if isinstance(self.size, float) else 1)
        super().__post_init__()

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        fill = data.fill(self.substrate, self.seed, missing=True)
        positions, size = self._elements(data)[0].shape[1], self.size
        count = max(1, round(size * positions)) if isinstance(size, float) else size
        if count > positions:
            raise InputError(f"size must be at most the {positions} positions: got {count}")
        correlations = self._correlations(data, fill, [count])
        caveats = _undefined(correlations)
        return self._outcome(correlations[:, 0], parameters={"places": count}, caveats=caveats)


def _undefined(correlations: Tensor) -> tuple[str, ...]:
    """A caveat where correlations [B, N] are of constants."""
    rows = true_rows(correlations.isnan().any(1))
    text = f"sums or drops of examples {rows} do not vary for some subset sizes, which are left out"
    return caveats_of((rows, text))
