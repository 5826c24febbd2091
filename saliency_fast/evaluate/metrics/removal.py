"""Faithfulness by removal: how the model's output changes while the positions that a map ranks
highest are deleted, inserted, imputed or painted over.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saliency_fast.errors import InputError
from saliency_fast.evaluate.inputs import (
    EvaluationInput,
    Replacement,
    check_replacement,
    describe,
    true_rows,
)
from saliency_fast.evaluate.metric import FAITHFULNESS, Metric, check_fields, in_suite
from saliency_fast.evaluate.metrics.inpaint import inpaint, need_axes
from saliency_fast.evaluate.outcome import Curve, Outcome
from saliency_fast.evaluate.positions import (
    ORDERS,
    PER,
    block_sums,
    check_share,
    check_shares,
    random_ranks,
    ranking,
    spatial_shape,
    value_range,
)
from saliency_fast.evaluate.scores import OUTPUTS
from saliency_fast.methods.parts import checks
from saliency_fast.model.targets import read_targets
from saliency_fast.ops import noise_points, philox, random_bits, rank_points

ACCURACY, INPAINT = "accuracy", "inpaint"
OUTPUT_NAMES = {
    ACCURACY: "share decided as the target",
    "softmax": "probability of the target",
    "logit": "output of the target",
}
QUICK_STEPS = {"steps": 20}


@dataclass(frozen=True)
class _Ranked(Metric):
    """Deletion and insertion.

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

    def __post_init__(self) -> None:
        check_fields(
            self, substrate=check_replacement, output=OUTPUTS, per=PER, order=ORDERS, steps=_steps
        )
        if self.step_size is not None:
            _steps("step_size", self.step_size)

    def counts(self, positions: int) -> Tensor:
        """How many of the positions are removed after each step, int64 from 0 to all."""
        if self.step_size is not None:
            ends = torch.arange(0, positions, self.step_size, device="cpu")
            return torch.cat([ends, torch.tensor([positions], device="cpu")])
        ends = torch.arange(min(self.steps, positions) + 1, dtype=torch.int64, device="cpu")
        return (ends * positions + ends[-1] // 2) // ends[-1]

    def _walked(self, data: EvaluationInput, *, insert: bool) -> Outcome:
        x = data.inputs
        fill = data.fill(self.substrate, self.seed, missing=True)
        rank, sequence = ranking(data.values, x, self.per, self.order)
        counts = self.counts(rank.shape[1]).to(x.device)
        begin, end = (fill.expand_as(x).contiguous(), x) if insert else (x, fill)
        changes, row = _distinct(begin, end, sequence, counts)
        example, step = changes.nonzero().unbind(1)

        def write(example: Tensor, count: Tensor) -> Tensor:
            points: Tensor = rank_points(begin, end, rank, example, count)
            return points

        _, points = data.scorer_beside(fill).at(write, example, counts[step])
        share = counts.double() / rank.shape[1]
        name = "share inserted" if insert else "share deleted"
        curve = Curve(share, points.of(self.output)[row], name, OUTPUT_NAMES[self.output])
        parameters = {
            "substrate": describe(self.substrate),
            "steps": len(counts) - 1,
            "step_size": int(counts.diff().max()),
        }
        return self._outcome(curve.area(), curve=curve, parameters=parameters)


def _steps(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number, 1 or more: got {value!r}")


def _distinct(
    begin: Tensor, end: Tensor, sequence: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Which steps change an example's point, bool [B, n], and for every step the row of its point
    among those, int64 [B, n]: equal points, such as black replaced by black, are scored once.
    """
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

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        return self._walked(data, insert=False)


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

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        return self._walked(data, insert=True)


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
        need_axes(x)
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
            noisy = noise_points(imputed, sigma[example], seed, row, number, False, 0)
            return torch.where(missing[:, None], noisy, imputed)

        _, points = data.scorer.grid(write, len(counts))
        if classes is None:
            values = points.of(self.output)
        else:
            assert points.decisions is not None
            values = (points.decisions == classes[:, None]).double()
        curve = Curve(ends.double() / positions, values, "share imputed", OUTPUT_NAMES[self.output])
        better = "lower" if self.order == "most_first" else "higher"
        return dataclasses.replace(self._outcome(values.mean(1), curve=curve), better=better)


@in_suite(FAITHFULNESS, "Chang et al., 2019", quick={"draws": 3})
@dataclass(frozen=True)
class Counterfactual(Metric):
    """Whether the decision changes, 1 or 0, where the positions that a map ranks highest are
    replaced (after Chang, 2019).

    The value is NaN where the decision is not the target to begin with. `details`, each [B]:
    `decision` (int64), `drop_softmax`, `drop_logit`; `random`, the share of random regions that
    change the decision, with `random_drop_softmax` and `random_drop_logit`; `needed_share`, the
    smallest of `shares` that changes the decision, NaN where none does.

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
        check_fields(self, share=check_share, patch=1, draws=0, shares=check_shares, seed=0)
        check_replacement("by", self.by, (INPAINT,))

    def _evaluate(self, data: EvaluationInput) -> Outcome:
        x = data.inputs
        classes, first = _classes(data), data.first
        rank, several = self._rank(data)
        counts = [max(1, round(one * several)) for one in (self.share, *self.shares)]
        ends = torch.tensor([counts[0]] * (1 + self.draws) + counts[1:], device=x.device)
        source = self.region_sources(x, rank.shape[1])
        inpainted = isinstance(self.by, str) and self.by == INPAINT
        if inpainted:
            need_axes(x)
        fill = None if inpainted else data.fill(self.by, self.seed)

        def write(example: Tensor, number: Tensor) -> Tensor:
            removed = (rank[example] < ends[number, None]).gather(1, source[number])
            missing = removed.view(-1, *spatial_shape(x))
            if fill is None:
                return inpaint(x[example], missing)
            missing = missing[:, None] if x.dim() > 2 else missing
            return torch.where(missing, fill[example % len(fill)], x[example])

        points = data.scorer.grid(write, len(ends))[1]
        assert first.decisions is not None
        assert points.decisions is not None
        changed = (points.decisions != first.decisions[:, None]).double()
        draws, grid = slice(1, 1 + self.draws), slice(1 + self.draws, None)
        details: dict[str, Any] = {
            "decision": points.decisions[:, 0],
            "random": changed[:, draws].mean(1),
        }
        for output in OUTPUTS:
            drop = first.of(output)[:, None] - points.of(output)
            details[f"drop_{output}"] = drop[:, 0]
            details[f"random_drop_{output}"] = drop[:, draws].mean(1)
        shares = changed.new_tensor([count / several for count in counts[1:]])
        enough = torch.where(changed[:, grid] > 0, shares, math.inf).amin(1)
        details["needed_share"] = enough.masked_fill(enough.isinf(), math.nan)
        curve = Curve(shares, changed[:, grid], "share replaced", "share of changed decisions")
        other = first.decisions != classes
        caveats = (
            f"the decision for examples {true_rows(other)} is not the target: they have no value",
        )
        return self._outcome(
            changed[:, 0].masked_fill(other, math.nan),
            curve=curve,
            details=details,
            caveats=caveats if bool(other.any()) else (),
        )

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
        table = torch.arange(positions, device=x.device).repeat(
            1 + self.draws + len(self.shares), 1
        )
        if self.draws == 0:
            return table
        sample = torch.arange(self.draws, device=x.device)
        if x.dim() == 2:
            table[1 : 1 + self.draws] = random_ranks(self.seed, sample, positions)
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


def _classes(data: EvaluationInput) -> Tensor:
    """The target as one class per example, int64 [B]; raises where it is none."""
    targets = read_targets(data.classes, data.batch)
    classes = None if targets.position is not None else targets.classes
    if classes is None or data.first.decisions is None:
        raise InputError(
            "decisions need a target that is a class of several: the model or the target gives one "
            "number per example; use output='logit' where there is one"
        )
    return classes[:, 0].to(data.inputs.device)
