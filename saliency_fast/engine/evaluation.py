"""Evaluation of a recipe over one baseline: points, forward, vector-Jacobian product, sums."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from saliency_fast import ops
from saliency_fast._types import Inputs
from saliency_fast.engine.accumulate import Accumulators, Outcome, norm_of
from saliency_fast.engine.arena import Arena, Trace
from saliency_fast.engine.bind import Call
from saliency_fast.engine.calibrate import NOTHING, Verification
from saliency_fast.engine.config import EngineConfig
from saliency_fast.engine.independence import (
    Independence,
    RowsMeetError,
    TieReport,
    scores_agree,
)
from saliency_fast.engine.job import Job, Report, Steps
from saliency_fast.engine.launch import EvaluationRequest, EvaluationResult, joined
from saliency_fast.engine.measure import Measured
from saliency_fast.engine.precision import (
    LEAST_SCALE,
    PrecisionError,
    compared,
    finite,
    first_scale,
    measured_points,
    spread,
)
from saliency_fast.engine.recipe import (
    Level,
    Rows,
    Source,
    WeightedSum,
)
from saliency_fast.graph.passes.half import FLOAT32
from saliency_fast.graph.program import Program
from saliency_fast.model.executors import RecordedExecutor
from saliency_fast.model.function import PointFunction

NONE_ALONE: Mapping[int, tuple[Tensor, float]] = MappingProxyType({})
LOWER = 16.0
"""What a scale is divided by where half types overflow."""


class Evaluation:
    """A recipe evaluated over one baseline: the state that its launches share."""

    reused = False
    """Whether another call takes it over when this one is done."""

    def __init__(
        self,
        job: Job,
        call: Call,
        baselines: Inputs,
        error: PrecisionError | None = None,
        ties: TieReport | None = None,
    ) -> None:
        """error: what the precision costs, where that is known."""
        self.job, self.traces, self.launched = job, dict[int, Trace](), 0
        self.call, self.recipe, self.baselines, self.plan = call, job.recipe, baselines, job.plan
        self.strategy, self.config = job.strategy, job.config
        self.launches = job.launches
        self.independence: Independence | None = job.independence
        self.precision_error, self.ties = error, ties
        self.size = 1 if ties is not None and ties.apart else self.plan.points_per_launch
        shape, device = (call.batch, call.targets.count), call.device
        self.everyone = torch.arange(call.batch, device=device)
        self.scores = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.baseline_scores: Tensor | None = None
        self.classes = call.targets.classes
        self.points = torch.zeros(call.batch, dtype=torch.int64, device=device)

    @cached_property
    def score_function(self) -> PointFunction:
        return self.strategy.score_function(self.job.model, self.call, self.recipe)

    def steps(self, report: Report) -> Steps:
        """Runs launch by launch; yields requests, and what `report` makes after each."""
        raise NotImplementedError

    def outcome(self) -> Outcome:
        """The result from what was visited so far."""
        raise NotImplementedError

    def trial(self, rows: int, arena: Arena) -> None:
        """A launch of the first point, `rows` times, in `arena`; nothing is kept of it."""
        raise NotImplementedError

    @property
    def next_size(self) -> int:
        """Points of the next launch, at most."""
        first = self.job.first[self.launched :]
        return min(self.size, first[0]) if first else self.size

    def request(
        self,
        function: PointFunction,
        count: int,
        write: Callable[[slice], tuple[Inputs, Tensor]],
        gradients: bool = True,
        alone: Mapping[int, tuple[Tensor, float]] = NONE_ALONE,
    ) -> EvaluationRequest:
        """So many points, with gradients or scores alone."""
        # Rounds may ask for scores alone, whatever the recipe says.
        telling = gradients or not (self.recipe.gradients and isinstance(self.recipe, WeightedSum))
        metered = self.job.ledger if telling and self.job.with_cost is not None else None
        traced = gradients and count in self.job.traced and count == self.next_size
        launches = self.launches if gradients else None
        about = (function, count, write, gradients, launches, self.independence)
        return EvaluationRequest(*about, metered, self.plan.launch_bytes if traced else 0, alone)

    def note(self, result: EvaluationResult) -> None:
        """Plans anew where a launch told what launches take."""
        job, self.launched = None, self.launched + 1
        if result.cost is not None and self.job.with_cost is not None:
            job = self.job.with_cost(result.cost)
        elif result.trace is not None and len(result.scores) in self.job.traced:
            self.traces[len(result.scores)] = result.trace
            if len(self.traces) == len(self.job.traced) and self.job.with_traces is not None:
                job = self.job.with_traces(self.traces)
        if job is not None:
            self.job = replace(job, limit=self.job.limit, replan=self.job.replan)
            self.plan, self.launches = job.plan, job.launches
            if self.size > 1:
                self.size = job.plan.points_per_launch

    def set_classes(self, classes: Tensor) -> None:
        """Fixes the classes that are explained, once they were predicted."""
        targets = replace(self.score_function.targets, classes=classes)
        self.score_function = replace(self.score_function, targets=targets)

    def score_ends(self) -> Generator[EvaluationRequest, Any, None]:
        """Scores at the inputs and at the baselines, where launches do not bring them along."""
        recipe, call = self.recipe, self.call
        starts = recipe.baseline == "one" and recipe.ends
        if recipe.at_input and not starts:
            return
        batch, rows = call.batch, len(self.baselines[0])
        predicted = self.score_function.targets.predicted
        inputs = predicted or not recipe.at_input
        ends = self.job.calibration.ends
        room = 2 * batch <= self.size or ends is not None or self._scores_two
        both = starts and inputs and not predicted and room
        pairs = zip(self.baselines, call.inputs, strict=True)
        spread_out = tuple(one.expand_as(x) for one, x in pairs) if starts else ()
        if both:
            # In one table [2B, *], where one launch can score both.
            table = tuple(map(torch.cat, zip(call.inputs, spread_out, strict=True)))
            row = torch.arange(2 * batch, device=call.device)
            if ends is None:
                scores, _ = yield from self.score(table, row, row % batch)
            else:
                scores = yield from self._recorded_scores(ends, table, row % batch)
            self.note_scores(self.everyone, scores[:batch], None)
            self.baseline_scores = scores[batch:]
        elif inputs:
            scores, classes = yield from self.score(call.inputs, self.everyone, self.everyone)
            self.note_scores(self.everyone, scores, classes)
        if self.classes is not None and self.classes is not self.score_function.targets.classes:
            self.set_classes(self.classes)
        if starts and not both:
            scored = yield from self.score(spread_out, self.everyone, self.everyone)
            self.baseline_scores = scored[0]
        elif recipe.baseline == "set" and rows <= recipe.count:
            example = self.everyone.repeat_interleave(rows)
            row = torch.arange(rows, device=example.device).repeat(batch)
            scores, _ = yield from self.score(self.baselines, row, example)
            self.baseline_scores = scores.view(batch, rows, -1).mean(1)

    @property
    def _scores_two(self) -> bool:
        """Whether eager launches score the input of the only example beside its baseline."""
        calibration = self.job.calibration
        few = self.call.batch == 1 and not calibration.recorded and calibration.suspect is None
        rows = self.independence
        return few and (rows is None or not (rows.suspect or rows.apart))

    def _recorded_scores(
        self, ends: Program, table: Inputs, example: Tensor
    ) -> Generator[EvaluationRequest, Any, Tensor]:
        """Scores [2, K] of the input and the baseline as the model was recorded: that run is the
        first call's answer.
        """
        if (verification := self.job.calibration.verification) is not None:
            assert verification.scores is not None
            return verification.scores.double()
        function = self.call.function(RecordedExecutor(ends), (id(ends), "ends"))

        def write(own: slice) -> tuple[Inputs, Tensor]:
            return tuple(one[own].clone() for one in table), example[own]

        result: EvaluationResult = yield self.request(function, len(example), write, False)
        return result.scores.double()

    def score(
        self, table: Inputs, row: Tensor, example: Tensor
    ) -> Generator[EvaluationRequest, Any, tuple[Tensor, Tensor | None]]:
        """Scores float64 [R, K] and classes of table rows `row` [R] as inputs of `example` [R]."""
        scores, classes, start = [], [], 0
        # What is not recorded is not known to keep rows apart.
        size = self.size if self.job.calibration.recorded else 1 + self._scores_two
        while start < row.numel():

            def write(own: slice, start: int = start) -> tuple[Inputs, Tensor]:
                # Indexing copies, so a model that works in place spares the user's tensors.
                part = slice(start + own.start, start + own.stop)
                return tuple(one[row[part]] for one in table), example[part]

            count = min(size, row.numel() - start)
            result = yield self.request(self.score_function, count, write, gradients=False)
            if not self.recipe.gradients:
                self.note(result)
            scores.append(result.scores.double())
            classes += [] if result.classes is None else [result.classes]
            start += len(result.scores)
        return torch.cat(scores), torch.cat(classes) if classes else None

    def note_scores(self, example: Tensor, scores: Tensor, classes: Tensor | None) -> None:
        self.scores[example] = scores.double()
        if classes is not None:
            if self.classes is None:
                self.classes = torch.zeros_like(self.scores, dtype=torch.int64)
            self.classes[example] = classes


REDUCED: dict[str, Callable[[Tensor], Tensor]]
REDUCED = {"sum": lambda one: one, "square": torch.square, "absolute": torch.abs}
"""What a reduction makes of the gradient at a single point."""


class GradientEvaluation(Evaluation):
    """The gradients at the inputs themselves, in one launch: there is nothing to accumulate."""

    recipe: WeightedSum

    def __init__(self, job: Job, call: Call, baselines: Inputs, *about: Any) -> None:
        super().__init__(job, call, baselines, *about)
        self.function = self.strategy.gradient_function(job.model, call, self.recipe, baselines)

    def steps(self, report: Report) -> Steps:
        call, parts, done = self.call, list[list[Inputs]](), 0
        while done < call.batch:

            def write(own: slice, start: int = done) -> tuple[Inputs, Tensor]:
                rows = slice(start + own.start, start + own.stop)
                return tuple(x[rows].clone() for x in call.inputs), self.everyone[rows]

            count = min(self.next_size, call.batch - done)
            result = yield self.request(self.function, count, write)
            self.note(result)
            own = self.everyone[done : done + len(result.scores)]
            self.note_scores(own, result.scores, result.classes)
            parts.append(result.gradients)
            done += len(own)
        self.points += 1
        # For each of K targets the gradients [B, *] per input.
        self.gradients = [
            tuple(map(torch.cat, zip(*k, strict=True))) for k in zip(*parts, strict=True)
        ]
        yield report(self, done, done)

    def trial(self, rows: int, arena: Arena) -> None:
        example = torch.zeros(rows, dtype=torch.int64, device=self.call.device)
        with arena.launch():
            self.function.gradients(tuple(x[example] for x in self.call.inputs), example)

    def outcome(self) -> Outcome:
        shape, reduced = self.scores.shape, REDUCED[self.recipe.reduction]
        values, sums = list[Tensor](), torch.zeros_like(self.scores)
        for number, x in enumerate(self.call.inputs):
            maps = torch.stack([one[number] for one in self.gradients], 1).flatten(0, 1)
            factor = x if self.recipe.factor == "input" else None
            found, total = ops.finish(reduced(maps.to(x.dtype)), factor, None, "none")
            values.append(found.view(*shape, *found.shape[1:]))
            sums += total.view(shape)
        scores, error, points = self.scores.clone(), torch.zeros_like(sums), self.points.clone()
        about = (tuple(values), scores, self.baseline_scores, sums, error, points, None)
        return Outcome(*about, self.classes, ties=self.ties)


class SumEvaluation(Evaluation):
    """The evaluation of a weighted sum of gradients."""

    recipe: WeightedSum
    totals: Accumulators
    source: Source
    level: Level
    active: Tensor

    def __init__(self, job: Job, call: Call, baselines: Inputs, *about: Any) -> None:
        super().__init__(job, call, baselines, *about)
        parts, strategy = (job.model, call, self.recipe), self.strategy
        self.function = strategy.gradient_function(*parts, baselines)
        # Where the first launch tells how large the others are, in parts that do not depend on it.
        most = 2 if job.calibration.alone_first else self.plan.points_per_launch
        self.prefix = strategy.affine_prefix(call, self.recipe, most)
        self.exact: PointFunction | None = None
        if not strategy.precision.exact:
            self.exact = replace(strategy, precision=FLOAT32).gradient_function(*parts)
        self.converged: Tensor | None = None

    def set_classes(self, classes: Tensor) -> None:
        super().set_classes(classes)
        targets = self.score_function.targets
        self.function = replace(self.function, targets=targets)
        self.exact = self.exact and replace(self.exact, targets=targets)

    def steps(self, report: Report) -> Steps:
        yield from self.begin()
        totals, recipe = self.totals, self.recipe
        active, done, of = self.everyone, 0, recipe.count * self.call.batch
        for level in recipe.levels:
            totals.begin(level.keep, active)
            start, stop = 0, level.count * active.numel()
            self.enter(level.to(self.call.device), active)
            while start < stop:
                count = yield from self.launch(start, min(start + self.next_size, stop))
                start, done = start + count, done + count
                if count and not totals.nested:
                    yield report(self, done, of)
            if totals.nested:
                active = self._unfinished(active)
                # What is over counts as all of it, also where examples stopped early.
                over = active.numel() == 0 or level is recipe.levels[-1]
                yield report(self, of if over else done, of)
            if active.numel() == 0:
                break

    def begin(self) -> Generator[EvaluationRequest, Any, None]:
        """What comes before the first point: scores at the ends, accumulators, the source."""
        yield from self.score_ends()
        about = (self.recipe, self.call.inputs, self.baselines, self.call.targets.count)
        self.totals = Accumulators(*about, self.prefix)
        self.source = self._bound()

    def enter(self, level: Level, active: Tensor) -> None:
        """A level begins, for the examples `active`."""
        self.level, self.active = level, active

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of what is visited now."""
        return self.level.rows(self.active, start, stop)

    def _bound(self) -> Source:
        """The points' source: behind the prefix for lines."""
        ends = self.call.inputs, self.baselines
        if self.prefix is not None and self.prefix.line:
            ends = self.prefix.forward(ends[0]), self.prefix.forward(ends[1])
        return self.recipe.family.bind(*ends)

    def launch(self, start: int, stop: int) -> Generator[EvaluationRequest, Any, int]:
        """Adds a launch of rows `start` to `stop` of the level; returns how many it had, 0 where it
        must be tried again.
        """
        rows = self.rows(start, stop)
        if self.exact is not None and self.precision_error is None:
            yield from self.measure_precision(self.exact)
        write, alone = _writer(self.source, rows), self._alone(start, stop)
        known = {row - start: (one.scores, one.magnitude) for row, one in alone.items()}
        result = yield self.request(self.function, rows.example.numel(), write, alone=known)
        yield from self._verify(start, rows, result, alone)
        self.note(result)
        if self.strategy.precision.scaled and not finite(result.gradients) and self.lower_scale():
            return 0
        count = len(result.scores)
        self.add(rows.first(count), result)
        return count

    def _alone(self, start: int, stop: int) -> dict[int, Measured]:
        """What autograd gave at rows of a launch that is to be compared with it."""
        verification = self.job.calibration.verification
        rows = {} if verification is None else verification.rows
        return {row: one for row, one in rows.items() if start <= row < stop}

    def _verify(
        self, start: int, rows: Rows, result: EvaluationResult, alone: Mapping[int, Measured]
    ) -> Generator[EvaluationRequest, Any, None]:
        """Compares rows of a launch with what autograd gave; raises UnverifiedError."""
        verification, count = self.job.calibration.verification, len(result.scores)
        if verification is None:
            return
        for number in [row - start for row in alone if row - start < count]:
            own = slice(number, number + 1)
            several = [tuple(g[own] for g in one) for one in result.gradients]
            if self.prefix is not None:
                several = [self.prefix.vjp(one, rows.example[own]) for one in several]
            verification.compare(start + number, Measured(result.scores[own], several, NOTHING))
        if max(verification.rows) < start + count and self.job.verified is not None:
            yield from self._prove_ends(verification)
            self.job = replace(self.job, calibration=self.job.verified())

    def _prove_ends(self, verification: Verification) -> Generator[EvaluationRequest, Any, None]:
        """Scores the input alone, where no launch of two rows has shown that they do not meet."""
        ends, known = self.job.calibration.ends, self.independence
        if ends is None or known is None or (known.knows(2) and not known.provoke):
            return
        function = self.call.function(RecordedExecutor(ends), (id(ends), "ends"))

        def write(own: slice) -> tuple[Inputs, Tensor]:
            return tuple(x[:1].clone() for x in self.call.inputs), self.everyone[:1]

        result = yield self.request(function, 1, write, gradients=False)
        scale = max(one.magnitude for one in verification.rows.values())
        if not scores_agree(self.scores[0], result.scores[0], scale, function):
            raise RowsMeetError("the input scores alone something else than beside the baseline")

    def add(
        self, rows: Rows, result: EvaluationResult, scale: Tensor | float | None = None
    ) -> None:
        """Adds what a launch of `rows` gave; scale: of its gradients, where it is a tensor."""
        if self.recipe.at_input:
            self.note_scores(rows.example, result.scores, result.classes)
        own = self.function.scale if scale is None else scale
        self.totals.add(rows, result.gradients, self.source, own)
        self.points.index_add_(0, rows.example, torch.ones_like(rows.example))

    def measure_precision(self, exact: PointFunction) -> Generator[EvaluationRequest, Any, None]:
        """Takes some points in float32 too: what the precision costs, and its first scale."""
        source, most, scaled = self.source, self.plan.looked_at, self.strategy.precision.scaled
        examples, of_each = measured_points(self.recipe, self.call.batch, self.config)
        level = self.recipe.levels[0].to(self.call.device)
        rows = spread(level, self.everyone[:examples], of_each)
        theirs = yield from _all_of(exact, source, rows, most)
        if scaled and self.function.scale == 1.0:
            self.function = replace(self.function, scale=first_scale(theirs))
        while True:
            mine = yield from _all_of(self.function, source, rows, most)
            if finite(mine) or not self.lower_scale():
                break
        half, inputs = (mine, self.function.scale), self.call.inputs
        self.precision_error = compared(self.totals, inputs, source, rows, half, theirs)

    def lower_scale(self) -> bool:
        """Lowers the scale of cotangents that half types cannot hold; False where it cannot be."""
        scale = self.function.scale
        if not self.strategy.precision.scaled or scale <= LEAST_SCALE:
            return False
        self.function = replace(self.function, scale=scale / LOWER)
        return True

    def prove(self) -> Generator[EvaluationRequest, Any, None]:
        """Launches whose rows are proved apart, for evaluations whose own launches are captured."""
        most, known = min(self.size, self.recipe.count * self.call.batch), self.independence
        if known is None or most < 2:
            return
        example = torch.arange(most, device=self.call.device) % self.call.batch
        rows = self.recipe.levels[0].to(self.call.device).rows(example, 0, most)
        source = self._bound()
        for size in parts_of(most, self.config):
            request = _requested(self.function, source, rows.first(size))
            while not known.knows(size):
                yield replace(request, independence=known)

    def trial(self, rows: int, arena: Arena) -> None:
        example = torch.zeros(rows, dtype=torch.int64, device=self.call.device)
        level, source = self.recipe.levels[0].to(self.call.device), self._bound()
        with arena.launch():
            self.function.gradients(source.write(level.rows(example, 0, rows)), example)

    def _unfinished(self, active: Tensor) -> Tensor:
        """The examples whose map or completeness is not yet within the tolerance."""
        tolerance, outcome = self.recipe.tolerance or 0.0, self.outcome()
        good, delta = outcome.error <= tolerance, outcome.delta
        if delta is not None and self.baseline_scores is not None:
            gain = (self.scores - self.baseline_scores).abs()
            floor = 1e-6 * torch.maximum(self.scores.abs(), self.baseline_scores.abs())
            good &= delta.abs() <= tolerance * torch.maximum(gain, floor)
        self.converged = good.all(1)
        return active[~self.converged[active]]

    def outcome(self) -> Outcome:
        return self.with_precision(self.exactly())

    def exactly(self) -> Outcome:
        """The outcome without what the precision costs."""
        estimate, shape = self.totals.estimate(), self.scores.shape
        return Outcome(
            tuple(one.view(*shape, *one.shape[1:]) for one in estimate.values),
            self.scores.clone(),
            self.baseline_scores,
            estimate.sums.view(shape),
            estimate.error.view(shape),
            self.points.clone(),
            self.converged,
            self.classes,
            ties=self.ties,
        )

    def with_precision(self, outcome: Outcome) -> Outcome:
        """The outcome with what the precision costs: its error and the rule's add up at most."""
        if self.precision_error is None:
            return outcome
        # A variance is no mean of what its points give, and tells nothing of their size.
        whole = norm_of(tuple(one.flatten(0, 1) for one in outcome.values)).view(self.scores.shape)
        cost = self.precision_error.of(whole * (self.recipe.reduction != "variance"))
        underflow, error = self.precision_error.underflow, outcome.error + cost
        return replace(outcome, error=error, precision_error=cost, underflow=underflow)


def parts_of(size: int, config: EngineConfig) -> tuple[int, ...]:
    """The rows that go through the model at a time in a captured launch. None has a single row,
    which a model may take otherwise.
    """
    split = config.graph_halves and size >= 4
    return (size // 2, size - size // 2) if split else (size,)


def _writer(source: Source, rows: Rows) -> Callable[[slice], tuple[Inputs, Tensor]]:
    """What writes the points of a table of rows."""

    def write(own: slice) -> tuple[Inputs, Tensor]:
        part = rows.part(own.start, own.stop)
        return source.write(part), part.example

    return write


def _requested(function: PointFunction, source: Source, rows: Rows) -> EvaluationRequest:
    """The gradients of a table of rows."""
    return EvaluationRequest(function, rows.example.numel(), _writer(source, rows))


def _all_of(
    function: PointFunction, source: Source, rows: Rows, most: int
) -> Generator[EvaluationRequest, Any, list[Inputs]]:
    """The gradients of all rows, in launches of `most`."""
    parts, start, count = list[EvaluationResult](), 0, rows.example.numel()
    while start < count:
        result = yield _requested(function, source, rows.part(start, min(start + most, count)))
        parts.append(result)
        start += len(result.scores)
    return joined(parts).gradients
