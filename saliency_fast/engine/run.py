"""Run: points, forward, vector-Jacobian product, accumulate; one loop for every method."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.folds import Folds, norm_of
from saliency_fast.engine.loss import (
    LEAST_SCALE,
    Loss,
    everywhere,
    finite,
    first_scale,
    looked_at,
    loss_of,
    spread,
)
from saliency_fast.engine.memory import bytes_text, is_out_of_memory
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.recipe import Recipe, Rows, Source
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import BudgetError, ModelError
from saliency_fast.model.function import PointFunction
from saliency_fast.model.routes import Inputs

LOWER = 16.0
"""What a scale is divided by where half types overflow."""


@dataclass(frozen=True)
class Outcome:
    """The engine's answer for B examples with K maps each.

    values: per input [B, K, *]. scores, baseline_scores, sums (of the values), error (relative L2,
    estimated): float64 [B, K]; classes int64 [B, K] where targets are classes. points int64 [B]
    visited, converged bool [B] where a tolerance was asked for. precision_error [B, K]: what of
    the error its precision costs, where that is not float32, and `underflow` the share of gradients
    that it could not hold.
    """

    values: Inputs
    scores: Tensor
    baseline_scores: Tensor | None
    sums: Tensor
    error: Tensor
    points: Tensor
    converged: Tensor | None
    classes: Tensor | None
    halvings: int = 0
    precision_error: Tensor | None = None
    underflow: float = 0.0

    @property
    def delta(self) -> Tensor | None:
        """Completeness: the sum of the values less what the score gained over the baseline."""
        if self.baseline_scores is None:
            return None
        return self.sums - (self.scores - self.baseline_scores)


@dataclass(frozen=True)
class Moment:
    """A launch is done: `done` of at most `of` points; `outcome()` is the map so far."""

    done: int
    of: int
    outcome: Callable[[], Outcome]


class Run:
    """One call on its way: the state that launches share. `moments` is the loop."""

    def __init__(
        self,
        way: Way,
        model: Model,
        call: Call,
        baselines: Inputs,
        recipe: Recipe,
        plan: Plan,
        launches: Launches | None = None,
        known: Loss | None = None,
    ) -> None:
        """known: what the precision costs, where an earlier call has told."""
        self.call, self.recipe, self.plan, self.baselines = call, recipe, plan, baselines
        self.way = way
        self.function = way.function(model, call)
        self.hoist = way.hoist(call, recipe, plan.points_per_launch)
        self.behind = way.launched(model, call, recipe)
        self.exact = None if way.precision.exact else way.exact().launched(model, call, recipe)
        function = self.function
        if self.exact is not None and plan.looked_at == 0:
            known = everywhere(math.nan, function.targets.count, call.device)
        self.loss = known
        self.size, self.halvings = plan.points_per_launch, 0
        self.launches = launches
        shape, device = (call.batch, function.targets.count), call.device
        self.everyone = torch.arange(call.batch, device=device)
        self.scores = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.baseline_scores: Tensor | None = None
        self.classes = function.targets.classes
        self.points = torch.zeros(call.batch, dtype=torch.int64, device=device)
        self.folds: Folds | None = None
        self.converged: Tensor | None = None

    def moments(self) -> Iterator[Moment]:
        """Runs every level launch by launch; the last moment's outcome is the answer."""
        self._arena = Arena(self.call.device, about=self.plan.launch_bytes)
        try:
            yield from self._moments()
        finally:
            self._arena.close()

    def _moments(self) -> Iterator[Moment]:
        self._ends()
        inputs, recipe = self.call.inputs, self.recipe
        folds = self.folds = Folds(recipe, inputs, self.baselines, self.scores.shape[1], self.hoist)
        source = recipe.family.bind(*self._ends_of_lines())
        active, done, of = self.everyone, 0, recipe.count * self.call.batch
        for level in recipe.levels:
            here = level.to(self.call.device)
            folds.begin(level.keep, active)
            start, stop = 0, level.count * active.numel()
            while start < stop:
                rows = here.rows(active, start, min(start + self.size, stop))
                grads = self._launch(source, rows)
                if grads is None:
                    continue
                folds.add(rows, grads, source, self.behind.scale)
                self.points.index_add_(0, rows.item, torch.ones_like(rows.item))
                start += rows.item.numel()
                done += rows.item.numel()
                # Else they would stay alive through the next launch.
                del grads
                if not folds.nested:
                    yield Moment(done, of, self.outcome)
            if folds.nested:
                active = self._unfinished(active)
                # What is over counts as all of it, also where examples stopped early.
                over = active.numel() == 0 or level is recipe.levels[-1]
                yield Moment(of if over else done, of, self.outcome)
            if active.numel() == 0:
                break

    def _ends_of_lines(self) -> tuple[Inputs, Inputs]:
        """Inputs and baselines as points are written from them: behind the prefix for lines."""
        inputs, baselines = self.call.inputs, self.baselines
        if self.hoist is None or not self.hoist.line:
            return inputs, baselines
        return self.hoist.lift(inputs), self.hoist.lift(baselines)

    def _launch(self, source: Source, rows: Rows) -> list[Inputs] | None:
        """The gradients of one launch; None where it must be tried again with half the points."""
        try:
            if self.exact is not None and self.loss is None:
                self._look(self.exact, source)
            expected = self.launches.of(rows.item.numel()) if self.launches else None
            with self._arena.launch(expected):
                scores, classes, grads = self.behind.gradients(source.write(rows), rows.item)
        except (RuntimeError, MemoryError) as error:
            self._halve(error)
            return None
        if self.way.precision.scaled and not finite(grads) and self._lower():
            return None
        if self.recipe.at_input:
            self._note_scores(rows.item, scores, classes)
        return grads

    def _look(self, exact: PointFunction, source: Source) -> None:
        """Takes some points in float32 too: what the precision costs, and its first scale."""
        assert self.folds is not None
        examples, _ = looked_at(self.recipe, self.call.batch)
        level = self.recipe.levels[0].to(self.call.device)
        # As many points of each example as one launch of them in float32 may have.
        rows = spread(level, self.everyone[:examples], self.plan.looked_at // examples)
        with self._arena.launch():
            _, _, theirs = exact.gradients(source.write(rows), rows.item)
        if self.way.precision.scaled and self.behind.scale == 1.0:
            self.behind.scale = first_scale(theirs)
        while True:
            with self._arena.launch():
                _, _, mine = self.behind.gradients(source.write(rows), rows.item)
            if finite(mine) or not self._lower():
                break
        half, inputs = (mine, self.behind.scale), self.call.inputs
        self.loss = loss_of(self.folds, inputs, source, rows, half, theirs)

    def _lower(self) -> bool:
        """Lowers the scale of cotangents that half types cannot hold; False where it cannot be."""
        if not self.way.precision.scaled or self.behind.scale <= LEAST_SCALE:
            return False
        self.behind.scale /= LOWER
        return True

    def try_launch(self, rows: int, arena: Arena) -> None:
        """A launch of the first point, `rows` times, in `arena`; nothing is kept of it."""
        item = torch.zeros(rows, dtype=torch.int64, device=self.call.device)
        level = self.recipe.levels[0].to(self.call.device)
        source = self.recipe.family.bind(*self._ends_of_lines())
        with arena.launch():
            self.behind.gradients(source.write(level.rows(item, 0, rows)), item)

    def _halve(self, error: BaseException) -> None:
        if not is_out_of_memory(error):
            raise error
        if self.size == 1:
            raise BudgetError(
                f"one point alone does not fit in memory: the plan expected "
                f"{bytes_text(self.plan.bytes_per_point)} a point; explain fewer examples or a "
                f"smaller input at once ({error})"
            ) from error
        self.size, self.halvings = (self.size + 1) // 2, self.halvings + 1
        if self.call.device.type == "cuda":
            # The failed launch lives on in the frames that the error holds.
            traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()

    def _ends(self) -> None:
        """Scores at the inputs and at the baselines, where launches do not bring them along."""
        if self.recipe.at_input:
            return
        batch, rows = self.call.batch, len(self.baselines[0])
        starts = self.recipe.baseline == "one"
        both = starts and not self.function.targets.predicted and 2 * batch <= self.size
        table, row = self.call.inputs, self.everyone
        if both:
            table, row = self._inputs_and_starts(), torch.arange(2 * batch, device=row.device)
        scores, classes = self._score(table, row, row % batch)
        self._note_scores(self.everyone, scores[:batch], None if both else classes)
        if self.classes is not None:
            self.function.targets = replace(self.function.targets, classes=self.classes)
            self.behind.targets = self.function.targets
        if both:
            self.baseline_scores = scores[batch:]
        elif starts:
            table = tuple(
                one.expand_as(x) for one, x in zip(self.baselines, self.call.inputs, strict=True)
            )
            self.baseline_scores, _ = self._score(table, self.everyone, self.everyone)
        elif self.recipe.baseline == "set" and rows <= self.recipe.count:
            item = self.everyone.repeat_interleave(rows)
            row = torch.arange(rows, device=item.device).repeat(batch)
            found, _ = self._score(self.baselines, row, item)
            self.baseline_scores = found.view(batch, rows, -1).mean(1)

    def _inputs_and_starts(self) -> Inputs:
        """Inputs and baselines in one table [2B, *], where one launch can score both."""
        pairs = zip(self.call.inputs, self.baselines, strict=True)
        return tuple(torch.cat([x, baseline.expand_as(x)]) for x, baseline in pairs)

    def _score(self, table: Inputs, row: Tensor, item: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores float64 [R, K] and classes of table rows `row` [R] as inputs of `item` [R]."""
        scores, classes, start = [], [], 0
        while start < row.numel():
            part = slice(start, start + self.size)
            try:
                # Indexing copies, so a model that works in place spares the user's tensors.
                points = tuple(one[row[part]] for one in table)
                with self._arena.launch():
                    score, chosen = self.function.scores(points, item[part])
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            scores.append(score.double())
            classes.append(chosen)
            start += score.shape[0]
        known = [chosen for chosen in classes if chosen is not None]
        return torch.cat(scores), torch.cat(known) if known else None

    def _note_scores(self, item: Tensor, scores: Tensor, classes: Tensor | None) -> None:
        self.scores[item] = scores.double()
        if classes is not None:
            if self.classes is None:
                self.classes = torch.zeros_like(self.scores, dtype=torch.int64)
            self.classes[item] = classes

    def _unfinished(self, active: Tensor) -> Tensor:
        """The examples whose map or completeness is not yet within the tolerance."""
        tolerance = self.recipe.tolerance
        outcome = self.outcome()
        delta = outcome.delta
        good = outcome.error <= (tolerance or 0.0)
        if delta is not None and self.baseline_scores is not None:
            gain = (self.scores - self.baseline_scores).abs()
            floor = 1e-6 * torch.maximum(self.scores.abs(), self.baseline_scores.abs())
            good &= delta.abs() <= (tolerance or 0.0) * torch.maximum(gain, floor)
        self.converged = good.all(1)
        return active[~self.converged[active]]

    def outcome(self) -> Outcome:
        """The answer from what was visited so far."""
        assert self.folds is not None
        found = self.folds.estimate()
        shape = self.scores.shape
        error, lost = found.error.view(shape), None
        if self.loss is not None:
            # A variance is no mean of what its points give, and tells nothing of their size.
            whole = norm_of(found.values).view(shape)
            lost = self.loss.error(whole * (self.recipe.reduction != "variance"))
        return Outcome(
            tuple(one.view(*shape, *one.shape[1:]) for one in found.values),
            self.scores.clone(),
            self.baseline_scores,
            found.sums.view(shape),
            # Of the rule, and of the precision: errors add up at most.
            error if lost is None else error + lost,
            self.points.clone(),
            self.converged,
            self.classes,
            self.halvings,
            lost,
            0.0 if self.loss is None else self.loss.underflow,
        )


def average(outcomes: list[Outcome]) -> Outcome:
    """The mean over several baselines; its error is at most the mean of theirs, by the triangle
    inequality: absolute errors add up, and the mean map may be smaller than each.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    share, last = 1.0 / len(outcomes), outcomes[-1]
    baseline_scores = [one.baseline_scores for one in outcomes if one.baseline_scores is not None]
    converged = [one.converged for one in outcomes if one.converged is not None]
    values = tuple(
        sum(parts[1:], parts[0]) * share
        for parts in zip(*(one.values for one in outcomes), strict=True)
    )
    tiny = torch.finfo(torch.float64).tiny
    norms, norm = [_norm(one.values) for one in outcomes], _norm(values).clamp_min(tiny)

    def relative(errors: list[Tensor]) -> Tensor:
        pairs = zip(errors, norms, strict=True)
        return torch.stack([error * size for error, size in pairs]).mean(0) / norm

    lost = [one.precision_error for one in outcomes if one.precision_error is not None]
    return replace(
        last,
        values=values,
        sums=torch.stack([one.sums for one in outcomes]).mean(0),
        error=relative([one.error for one in outcomes]),
        baseline_scores=torch.stack(baseline_scores).mean(0) if baseline_scores else None,
        converged=torch.stack(converged).all(0) if converged else None,
        points=torch.stack([one.points for one in outcomes]).sum(0),
        halvings=max(one.halvings for one in outcomes),
        precision_error=relative(lost) if lost else None,
        underflow=max(one.underflow for one in outcomes),
    )


def _norm(values: Inputs) -> Tensor:
    """L2 norm of each map over all inputs: float64 [B, K]."""
    return norm_of(tuple(one.flatten(0, 1) for one in values)).view(values[0].shape[:2])


def need_finite(outcome: Outcome) -> None:
    """Raises ModelError where the model gave NaN or infinity."""
    found = {"scores": outcome.scores, "attributions": outcome.sums}
    if outcome.baseline_scores is not None:
        found["scores at the baseline"] = outcome.baseline_scores
    for name, numbers in found.items():
        bad = ~torch.isfinite(numbers).all(1)
        if bool(bad.any()):
            raise ModelError(
                f"the model gives NaN or infinite {name} for examples "
                f"{bad.nonzero().flatten().tolist()[:8]}: expected finite numbers; check the "
                "model's output and gradient there (torch.autograd.set_detect_anomaly helps)"
            )
