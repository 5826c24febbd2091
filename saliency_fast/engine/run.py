"""Run: points, forward, vector-Jacobian product, accumulate; one loop for every method."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from saliency_fast._types import Inputs
from saliency_fast.engine.arena import Arena, Launches
from saliency_fast.engine.bind import Call
from saliency_fast.engine.folds import Folds, norm_of
from saliency_fast.engine.independence import Independence
from saliency_fast.engine.launch import Answer, Moment, Steps, Want
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
from saliency_fast.engine.memory import bytes_text
from saliency_fast.engine.outcome import Outcome
from saliency_fast.engine.plan import Plan
from saliency_fast.engine.recipe import Level, Recipe, Rows, Source
from saliency_fast.engine.ties import Tied
from saliency_fast.engine.way import Model, Way
from saliency_fast.errors import BudgetError
from saliency_fast.model.failures import is_out_of_memory
from saliency_fast.model.function import PointFunction

LOWER = 16.0
"""What a scale is divided by where half types overflow."""


class Run:
    """One call on its way: the state that launches share. `steps` is the loop. independence: what
    is known of the model's rows, where launches of several are to be proved.
    """

    folds: Folds
    source: Source
    level: Level
    active: Tensor
    independence: Independence | None = None

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
        self.function = way.function(model, call, recipe)
        self.hoist = way.hoist(call, recipe, plan.points_per_launch)
        self.behind = way.launched(model, call, recipe, baselines)
        self.exact = None if way.precision.exact else way.exact().launched(model, call, recipe)
        function = self.function
        if self.exact is not None and plan.looked_at == 0:
            known = everywhere(math.nan, function.targets.count, call.device)
        self.loss, self.judged = known, False
        self.size, self.halvings = plan.points_per_launch, 0
        self.launches = launches
        shape, device = (call.batch, function.targets.count), call.device
        self.everyone = torch.arange(call.batch, device=device)
        self.scores = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.baseline_scores: Tensor | None = None
        self.classes = function.targets.classes
        self.points = torch.zeros(call.batch, dtype=torch.int64, device=device)
        self.converged: Tensor | None = None
        self.tied: Tied | None = None

    def steps(self, moment: Callable[[int, int], Moment]) -> Steps:
        """Runs every level launch by launch, with a moment after each; at the end `outcome` is the
        answer.

        Whoever runs it sends the answer to each `Want` back in, or throws what went wrong.
        """
        yield from self.begin()
        folds, recipe = self.folds, self.recipe
        active, done, of = self.everyone, 0, recipe.count * self.call.batch
        for level in recipe.levels:
            folds.begin(level.keep, active)
            start, stop = 0, level.count * active.numel()
            self.enter(level.to(self.call.device), active)
            while start < stop:
                count = yield from self.launch(start, min(start + self.size, stop))
                start, done = start + count, done + count
                if count == 0:
                    continue
                if not folds.nested:
                    yield moment(done, of)
            if folds.nested:
                active = self._unfinished(active)
                # What is over counts as all of it, also where examples stopped early.
                over = active.numel() == 0 or level is recipe.levels[-1]
                yield moment(of if over else done, of)
            if active.numel() == 0:
                break

    def begin(self) -> Generator[Want, Answer, None]:
        """What comes before the first point: scores at the ends, accumulators, the source."""
        yield from self._ends()
        maps = self.scores.shape[1]
        self.folds = Folds(self.recipe, self.call.inputs, self.baselines, maps, self.hoist)
        self.source = self.recipe.family.bind(*self._ends_of_lines())

    def know(self, tied: Tied | None) -> None:
        """What hangs on ties, before the first launch."""
        self.tied = tied
        if tied is not None and tied.apart:
            self.size = 1

    def enter(self, level: Level, active: Tensor) -> None:
        """A level begins, for the examples `active`."""
        self.level, self.active = level, active

    def _ends_of_lines(self) -> tuple[Inputs, Inputs]:
        """Inputs and baselines as points are written from them: behind the prefix for lines."""
        inputs, baselines = self.call.inputs, self.baselines
        if self.hoist is None or not self.hoist.line:
            return inputs, baselines
        return self.hoist.lift(inputs), self.hoist.lift(baselines)

    def launch(self, start: int, stop: int) -> Generator[Want, Answer, int]:
        """Folds in a launch of rows `start` to `stop` of the level; returns how many it had, 0
        where it must be tried again.
        """
        rows = self.level.rows(self.active, start, stop)
        try:
            if self.exact is not None and self.loss is None:
                yield from self.look(self.exact)
            want = _wanted(self.behind, self.source, rows, self.launches)
            want.independence = self.independence
            answer = yield want
        except (RuntimeError, MemoryError) as error:
            self._halve(error)
            return 0
        if self.way.precision.scaled and not finite(answer.grads) and self._lower():
            return 0
        self.fold_in(rows.first(want.taken), answer)
        return want.taken

    def fold_in(self, rows: Rows, answer: Answer, scale: Tensor | None = None) -> None:
        """Adds what a launch of `rows` gave; scale: of its gradients, where it is a tensor."""
        if self.recipe.at_input:
            self._note_scores(rows.item, answer.scores, answer.classes)
        own = self.behind.scale if scale is None else scale
        self.folds.add(rows, answer.grads, self.source, own)
        self.points.index_add_(0, rows.item, torch.ones_like(rows.item))

    def look(self, exact: PointFunction) -> Generator[Want, Answer, None]:
        """Takes some points in float32 too: what the precision costs, and its first scale."""
        source, most = self.source, self.plan.looked_at
        examples, of_each = looked_at(self.recipe, self.call.batch)
        level = self.recipe.levels[0].to(self.call.device)
        rows = spread(level, self.everyone[:examples], of_each)
        theirs = yield from _all_of(exact, source, rows, most)
        if self.way.precision.scaled and self.behind.scale == 1.0:
            self.behind.scale = first_scale(theirs)
        while True:
            mine = yield from _all_of(self.behind, source, rows, most)
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

    def prove(self) -> Generator[Want, Answer, None]:
        """Launches whose rows are proved apart, for runs whose own launches are recorded."""
        size = min(self.size, self.recipe.count * self.call.batch)
        if self.independence is None or size < 2:
            return
        item = torch.arange(size, device=self.call.device) % self.call.batch
        rows = self.recipe.levels[0].to(self.call.device).rows(item, 0, size)
        source = self.recipe.family.bind(*self._ends_of_lines())
        while not self.independence.knows(size):
            want = _wanted(self.behind, source, rows)
            want.independence = self.independence
            yield want

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

    def _ends(self) -> Generator[Want, Answer, None]:
        """Scores at the inputs and at the baselines, where launches do not bring them along."""
        starts = self.recipe.baseline == "one" and self.recipe.ends
        if self.recipe.at_input and not starts:
            return
        batch, rows = self.call.batch, len(self.baselines[0])
        predicted = self.function.targets.predicted
        inputs = predicted or not self.recipe.at_input
        both = starts and inputs and not predicted and 2 * batch <= self.size
        table, row = self.call.inputs, self.everyone
        if both:
            table, row = self._inputs_and_starts(), torch.arange(2 * batch, device=row.device)
        if inputs:
            scores, classes = yield from self._score(table, row, row % batch)
            self._note_scores(self.everyone, scores[:batch], None if both else classes)
        if self.classes is not None:
            self.function.targets = replace(self.function.targets, classes=self.classes)
            for function in (self.behind, self.exact):
                if function is not None:
                    function.targets = self.function.targets
        if both:
            self.baseline_scores = scores[batch:]
        elif starts:
            table = tuple(
                one.expand_as(x) for one, x in zip(self.baselines, self.call.inputs, strict=True)
            )
            found = yield from self._score(table, self.everyone, self.everyone)
            self.baseline_scores = found[0]
        elif self.recipe.baseline == "set" and rows <= self.recipe.count:
            item = self.everyone.repeat_interleave(rows)
            row = torch.arange(rows, device=item.device).repeat(batch)
            drawn, _ = yield from self._score(self.baselines, row, item)
            self.baseline_scores = drawn.view(batch, rows, -1).mean(1)

    def _inputs_and_starts(self) -> Inputs:
        """Inputs and baselines in one table [2B, *], where one launch can score both."""
        pairs = zip(self.call.inputs, self.baselines, strict=True)
        return tuple(torch.cat([x, baseline.expand_as(x)]) for x, baseline in pairs)

    def _score(
        self, table: Inputs, row: Tensor, item: Tensor
    ) -> Generator[Want, Answer, tuple[Tensor, Tensor | None]]:
        """Scores float64 [R, K] and classes of table rows `row` [R] as inputs of `item` [R]."""
        scores, classes, start = [], [], 0
        while start < row.numel():

            def write(own: slice, start: int = start) -> tuple[Inputs, Tensor]:
                # Indexing copies, so a model that works in place spares the user's tensors.
                part = slice(start + own.start, start + own.stop)
                return tuple(one[row[part]] for one in table), item[part]

            rows = min(self.size, row.numel() - start)
            want = Want(self.function, rows, write, gradients=False)
            want.independence = self.independence
            try:
                answer = yield want
            except (RuntimeError, MemoryError) as error:
                self._halve(error)
                continue
            scores.append(answer.scores.double())
            classes.append(answer.classes)
            start += want.taken
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
            tied=self.tied,
        )


def _wanted(
    function: PointFunction, source: Source, rows: Rows, launches: Launches | None = None
) -> Want:
    """The gradients of a table of rows."""

    def write(own: slice) -> tuple[Inputs, Tensor]:
        part = rows.part(own.start, own.stop)
        return source.write(part), part.item

    return Want(function, rows.item.numel(), write, launches=launches)


def _all_of(
    function: PointFunction, source: Source, rows: Rows, most: int
) -> Generator[Want, Answer, list[Inputs]]:
    """The gradients of all rows, in launches of `most`."""
    found, start, count = [], 0, rows.item.numel()
    while start < count:
        want = _wanted(function, source, rows.part(start, min(start + most, count)))
        answer = yield want
        found.append(answer.grads)
        start += want.taken
    if len(found) == 1:
        return found[0]
    return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*found, strict=True)]
