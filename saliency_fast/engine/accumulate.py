"""Accumulators of a call's weighted sums, their error estimate, and the outcome of a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.bind import Call
from saliency_fast.engine.independence import TieReport
from saliency_fast.engine.recipe import Rows, Source, WeightedSum
from saliency_fast.errors import ModelError
from saliency_fast.graph.passes.affine_prefix import Prefix
from saliency_fast.graph.passes.half import FLOAT32, arithmetic
from saliency_fast.graph.program import tensors_among
from saliency_fast.model.executors import RecordedExecutor

WORKING_COPIES = 4
"""Maps that `Accumulators.estimate` holds beside the accumulators while it works."""


@dataclass(frozen=True)
class AffinePrefix:
    """The affine prefix of a model at work for a call.

    Args:
        prefix: The program in two: the affine stem and the rest.
        call: Whose inputs and further arguments the stem takes.
        line: Whether points are written behind the stem; else they go through it, and only its
            transpose is spared.
        rows: How many rows go through the stem at a time.
    """

    prefix: Prefix
    call: Call
    line: bool
    rows: int

    def forward(self, table: Inputs, example: Tensor | None = None) -> Inputs:
        """The stem's output for every row of `table`: inputs [B, *], baselines [B | 1, *], or
        points of the examples `example` [R].
        """
        if example is None:
            # One baseline for all examples has an output for each where their stems differ.
            rows = self.call.batch if self.prefix.conditional else max(map(len, table))
            table = tuple(one.expand(rows, *one.shape[1:]) for one in table)
            example = torch.arange(rows, device=table[0].device) % self.call.batch
        parts = []
        for part in self._parts(example.numel()):
            further = self._further(example[part])
            with arithmetic(FLOAT32, example.device):
                parts.append(self.prefix.forward(tuple(one[part] for one in table), further))
        return _joined(parts)

    def vjp(self, sums: Inputs, examples: Tensor | None = None) -> Inputs:
        """Sums of gradients [S, *] behind the stem, as they are at the inputs; S = B * K slots, or
        those of `examples` alone.
        """
        if examples is None:
            examples = torch.arange(self.call.batch, device=sums[0].device)
        parts, each = [], max(1, len(sums[0]) // len(examples))
        for part in self._parts(len(sums[0])):
            slot = torch.arange(part.start, part.stop, device=sums[0].device)
            rows, example = tuple(one[part] for one in sums), examples[slot // each]
            with arithmetic(FLOAT32, sums[0].device):
                parts.append(self.prefix.transpose(rows, self.call.inputs, self._further(example)))
        return _joined(parts)

    def first(self) -> tuple[Inputs, list[Tensor]]:
        """The first example and its further arguments, as a launch of one row."""
        example = torch.zeros(1, dtype=torch.int64, device=self.call.device)
        return tuple(x[:1] for x in self.call.inputs), self._further(example)

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(n, min(n + self.rows, count)) for n in range(0, count, self.rows))

    def _further(self, example: Tensor) -> list[Tensor]:
        return tensors_among(*self.call.function(RecordedExecutor(self.prefix.rest)).rows(example))


def _joined(parts: list[Inputs]) -> Inputs:
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Estimate:
    """Maps so far: values [S, *] per input, sums float64 [S], relative error float64 [S]."""

    values: Inputs
    sums: Tensor
    error: Tensor


class Accumulators:
    """Accumulators of S = B * K maps, each in two replicates; slot 2s + replicate is of map s.

    With one level the replicates are two rules of half the points each, and half their difference
    estimates the error of their mean. With several, replicate 0 holds the map of the earlier levels
    and replicate 1 the new one, and the error is what the level changed; with a refinement the
    caller says what goes into which. A recipe that looks at the input alone has one replicate and
    no error. With `prefix` gradients are summed behind it.
    """

    def __init__(
        self,
        recipe: WeightedSum,
        inputs: Inputs,
        baselines: Inputs,
        maps: int,
        prefix: AffinePrefix | None = None,
        examples: Tensor | None = None,
    ) -> None:
        """examples: int64 [E] that maps are of, which may repeat; all, unless given."""
        self.recipe, self.maps, self.prefix, self.examples = recipe, maps, prefix, examples
        if examples is not None:
            inputs = tuple(x[examples] for x in inputs)
            if recipe.baseline == "one":
                baselines = tuple(one if len(one) == 1 else one[examples] for one in baselines)
        self.inputs, self.baselines = inputs, baselines
        self.replicates = 1 if recipe.at_input else 2
        self.nested = len(recipe.levels) > 1 or recipe.refinement is not None
        shapes = [x.shape[1:] for x in inputs] if prefix is None else prefix.prefix.shapes
        slots, device = len(inputs[0]) * maps * self.replicates, inputs[0].device
        dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        self.totals = tuple(torch.zeros(slots, *s, dtype=dtype, device=device) for s in shapes)
        moments = recipe.reduction == "variance"
        self.means = tuple(torch.zeros_like(total) for total in self.totals) if moments else ()
        self.weight = torch.zeros(slots, dtype=torch.float64, device=device)
        self.counts = tuple(torch.zeros_like(self.weight) for _ in self.means)

    def begin(self, keep: float, active: Tensor) -> None:
        """Starts a level for the examples `active`: the earlier map counts `keep` times in it."""
        for total in self.totals if self.nested else ():
            pair = total.view(len(self.inputs[0]), self.maps, 2, *total.shape[1:])
            pair[active, :, 0] = pair[active, :, 1]
            pair[active, :, 1] *= keep

    def clear(self, examples: Tensor) -> None:
        """Forgets what was added for these examples."""
        for total in self.totals:
            total.view(len(self.inputs[0]), -1, *total.shape[1:])[examples] = 0

    def add(
        self,
        rows: Rows,
        gradients: list[Inputs],
        source: Source,
        scale: float | Tensor = 1.0,
        maps_of: Tensor | None = None,
    ) -> None:
        """Adds a launch; for each of K targets the gradients [R, *] per input, `scale` times as
        large as they are. maps_of: the example of each row among the maps, unless `rows.example`.
        """
        later = self.nested and self.recipe.refinement is None
        replicate = torch.ones_like(rows.replicate) if later else rows.replicate
        example = rows.example if maps_of is None else maps_of
        directions = source.direction(rows) if self.recipe.factor == "path" else None
        for k, one in enumerate(gradients):
            slot = (example * self.maps + k) * self.replicates + replicate
            self.weight.index_add_(0, slot, rows.weight)
            for number, gradient in enumerate(one):
                if directions is not None:
                    gradient = gradient.to(self.totals[number].dtype) * directions[number]
                self._add(number, gradient, slot, rows, source, scale)

    def _add(
        self,
        number: int,
        gradient: Tensor,
        slot: Tensor,
        rows: Rows,
        source: Source,
        scale: float | Tensor,
    ) -> None:
        total, weight, reduction = self.totals[number], rows.weight, self.recipe.reduction
        # Not `scale != 1.0` alone: of a tensor that would wait for its device.
        scaled = isinstance(scale, Tensor) or scale != 1.0
        if reduction == "variance":
            gradient = gradient.to(total.dtype) / scale if scaled else gradient
            ops.accumulate_moments(self.means[number], total, self.counts[number], gradient, slot)
        elif self.recipe.factor == "line":
            lines = source.lines(number, rows)
            ops.accumulate_random_lines(total, gradient, slot, weight / scale, *lines)
        else:
            if scaled:
                weight = weight / (scale**2 if reduction == "square" else scale)
            ops.accumulate(total, gradient, slot, weight, reduction)

    def estimate(self) -> Estimate:
        """The maps from all that was added so far, each scaled to the weight it has seen."""
        wholes, gaps = [], []
        for number in range(len(self.totals)):
            whole, gap = self._whole_and_gap(number)
            wholes.append(whole)
            gaps += [] if gap is None else [gap]
        if self.prefix is not None:
            wholes = list(self.prefix.vjp(tuple(wholes), self.examples))
            gaps = list(self.prefix.vjp(tuple(gaps), self.examples)) if gaps else []
        values, sums, squares, gap_squares = [], [], [], []
        for number, whole in enumerate(wholes):
            value, total = self._multiplied(number, whole)
            values.append(value)
            sums.append(total)
            if gaps:
                squares.append(square_norm(value))
                gap_squares.append(square_norm(self._multiplied(number, gaps[number])[0]))
        sum_of_all = torch.stack(sums).sum(0)
        if not gaps:
            return Estimate(tuple(values), sum_of_all, torch.zeros_like(sum_of_all))
        norm, gap_norm = torch.stack(squares).sum(0), torch.stack(gap_squares).sum(0)
        error = torch.sqrt(gap_norm / norm.clamp_min(torch.finfo(torch.float64).tiny))
        if not self.nested:
            empty = (self.weight.view(-1, 2) == 0).any(1)
            error = torch.where(empty, torch.nan, error)
        return Estimate(tuple(values), sum_of_all, error)

    def _whole_and_gap(self, number: int) -> tuple[Tensor, Tensor | None]:
        """A map and the difference that tells its error, before the factor: [S, *] each."""
        total = self.totals[number]
        if self.replicates == 1:
            return total, None
        zero, one = total.view(-1, 2, *total.shape[1:]).unbind(1)
        if self.nested:
            return one.contiguous(), one - zero
        shape = (-1, 2, *(1,) * (total.dim() - 1))
        if self.recipe.reduction == "variance":
            mean = self.means[number].view(-1, 2, *total.shape[1:])
            return _variances(mean, zero, one, self.counts[number].view(shape).to(total.dtype))
        weight = self.weight.view(shape)
        whole = (zero + one).mul_(weight.sum(1).reciprocal().to(total.dtype))
        # An empty replicate gives NaN here, and its error is reported as unknown.
        share = (0.5 / weight).to(total.dtype)
        return whole, (zero * share[:, 0]).addcmul_(one, share[:, 1], value=-1)

    def _multiplied(self, number: int, part: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inputs[number] if self.recipe.factor in ("input", "difference") else None
        baseline = self.baselines[number] if self.recipe.factor == "difference" else None
        values, sums = ops.finish(part, x, baseline, "none")
        return values, sums


def _variances(mean: Tensor, zero: Tensor, one: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Chan's merge (1983) of two replicates' moments; half the difference of their variances."""
    first, second = count.unbind(1)
    both = first + second
    shift = mean[:, 1] - mean[:, 0]
    spread = shift.square_().mul_(first * second / both).add_(zero).add_(one)
    return spread.div_(both), (zero / first).sub_(one / second).mul_(0.5)


def square_norm(values: Tensor) -> Tensor:
    """Squared L2 norm of each map: float64 [S]."""
    # In pieces of 2**20 elements, since on CPUs PyTorch first casts what it is given to float64.
    pieces = torch.split(values.flatten(1), max(1, 2**20 // len(values)), dim=1)
    norms = [torch.linalg.vector_norm(one, dim=1, dtype=torch.float64) for one in pieces]
    return torch.stack(norms).square().sum(0)


def norm_of(values: Inputs) -> Tensor:
    """L2 norm of each map over all inputs: float64 [S]."""
    return torch.stack([square_norm(one) for one in values]).sum(0).sqrt()


@dataclass(frozen=True)
class Outcome:
    """The engine's result for B examples with K maps each.

    Args:
        values: Per input [B, K, *].
        scores: float64 [B, K] at the inputs.
        baseline_scores: float64 [B, K] at the baselines, None where there are none.
        sums: float64 [B, K], of the values.
        error: float64 [B, K], relative L2, estimated; what the precision costs is part of it.
        points: int64 [B], gradients taken.
        converged: bool [B], where a tolerance was asked for.
        classes: int64 [B, K], where targets are classes.
        precision_error: float64 [B, K], where the precision is not float32.
        underflow: The share of gradients that the precision could not hold.
        extras: Further results [B, K, *] by name.
        ties: What hangs on ties, where any example was examined.
    """

    values: Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    sums: Tensor
    error: Tensor
    points: Tensor
    converged: Tensor | None
    classes: Tensor | None
    precision_error: Tensor | None = None
    underflow: float = 0.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    ties: TieReport | None = None

    @property
    def delta(self) -> Tensor | None:
        """Completeness: the sum of the values less what the score gained over the baseline."""
        if self.baseline_scores is None:
            return None
        return self.sums - (self.scores - self.baseline_scores)


def average(outcomes: Sequence[Outcome]) -> Outcome:
    """The mean over several baselines; its error is at most the mean of theirs, by the triangle
    inequality: absolute errors add up, and the mean map may be smaller than each.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    share, last = 1.0 / len(outcomes), outcomes[-1]
    values = tuple(
        sum(parts[1:], parts[0]) * share
        for parts in zip(*(one.values for one in outcomes), strict=True)
    )

    def norm(values: Inputs) -> Tensor:
        return norm_of(tuple(one.flatten(0, 1) for one in values)).view(values[0].shape[:2])

    norms, whole = [norm(one.values) for one in outcomes], norm(values)
    whole = whole.clamp_min(torch.finfo(torch.float64).tiny)

    def several(name: str) -> list[Tensor]:
        parts = [getattr(one, name) for one in outcomes]
        return [] if parts[0] is None else parts

    def mean(name: str) -> Tensor | None:
        return torch.stack(several(name)).mean(0) if several(name) else None

    def relative(name: str) -> Tensor:
        pairs = zip(several(name), norms, strict=True)
        return torch.stack([error * size for error, size in pairs]).mean(0) / whole

    return replace(
        last,
        values=values,
        sums=torch.stack(several("sums")).mean(0),
        error=relative("error"),
        baseline_scores=mean("baseline_scores"),
        converged=torch.stack(several("converged")).all(0) if several("converged") else None,
        points=torch.stack(several("points")).sum(0),
        precision_error=relative("precision_error") if several("precision_error") else None,
        underflow=max(one.underflow for one in outcomes),
        ties=TieReport.of_all([one.ties for one in outcomes if one.ties is not None]),
        extras={
            name: torch.stack([one.extras[name].double() for one in outcomes]).mean(0)
            for name in last.extras
        },
    )


def need_finite(outcome: Outcome, precision: str = "float32") -> None:
    """Raises ModelError where the model gave NaN or infinity."""
    half = "" if precision == "float32" else f", or precision='float32' instead of {precision!r}"
    parts = {"scores": outcome.scores, "attributions": outcome.sums}
    if outcome.baseline_scores is not None:
        parts["scores at the baseline"] = outcome.baseline_scores
    if bool(torch.isfinite(torch.stack(list(parts.values()))).all()):
        return
    for name, values in parts.items():
        bad = ~torch.isfinite(values).all(1)
        if bool(bad.any()):
            raise ModelError(
                f"the model gives NaN or infinite {name} for examples "
                f"{bad.nonzero().flatten().tolist()[:8]}: expected finite numbers; check the "
                f"model's output and gradient there (torch.autograd.set_detect_anomaly helps){half}"
            )
